import pytest
import torch
from torch import nn

from config import ConfigError
from precision import Precision, build_precision

CPU = torch.device('cpu')


def gradient_of(precision, clip=0.0, factor=1.0):
    """Gradient, its norm as told, the network after a step of size 64 on a linear loss, and what it computes in."""
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=64.0)
    seen = {}
    optimizer.register_step_pre_hook(lambda *_: seen.update(gradient=model.weight.grad.clone()))
    with precision.autocast():
        out = model(torch.tensor([[2.0, 4.0, 4.0]]) * factor)
    precision.backward(out.float().sum() / 64)  # small, as losses are: the scale starts at 65,536
    norm = precision.step(optimizer, model, clip)
    return seen.get('gradient'), norm, model, out.dtype


@pytest.mark.parametrize(
    ('level', 'dtype', 'computes'),
    [
        ('O0', torch.float16, torch.float32),
        ('O1', torch.float16, torch.float16),
        ('O1', torch.bfloat16, torch.bfloat16),
    ],
)
def test_levels(level, dtype, computes):
    gradient, norm, model, out_dtype = gradient_of(Precision(level, dtype, CPU))
    assert out_dtype == computes
    assert (64 * gradient).tolist() == [[2.0, 4.0, 4.0]]  # unscaled
    assert norm.item() == 6.0 / 64
    assert model.weight.tolist() == [[-1.0, -3.0, -3.0]]
    assert model.weight.grad is None


@pytest.mark.parametrize(
    ('clip', 'expected'), [(0.0, [2.0, 4.0, 4.0]), (3.0, [1.0, 2.0, 2.0]), (60.0, [2.0, 4.0, 4.0])]
)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_clipping_acts_on_unscaled_gradients_and_0_means_none(clip, expected, dtype):
    gradient, norm, _, _ = gradient_of(Precision('O1', dtype, CPU), clip / 64)
    torch.testing.assert_close(64 * gradient, torch.tensor([expected]), rtol=1e-4, atol=0)
    assert norm.item() == 6.0 / 64  # before clipping


@pytest.mark.parametrize('clip', [0.0, 3.0])
def test_float16_overflow_skips_the_step_and_lowers_the_scale(clip):
    precision = Precision('O1', torch.float16, CPU)
    before = precision.scaler.get_scale()
    gradient, norm, model, _ = gradient_of(precision, clip, factor=1e4)
    assert gradient is None
    assert not norm.isfinite()
    assert (model.weight == 1).all()
    assert precision.scaler.get_scale() == before / 2


def test_state_is_the_scale():
    one, two = (Precision('O1', torch.float16, CPU) for _ in range(2))
    gradient_of(one, factor=1e4)
    two.load_state_dict(one.state_dict())
    assert two.scaler.get_scale() == one.scaler.get_scale()
    none = Precision('O0', torch.float16, CPU)
    assert none.state_dict() == {}
    two.load_state_dict(none.state_dict())  # of a checkpoint without a scaler
    assert two.scaler.get_scale() == one.scaler.get_scale()


def test_default_is_fp32_on_a_cpu_and_published_o1_on_a_gpu(tiny_config):
    assert str(build_precision(tiny_config(), CPU)) == 'float32'
    assert str(build_precision(tiny_config(AMP_OPT_LEVEL='O1'), CPU)) == 'float16 autocast'
    assert str(build_precision(tiny_config(AMP_OPT_LEVEL='O1', AMP_DTYPE='bfloat16'), CPU)) == 'bfloat16 autocast'
    assert str(build_precision(tiny_config(AMP_OPT_LEVEL='O0'), torch.device('cuda'))) == 'float32'
    assert str(build_precision(tiny_config(), torch.device('cuda'))) == 'float16 autocast'


def test_other_levels_are_refused():
    with pytest.raises(ConfigError, match='write O0 or O1'):
        Precision('O2', torch.float16, CPU)
