"""Native mixed precision, and the contract with Apex against a stand-in."""

import contextlib
import sys
import types

import pytest
import torch
from torch import nn

import main as program
from engine import run
from engine.config_tree import ConfigError
from engine.precision import ApexPrecision, Precision, build_precision, import_apex_amp
from tests.helpers.golden import fill_
from tests.helpers.runs import CPU, folder_of, last_checkpoint, records

GPU = torch.device('cuda')
NO, YES = torch.tensor(False), torch.tensor(True)


def take_step(precision, clip=0.0, factor=1.0, skip_update=NO):
    """Gradient, its norm, the network after a step of size 64 on a linear loss, and the dtype of its output."""
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=64.0)
    seen = {}
    optimizer.register_step_pre_hook(lambda *_: seen.update(gradient=model.weight.grad.clone()))
    with precision.autocast():
        out = model(torch.tensor([[2.0, 4.0, 4.0]]) * factor)
    precision.backward(out.float().sum() / 64, optimizer)  # small, as losses are: the scale starts at 65,536
    norm, skipped = precision.step(optimizer, model, clip, skip_update)
    assert skipped.item() == ('gradient' not in seen)
    return seen.get('gradient'), norm, model, out.dtype


@pytest.mark.parametrize(
    ('level', 'dtype', 'expected'),
    [
        ('O0', torch.float16, torch.float32),
        ('O1', torch.float16, torch.float16),
        ('O1', torch.bfloat16, torch.bfloat16),
    ],
)
def test_levels(level, dtype, expected):
    gradient, norm, model, out_dtype = take_step(Precision(level, dtype, CPU))
    assert out_dtype == expected
    assert (64 * gradient).tolist() == [[2.0, 4.0, 4.0]]  # unscaled
    assert norm.item() == 6.0 / 64
    assert model.weight.tolist() == [[-1.0, -3.0, -3.0]]
    assert model.weight.grad is None


@pytest.mark.parametrize(
    ('clip', 'expected'), [(0.0, [2.0, 4.0, 4.0]), (3.0, [1.0, 2.0, 2.0]), (60.0, [2.0, 4.0, 4.0])]
)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_clipping_acts_on_unscaled_gradients_and_0_means_none(clip, expected, dtype):
    gradient, norm, _, _ = take_step(Precision('O1', dtype, CPU), clip / 64)
    torch.testing.assert_close(64 * gradient, torch.tensor([expected]), rtol=1e-4, atol=0)
    assert norm.item() == 6.0 / 64  # before clipping


@pytest.mark.parametrize('clip', [0.0, 3.0])
def test_float16_overflow_skips_the_step_and_lowers_the_scale(clip):
    precision = Precision('O1', torch.float16, CPU)
    before = precision.scaler.get_scale()
    gradient, norm, model, _ = take_step(precision, clip, factor=1e4)
    assert gradient is None
    assert not norm.isfinite()
    assert (model.weight == 1).all()
    assert precision.scaler.get_scale() == before / 2


def test_state_is_the_scale():
    one, two = (Precision('O1', torch.float16, CPU) for _ in range(2))
    take_step(one, factor=1e4)
    two.load_state_dict(one.state_dict())
    assert two.scaler.get_scale() == one.scaler.get_scale()
    none = Precision('O0', torch.float16, CPU)
    assert none.state_dict() == {}
    two.load_state_dict(none.state_dict())  # from a checkpoint without a scaler
    assert two.scaler.get_scale() == one.scaler.get_scale()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_skip_update(dtype):
    gradient, norm, model, _ = take_step(Precision('O1', dtype, CPU), skip_update=YES)
    assert gradient is None
    assert norm.isfinite()
    assert (model.weight == 1).all()
    assert model.weight.grad is None


