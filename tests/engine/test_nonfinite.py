"""Losses and gradient norms that are not finite."""

import math

import pytest
import torch
from torch.overrides import TorchFunctionMode

import main as program
from engine.nonfinite import HostCopy, NonFinitePolicy, check_first_bad
from engine.precision import Precision
from engine.state import TrainingState
from engine.trainer import Trainer
from models import build_model
from tests.helpers.golden import fill_
from tests.helpers.runs import build_trainer, folder_of, last_checkpoint, log_of, records, weights

BAD = [math.nan, math.inf, -math.inf]


def batch():
    return torch.randn(4, 3, 28, 28), torch.arange(4) % 3


def scale_loss(trainer, factor):
    """Multiply a trainer's losses by a factor."""
    loss_fn = trainer.loss_fn
    trainer.loss_fn = lambda batch: {name: loss * factor for name, loss in loss_fn(batch).items()}


def poison(monkeypatch, at, value=math.nan):
    """Multiply the losses of some updates, counted over the run, by `value`."""
    made = []
    train_step = Trainer.train_step

    def step(trainer, *arguments):
        loss_fn = trainer.loss_fn
        if len(made) in at:
            scale_loss(trainer, value)
        made.append(trainer.state.step)
        try:
            return train_step(trainer, *arguments)
        finally:
            trainer.loss_fn = loss_fn

    monkeypatch.setattr(Trainer, 'train_step', step)


@pytest.mark.parametrize('optimizer', ['adamw', 'sgd'])
@pytest.mark.parametrize('value', BAD)
def test_bad_update_and_later_ones_do_not_reach_the_weights(tiny_config, optimizer, value):
    config = tiny_config(TRAIN__OPTIMIZER__NAME=optimizer)
    trainer = build_trainer(config, fill_(build_model(config)).train())
    state, loss_fn = trainer.state, trainer.loss_fn

    state.epoch = 2

    def step():
        update = trainer.train_step([batch()])
        trainer.step_schedule_and_ema(update)
        return update.skipped.item()

    assert not step()
    assert state.first_bad.tolist() == [-1, -1]
    rate = state.lr
    before = [p.detach().clone() for p in state.model.parameters()]
    moments = {name: value.clone() for s in state.optimizer.state.values() for name, value in s.items()}
    scale_loss(trainer, value)
    assert step()
    trainer.loss_fn = loss_fn
    assert step()  # good, but after a bad one
    assert all(torch.equal(a, b) for a, b in zip(before, state.model.parameters(), strict=True))
    after = {name: value for s in state.optimizer.state.values() for name, value in s.items()}
    assert all(torch.equal(moments[name], after[name]) for name in moments)
    with pytest.raises(
        FloatingPointError, match=rf'not finite at epoch 2, update 1, learning rate {rate:.3g}.*BASE_LR'
    ):
        check_first_bad(state.epoch, *state.first_bad.tolist())


def test_nonfinite_loss_counts_even_if_its_gradient_is_finite(tiny_config):
    config = tiny_config()
    trainer = build_trainer(config, fill_(build_model(config)).train())
    loss_fn = trainer.loss_fn
    trainer.loss_fn = lambda batch: loss_fn(batch) | {'bad': torch.tensor(math.inf)}
    update = trainer.train_step([batch()])
    assert update.grad_norm.isfinite()
    assert update.skipped.item()
    assert trainer.state.first_bad[0] == 0


