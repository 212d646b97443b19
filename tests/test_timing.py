import pytest
import torch
from torch import nn

import timing
from timing import Product, Setting, Spread, Task, in_turns, multiply_adds, unavailable

CPU, GPU = torch.device('cpu'), torch.device('cuda')


def network():
    return nn.Sequential(nn.Conv2d(3, 8, 4, stride=4, bias=False), nn.Flatten(), nn.Linear(8 * 4, 5, bias=False))


def test_spread_is_median_and_quartiles():
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == (3.0, 2.0, 4.0)


def test_tasks_take_turns_and_short_ones_repeat(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(timing.time, 'perf_counter', lambda: clock[0])

    def task(name, seconds):
        def run():
            calls.append(name)
            clock[0] += seconds

        return run

    times = in_turns({'a': task('a', 0.25), 'b': task('b', 1.0), 'c': task('c', 2.0)}, 3, CPU, least=0.5)
    assert times == {'a': [0.25] * 3, 'b': [1.0] * 3, 'c': [2.0] * 3}
    assert ''.join(calls) == 'abc' + 'aabc' + 'bcaa' + 'caab'


def test_inference_leaves_the_network_as_it_is():
    task = Task(network(), Setting(batch=2, size=8), CPU)
    task.warm_up()
    assert task().shape == (2, 5)
    assert not task.network.training
    assert torch.equal(task(), task.network(task.images))


def test_a_train_step_is_forward_loss_backward_clipping_and_adamw():
    torch.manual_seed(0)
    task = Task(network(), Setting('train', batch=2, size=8), CPU)
    weights = [p.detach().clone().requires_grad_() for p in task.network.parameters()]
    expected = network()
    for p, w in zip(expected.parameters(), weights, strict=True):
        p.data = w.data
    optimizer = torch.optim.AdamW(expected.parameters(), lr=1e-4, weight_decay=0.05)
    loss = nn.functional.cross_entropy(expected(task.images), task.targets)
    loss.backward()
    nn.utils.clip_grad_norm_(expected.parameters(), 5.0)
    optimizer.step()
    torch.testing.assert_close(task(), loss.detach())
    for one, two in zip(task.network.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, two)
    assert task.network.training


def test_precision_is_the_settings():
    task = Task(network(), Setting(precision='bf16', batch=2, size=8), CPU)
    assert task().dtype is torch.bfloat16
    task = Task(network(), Setting(precision='tf32', batch=2, size=8), CPU)
    task()


@pytest.mark.parametrize('precision', ['fp32', 'tf32'])
def test_tf32_is_for_the_backward_pass_too(precision):
    def flags():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    task, seen, before = Task(network(), Setting('train', precision, batch=2, size=8), CPU), [], flags()
    weight = next(task.network.parameters())
    task.network.register_forward_hook(lambda *_: seen.append(flags()))
    weight.register_hook(lambda _: seen.append(flags()))
    task()
    assert seen == [(precision == 'tf32',) * 2] * 2
    assert flags() == before


def test_multiply_adds_are_counted_over_the_operators():
    forward = 2 * 4 * 8 * 3 * 16 + 2 * 32 * 5  # pixels * channels * kernel, and the linear, for two images
    assert Task(network(), Setting(batch=2, size=8), CPU).multiply_adds() == forward
    weights_and_inputs = forward + forward + 2 * 32 * 5  # the convolution's images want no gradient
    assert Task(network(), Setting('train', batch=2, size=8), CPU).multiply_adds() == weights_and_inputs


@pytest.mark.parametrize('groups', [1, 4])
def test_multiply_adds_of_the_gradients_of_convolutions_in_groups(groups):
    convolution, x = nn.Conv2d(8, 8, 3, padding=1, groups=groups), torch.randn(2, 8, 5, 5, requires_grad=True)
    forward = 2 * 25 * 8 * (8 // groups) * 9
    assert multiply_adds(lambda: convolution(x)) == forward
    assert multiply_adds(lambda: convolution(x).sum().backward()) == 3 * forward


@pytest.mark.parametrize(('wanted', 'side'), [(3 * 1024**3, 1024), (30**3, 30), (1, 1)])
def test_a_product_is_as_square_as_its_size_allows(wanted, side):
    product = Product('fp32', CPU, wanted)
    assert product.multiply_adds == product.left.numel() * product.right.shape[1] == wanted
    assert product.right.shape == (side, side)


def test_peak_memory_is_what_is_held_and_what_a_run_allocates():
    class Greedy(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1, bias=False)

        def forward(self, x):
            large = torch.ones(1000, 1000)  # 4 MB, gone before the next 2 MB
            small = large.sum()
            del large
            return torch.ones(500, 1000)[:2, :2] * small

    task = Task(Greedy(), Setting(batch=2, size=8), CPU)
    task()
    held = 4 * 6 + 4 * 2 * 3 * 64 + 8 * 2
    assert task.held() == held
    assert 4e6 <= task.peak_memory() - held < 4.1e6

    task = Task(network(), Setting('train', batch=2, size=8), CPU)
    task()
    parameters = 8 * 48 + 32 * 5
    assert task.held() == 4 * (3 * parameters + 2) + 4 * 2 * 3 * 64 + 8 * 2  # weights, moments, two step counts


def test_what_a_device_cannot_run_is_said(monkeypatch):
    assert unavailable(Setting('train', compile='frozen'), CPU) == 'frozen weights do not train'
    assert unavailable(Setting(), CPU) == unavailable(Setting(precision='fp16'), torch.device('mps')) == ''
    assert 'for GPUs' in unavailable(Setting(precision='tf32'), CPU)
    assert 'for GPUs' in unavailable(Setting(compile='graphs'), CPU)
    for has in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda has=has: has)
        assert unavailable(Setting(precision='bf16'), CPU) == ('' if has else 'this processor has no bf16 instructions')
    for capability, told in (((7, 0), 'this GPU has no bf16'), ((9, 0), '')):
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device, c=capability: c)
        assert unavailable(Setting(precision='bf16', compile='graphs'), GPU) == told


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_a_product_multiplies(precision):
    product = Product(precision, CPU, 2 * 1024**2)
    torch.testing.assert_close(product(), product.left @ product.right)
