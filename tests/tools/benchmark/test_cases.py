import pytest
import torch
from torch import nn

from engine.config_tree import ConfigError
from tests.helpers.paths import TINY
from tests.helpers.runs import CPU
from tools.benchmark.cases import LEARNING_RATE, Setting, unavailable
from tools.benchmark.classifiers import ClassifierCase, build_network
from tools.flops import count_multiply_adds

GPU = torch.device('cuda')


def test_networks_come_from_a_config_timm_and_torchvision():
    assert build_network(str(TINY), 56).img_size == (56, 56)
    assert build_network('timm:test_vit', 32).patch_embed.img_size == (32, 32)
    assert type(build_network('test_resnet', 64)).__module__ == 'timm.models.resnet'  # has no image size
    assert type(build_network('resnet18', 64)).__module__ == 'timm.models.resnet'  # timm has priority
    assert type(build_network('torchvision:resnet18', 64)).__module__ == 'torchvision.models.resnet'
    for name in ('swin_giant', 'torchvision:test_vit'):
        with pytest.raises(ConfigError, match=f'no network .{name}.: give a config file, or a name'):
            build_network(name, 224)


def network():
    return nn.Sequential(nn.Conv2d(3, 8, 4, stride=4, bias=False), nn.Flatten(), nn.Linear(8 * 4, 5, bias=False))


def test_inference_leaves_the_network_unchanged():
    case = ClassifierCase(network(), Setting(batch=2, size=8), CPU)
    case.warm_up()
    assert case().shape == (2, 5)
    assert not case.network.training
    assert torch.equal(case(), case.network(case.images))


def test_train_step_is_forward_loss_backward_clipping_and_adamw():
    torch.manual_seed(0)
    case = ClassifierCase(network(), Setting('train', batch=2, size=8), CPU)
    weights = [p.detach().clone() for p in case.network.parameters()]
    expected = network()
    for p, w in zip(expected.parameters(), weights, strict=True):
        p.data = w.clone()
    optimizer = torch.optim.AdamW(expected.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    loss = nn.functional.cross_entropy(expected(case.images), case.targets)
    loss.backward()
    nn.utils.clip_grad_norm_(expected.parameters(), 5.0)
    optimizer.step()
    torch.testing.assert_close(case(), loss.detach())
    for one, two, start in zip(case.network.parameters(), expected.parameters(), weights, strict=True):
        torch.testing.assert_close(one - start, two - start)
        assert not torch.equal(one, start)
        assert one.grad is None
    assert case.network.training


def test_precision():
    case = ClassifierCase(network(), Setting(precision='bf16', batch=2, size=8), CPU)
    assert case().dtype is torch.bfloat16
    case = ClassifierCase(network(), Setting(precision='tf32', batch=2, size=8), CPU)
    case()
    exact, case = (
        ClassifierCase(network(), Setting(precision=p, batch=2, size=8), CPU) for p in ('bf16', 'bf16-weights')
    )
    assert case().dtype is torch.bfloat16
    parameters = 8 * 48 + 32 * 5
    assert case.resident_bytes() == exact.resident_bytes() - 2 * (parameters + 2 * 3 * 64)
    assert case.multiply_adds() == exact.multiply_adds()


@pytest.mark.parametrize('precision', ['fp32', 'tf32'])
def test_tf32_applies_to_the_backward_pass(precision):
    def flags():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    case, seen, before = ClassifierCase(network(), Setting('train', precision, batch=2, size=8), CPU), [], flags()
    weight = next(case.network.parameters())
    case.network.register_forward_hook(lambda *_: seen.append(flags()))
    weight.register_hook(lambda _: seen.append(flags()))
    case()
    assert seen == [(precision == 'tf32',) * 2] * 2
    assert flags() == before


def test_multiply_adds_of_real_operators():
    forward = 2 * 4 * 8 * 3 * 16 + 2 * 32 * 5  # pixels * channels * kernel, and the linear, for two images
    assert ClassifierCase(network(), Setting(batch=2, size=8), CPU).multiply_adds() == forward
    weights_and_inputs = forward + forward + 2 * 32 * 5  # the images need no gradient
    assert ClassifierCase(network(), Setting('train', batch=2, size=8), CPU).multiply_adds() == weights_and_inputs


@pytest.mark.parametrize('groups', [1, 4])
def test_multiply_adds_of_gradients_of_grouped_convolutions(groups):
    convolution, x = nn.Conv2d(8, 8, 3, padding=1, groups=groups), torch.randn(2, 8, 5, 5, requires_grad=True)
    forward = 2 * 25 * 8 * (8 // groups) * 9
    assert count_multiply_adds(lambda: convolution(x)) == forward
    assert count_multiply_adds(lambda: convolution(x).sum().backward()) == 3 * forward


def test_peak_memory_is_resident_and_allocated_memory():
    class Greedy(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1, bias=False)

        def forward(self, x):
            large = torch.ones(1000, 1000)  # 4 MB, gone before the next 2 MB
            small = large.sum()
            del large
            return torch.ones(500, 1000)[:2, :2] * small

    case = ClassifierCase(Greedy(), Setting(batch=2, size=8), CPU)
    case()
    resident = 4 * 6 + 4 * 2 * 3 * 64 + 8 * 2
    assert case.resident_bytes() == resident
    assert 4e6 <= case.peak_memory() - resident < 4.1e6

    case = ClassifierCase(network(), Setting('train', batch=2, size=8), CPU)
    case()
    parameters = 8 * 48 + 32 * 5
    assert case.resident_bytes() == 4 * (3 * parameters + 2) + 4 * 2 * 3 * 64 + 8 * 2


def test_unavailable_settings(monkeypatch):
    assert unavailable(Setting('train', compile_mode='freezing'), CPU) == 'fp32, freezing: for inference'
    assert unavailable(Setting('train', 'bf16-weights'), GPU) == 'bf16-weights, eager: for inference'
    assert unavailable(Setting(), CPU) == unavailable(Setting(precision='fp16'), torch.device('mps')) == ''
    assert 'for NVIDIA GPUs' in unavailable(Setting(precision='tf32'), CPU)
    assert 'for NVIDIA GPUs' in unavailable(Setting(compile_mode='graphs'), CPU)
    for unit in ('avx512_bf16', 'amx_bf16', 'avx2'):
        monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda unit=unit: {unit: True})
        reason = 'this processor has no bf16 instructions' if unit == 'avx2' else ''
        assert unavailable(Setting(precision='bf16'), CPU) == reason
        assert unavailable(Setting(precision='bf16-weights'), CPU) == reason
        assert unavailable(Setting(precision='fp16'), CPU) == 'this processor has no fp16 instructions'
    for capability, reason in (((7, 0), 'this GPU has no bf16'), ((9, 0), '')):
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device, c=capability: c)
        assert unavailable(Setting(precision='bf16', compile_mode='graphs'), GPU) == reason