class DeviceReads(TorchFunctionMode):
    """Counts how often the host reads tensors' values."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        reads = ('item', 'tolist', 'numpy', 'cpu', '__bool__', '__float__', '__int__', '__index__')
        self.count += getattr(function, '__name__', '') in reads
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(('options', 'reads'), [({}, 0), ({'TRAIN__NONFINITE': 'skip'}, 1)])
def test_host_reads_no_loss_or_norm_between_log_lines(tiny_config, options, reads):
    config = tiny_config(**options)
    trainer = build_trainer(config, fill_(build_model(config)).train())
    update = trainer.train_step([batch()])
    with DeviceReads() as device:
        for _ in range(3):
            update = trainer.train_step([batch()], update)
        assert device.count == 3 * reads


@pytest.mark.parametrize(('batch_norm', 'order'), [(False, 'gradients, flag'), (True, 'flag, gradients')])
def test_flag_of_an_update_is_read_when_the_next_gradients_are_on_their_way(
    tiny_config, image_tree, monkeypatch, batch_norm, order
):
    """But before the next batch where EMA has batch-norm statistics to average, which that batch changes."""
    events = []

    def note(owner, name, event):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: (events.append(event), function(*args))[1])

    note(TrainingState, 'add_update', 'update')
    note(HostCopy, 'tolist', 'flag')
    note(Precision, 'backward', 'gradients')
    options = {'TRAIN__NONFINITE': 'skip', 'TRAIN__EMA_DECAY': '0.5', 'PRINT_FREQ': '1000'}
    options |= {'TRAIN__EPOCHS': '1', 'TRAIN__WARMUP_EPOCHS': '0'}
    if batch_norm:
        options |= {'MODEL__TYPE': 'timm:test_resnet'}
    config = tiny_config(DATA__DATA_PATH=str(image_tree), **options)
    program.main(config)
    updates = ', '.join(events).split('update')
    assert updates[0] == 'gradients, '
    assert updates[1] == ', flag, gradients, '  # the first update is logged
    assert updates[2:-1] == [f', {order}, '] * (len(updates) - 3)
    assert updates[-1] == ', flag'
    assert len(updates) > 4


@pytest.mark.parametrize('optimizer', ['adamw', 'sgd'])
def test_run_stops_before_the_update_and_names_the_last_good_checkpoint(
    tiny_config, image_tree, monkeypatch, optimizer
):
    config = tiny_config(DATA__DATA_PATH=str(image_tree), PRINT_FREQ='1000', TRAIN__OPTIMIZER__NAME=optimizer)
    poison(monkeypatch, at=[8])
    with pytest.raises(FloatingPointError) as error:
        program.main(config)
    message = str(error.value)
    assert 'the loss or the gradient norm is not finite at epoch 1, update 2, learning rate 0.000' in message
    assert message.endswith(f'The last good checkpoint is {folder_of(config) / "ckpt_epoch_0.pth"}')
    assert [path.name for path in folder_of(config).glob('ckpt_epoch_*')] == ['ckpt_epoch_0.pth']
    saved = weights(config, 'ckpt_epoch_0.pth')
    assert all(value.isfinite().all() for value in saved.values())


def test_run_without_a_checkpoint_stops_with_that_message(tiny_config, image_tree, monkeypatch):
    poison(monkeypatch, at=[0])
    with pytest.raises(FloatingPointError, match='epoch 0, update 0, .*There is no checkpoint'):
        program.main(tiny_config(DATA__DATA_PATH=str(image_tree)))


def test_diverging_run_stops(tiny_config, image_tree):
    options = {'TRAIN__OPTIMIZER__NAME': 'sgd', 'TRAIN__CLIP_GRAD': '0', 'TRAIN__WARMUP_EPOCHS': '0'}
    config = tiny_config(DATA__DATA_PATH=str(image_tree), TRAIN__BASE_LR='1e30', PRINT_FREQ='1000', **options)
    with pytest.raises(FloatingPointError, match='not finite at epoch 0, update 1, learning rate .*BASE_LR'):
        program.main(config)
    assert not list(folder_of(config).glob('*.pth'))


def test_skipped_updates_advance_neither_schedule_nor_ema(tiny_config, image_tree, monkeypatch):
    options = {'DATA__DATA_PATH': str(image_tree), 'TRAIN__NONFINITE': 'skip', 'TRAIN__EMA_DECAY': '0.5'}
    updates = []
    advance, skip = TrainingState.advance, TrainingState.skip
    monkeypatch.setattr(TrainingState, 'advance', lambda state: (updates.append(True), advance(state)))
    monkeypatch.setattr(TrainingState, 'skip', lambda state: (updates.append(False), skip(state)))
    config = tiny_config(TAG='skip', **options)
    plain = tiny_config(TAG='plain', **options)
    with monkeypatch.context() as patch:
        poison(patch, at=[1, 2])
        program.main(config)
    assert updates == [True, False, False] + [True] * 9
    program.main(plain)
    rates, expected = ([record['lr'] for record in records(c, 'train')] for c in (config, plain))
    assert rates == [*expected[:2], *expected[1:2], expected[1], *expected[2:10]]
    assert last_checkpoint(config)['progress']['skipped'] == 2
    assert all(math.isfinite(record['train_loss']) for record in records(config, 'epoch'))
    assert log_of(config).count('update skipped at epoch 0, update') == 2


def test_rate_is_the_first_one_where_a_resumed_run_has_skipped_more_than_it_counts(tiny_config):
    config = tiny_config()
    state = build_trainer(config, build_model(config)).state
    first, state.skipped, state.step = state.lr, 5, 3
    state.advance()
    assert state.lr == first > 0


def test_skipping_has_a_limit(tiny_config, image_tree, monkeypatch):
    options = {'DATA__DATA_PATH': str(image_tree), 'TRAIN__NONFINITE': 'skip', 'TRAIN__NONFINITE_LIMIT': '2'}
    poison(monkeypatch, at=[0, 1, 3, 4, 6, 7, 8])
    with pytest.raises(FloatingPointError, match='3 updates in a row were skipped, up to epoch 1, update 2.*good'):
        program.main(tiny_config(**options))


def test_float16_overflow_is_no_error_but_a_bad_loss_is(tiny_config, image_tree, monkeypatch):
    options = {'DATA__DATA_PATH': str(image_tree), 'AMP_OPT_LEVEL': 'O1', 'AMP_DTYPE': 'float16'}
    config = tiny_config(**options)
    with monkeypatch.context() as patch:
        poison(patch, at=[2], value=1e5)  # finite, but its scaled gradient is not
        program.main(config)
    checkpoint = last_checkpoint(config)
    assert checkpoint['progress']['skipped'] == 1
    assert checkpoint['precision']['scale'] == 2**15
    rates = [record['lr'] for record in records(config, 'train')]
    assert rates[3] == rates[2]
    assert rates[4] > rates[3]
    poison(monkeypatch, at=[2])
    with pytest.raises(FloatingPointError, match='not finite at epoch 0, update 2'):
        program.main(tiny_config(TAG='other', **options))


def test_float16_that_only_overflows_stops(tiny_config, image_tree, monkeypatch):
    options = {'DATA__DATA_PATH': str(image_tree), 'AMP_OPT_LEVEL': 'O1', 'AMP_DTYPE': 'float16'}
    poison(monkeypatch, at=range(100), value=1e30)
    with pytest.raises(FloatingPointError, match='5 updates in a row were skipped'):
        program.main(tiny_config(TRAIN__NONFINITE_LIMIT='4', **options))


@pytest.mark.parametrize(
    ('stops', 'may_overflow', 'stopped'), [(True, False, True), (True, True, True), (False, False, False)]
)
def test_nonfinite_losses_of_other_ranks_count(stops, may_overflow, stopped):
    policy = NonFinitePolicy(stops, 20, may_overflow)
    norm = torch.tensor(1.0)
    assert not policy.stops_at(torch.tensor(0.0), norm)
    assert policy.stops_at(torch.tensor(3.0), norm) == stopped  # three other ranks
    assert policy.stops_at(torch.tensor(0.0), torch.tensor(math.inf)) == (stops and not may_overflow)