@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('skip', ['requested', 'overflow', 'no'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_fused_and_other_optimizers_skip_the_same_updates(fused, skip, dtype):
    precision = Precision('O1', dtype, CPU)
    model = fill_(nn.Linear(3, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5, fused=fused)
    for number in range(3):
        before = [p.detach().clone() for p in model.parameters()]
        steps = [state['step'].item() for state in optimizer.state.values()]
        is_bad = number == 1 and skip != 'no'
        factor = float('inf') if is_bad and skip == 'overflow' else 1 / 64
        with precision.autocast():
            out = model(torch.ones(1, 3))
        precision.backward(out.float().sum() * factor, optimizer)
        _, skipped = precision.step(optimizer, model, 1.0, torch.tensor(is_bad and skip == 'requested'))
        assert skipped.item() == is_bad
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)) == is_bad
        assert is_bad == (steps == [state['step'].item() for state in optimizer.state.values()])


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_mixed_precision_trains_and_saves_its_scale(tiny_config, image_tree, dtype):
    config = tiny_config(
        DATA__DATA_PATH=str(image_tree), AMP_OPT_LEVEL='O1', AMP_DTYPE=dtype, TRAIN__USE_CHECKPOINT='True'
    )
    program.main(config)
    state = last_checkpoint(config)['precision']
    assert ('scale' in state) == (dtype == 'float16')
    assert records(config, 'epoch')[-1]['train_loss'] < 3


class StandInAmp(types.ModuleType):
    """A stand-in for `apex.amp` of release 25.05: scales by 8, skips on overflow, records calls."""

    def __init__(self):
        super().__init__('apex.amp')
        self.calls = []
        self.scale = 8.0

    def initialize(self, model, optimizer=None, opt_level='O1'):
        self.calls.append(('initialize', opt_level, optimizer is not None))
        return model if optimizer is None else (model, optimizer)

    @contextlib.contextmanager
    def scale_loss(self, loss, optimizer, delay_unscale=False):
        self.calls.append(('scale_loss', delay_unscale))
        yield loss * self.scale
        if delay_unscale:
            return
        gradients = [p.grad for p in self.master_params(optimizer)]
        for gradient in gradients:
            gradient.div_(self.scale)
        if not all(gradient.isfinite().all() for gradient in gradients):
            self.scale /= 2
            step = optimizer.step

            def skip_step():
                self.calls.append('skip')
                optimizer.step = step

            optimizer.step = skip_step

    def master_params(self, optimizer):
        return (p for group in optimizer.param_groups for p in group['params'])

    def state_dict(self):
        return {'loss_scaler0': {'loss_scale': self.scale, 'unskipped': 0}}

    def load_state_dict(self, state):
        self.scale = state['loss_scaler0']['loss_scale']


@pytest.fixture
def apex(monkeypatch):
    module = types.ModuleType('apex')
    module.amp = StandInAmp()
    monkeypatch.setitem(sys.modules, 'apex', module)
    monkeypatch.setitem(sys.modules, 'apex.amp', module.amp)
    return module.amp


@pytest.mark.parametrize('level', ['O1', 'O2'])
def test_apex_is_called_as_published(apex, level):
    precision = ApexPrecision(level, apex)
    model = nn.Linear(3, 1, bias=False)
    nn.init.ones_(model.weight)
    model, optimizer = precision.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    images = torch.tensor([[2.0, 4.0, 4.0]])

    def update(factors, clip=0.0, skip_update=NO):
        for number, factor in enumerate(factors, start=1):
            with precision.autocast():
                loss = model(images).sum() * factor
            precision.backward(loss, optimizer, is_last=number == len(factors))
        return precision.step(optimizer, model, clip, skip_update)

    norm, skipped = update([0.25, 0.75])  # two batches
    calls = [('initialize', level, True), ('scale_loss', True), ('scale_loss', False)]
    if level == 'O2':
        calls.insert(1, ('scale_loss', True))  # in `prepare`, where Apex makes its master weights
    assert apex.calls == calls
    assert (norm.item(), skipped.item()) == (6.0, False)
    assert model.weight.tolist() == [[-1.0, -3.0, -3.0]]  # unscaled
    assert model.weight.grad is None

    norm, skipped = update([1.0], clip=3.0)  # half of it
    torch.testing.assert_close(model.weight, torch.tensor([[-2.0, -5.0, -5.0]]), rtol=1e-5, atol=0)
    before = model.weight.detach().clone()

    norm, skipped = update([float('inf')])
    assert (norm.isfinite().item(), skipped.item(), apex.calls[-1]) == (False, True, 'skip')
    norm, skipped = update([1.0], skip_update=YES)
    assert (norm.item(), skipped.item()) == (6.0, True)
    norm, skipped = update([float('nan')], skip_update=YES)  # skipped on request and by Apex; the next is not
    assert skipped.item()
    assert torch.equal(model.weight, before)
    assert not update([1.0])[1].item()
    assert not torch.equal(model.weight, before)

    state = precision.state_dict()
    assert state['amp'] == {'loss_scaler0': {'loss_scale': 2.0, 'unskipped': 0}}
    masters = [p.detach().clone() for p in state['masters']]
    assert len(masters) == (level == 'O2')
    state['masters'] = masters
    apex.scale = 1.0
    precision.load_state_dict({})  # from a native run
    assert apex.scale == 1.0
    update([1.0])
    precision.load_state_dict(state)
    assert apex.scale == 2.0
    assert all(torch.equal(model.weight, master) for master in masters)
    Precision('O1', torch.float16, CPU).load_state_dict(state)  # and the reverse


def test_apex_prepares_a_network_for_evaluation(apex):
    model = nn.Linear(1, 1)
    assert ApexPrecision('O2', apex).prepare(model) == (model, None)
    assert apex.calls == [('initialize', 'O2', False)]


def test_a_run_with_apex(apex, tiny_config, image_tree, monkeypatch):
    """The whole program on the stand-in; its scale is saved and restored."""
    monkeypatch.setattr(run, 'build_precision', lambda *_: ApexPrecision('O1', apex))
    config = tiny_config(DATA__DATA_PATH=str(image_tree), TRAIN__ACCUMULATION_STEPS='4')
    apex.scale = 2.0**10
    program.main(config)
    assert apex.calls[0] == ('initialize', 'O1', True)
    assert apex.calls[1:7] == [('scale_loss', delay) for delay in (True, True, True, False, True, False)]
    assert last_checkpoint(config)['precision']['amp'] == apex.state_dict()
    assert records(config, 'epoch')[-1]['train_loss'] < 2
    apex.scale = 1.0
    (folder_of(config) / 'ckpt_epoch_1.pth').unlink()
    program.main(config)
    assert apex.scale == 2.0**10
    path = str(folder_of(config) / 'ckpt_epoch_1.pth')
    program.main(tiny_config(DATA__DATA_PATH=str(image_tree), EVAL_MODE='True', MODEL__RESUME=path))
    assert apex.calls[-1] == ('initialize', 'O1', False)


def test_choice_of_backend(apex, tiny_config):
    def choose(device=GPU, compiles=False, **options):
        return str(build_precision(tiny_config(**options), device, compiles))

    assert choose() == choose(AMP_BACKEND='apex') == 'Apex O1'  # published
    assert choose(AMP_OPT_LEVEL='O2') == 'Apex O2'
    assert choose(AMP_BACKEND='native') == 'float16 autocast'
    assert choose(AMP_DTYPE='bfloat16') == 'bfloat16 autocast'  # not supported by Apex
    assert choose(AMP_OPT_LEVEL='O0') == choose(AMP_OPT_LEVEL='O0', AMP_BACKEND='apex') == 'float32'
    assert choose(compiles=True) == 'float16 autocast'  # no Apex in graphs
    assert choose(CPU) == 'float32'
    assert choose(CPU, AMP_OPT_LEVEL='O1') == 'float16 autocast'
    assert choose(CPU, AMP_OPT_LEVEL='O1', AMP_DTYPE='bfloat16') == 'bfloat16 autocast'
    for device, options, message in (
        (CPU, {'AMP_BACKEND': 'apex'}, 'AMP_BACKEND is apex, but no GPU: write native or auto'),
        (GPU, {'AMP_BACKEND': 'apex', 'AMP_DTYPE': 'bfloat16'}, 'AMP_DTYPE is bfloat16, which Apex does not support'),
        (GPU, {'AMP_BACKEND': 'apex', 'compiles': True}, 'torch.compile cannot trace: write native'),
        (
            GPU,
            {'AMP_OPT_LEVEL': 'O2', 'TRAIN__EMA_DECAY': '0.9'},
            'EMA_DECAY does not work with the float16 weights of O2',
        ),
        (GPU, {'AMP_OPT_LEVEL': 'O2', 'AMP_BACKEND': 'native'}, "AMP_OPT_LEVEL is 'O2', which needs NVIDIA Apex"),
        (
            CPU,
            {'AMP_OPT_LEVEL': 'O2'},
            "AMP_OPT_LEVEL is 'O2', which needs NVIDIA Apex .*install it, or write O0 or O1",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            choose(device, **options)


def test_apex_missing_or_another_package_of_that_name(tiny_config, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'apex', None)  # not installed
    assert import_apex_amp() is None
    assert str(build_precision(tiny_config(), GPU)) == 'float16 autocast'
    assert str(build_precision(tiny_config(AMP_BACKEND='native'), GPU)) == 'float16 autocast'
    assert str(build_precision(tiny_config(AMP_OPT_LEVEL='O0'), GPU)) == 'float32'
    assert str(build_precision(tiny_config(), CPU)) == 'float32'
    with pytest.raises(ConfigError, match='NVIDIA Apex .* is not installed: write native or auto'):
        build_precision(tiny_config(AMP_BACKEND='apex'), GPU)
    monkeypatch.delitem(sys.modules, 'apex')
    monkeypatch.syspath_prepend(tmp_path)
    for text in ('amp = 1', 'import nowhere', 'raise RuntimeError', ''):  # the last: Apex after 25.05
        (tmp_path / 'apex.py').write_text(text)
        monkeypatch.delitem(sys.modules, 'apex', raising=False)
        assert import_apex_amp() is None
