"""Linear layers by oneDNN are PyTorch's own, in every way that they are used."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from models import MSGTransformer, linear
from models.linear import OneDNNLinear, apply_linear, choose_library, register_flop_formulas

pytestmark = pytest.mark.skipif(not linear.HAS_OPERATOR, reason='PyTorch was built without oneDNN')


class Network(nn.Module):
    """Two layers, by `apply_linear` or called."""

    def __init__(self, apply=apply_linear):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.apply_linear = nn.Linear(12, 20), nn.Linear(20, 5, bias=False), apply

    def forward(self, x):
        return self.apply_linear(self.second, F.gelu(self.apply_linear(self.first, x)))


def call(layer, x):
    return layer(x)


@pytest.fixture(autouse=True)
def onednn(monkeypatch):
    """Linear layers by oneDNN, whatever the processor and the size."""
    monkeypatch.setattr(linear, 'LIBRARY', 'onednn')
    monkeypatch.setattr(linear, 'MIN_MULTIPLY_ADDS', 1)


@pytest.fixture
def networks():
    return Network(), Network(call)


def operators(function):
    with torch.profiler.profile(acc_events=True) as profile:
        function()
    return {event.key for event in profile.key_averages()}


def uses_onednn(function):
    return 'mkldnn::_linear_pointwise' in operators(function)


X = torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(1))


def results(network, x=X):
    """Output and gradients."""
    x = x.clone().requires_grad_()
    y = network(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *network.parameters()])]


def test_outputs_and_gradients_are_those_of_pytorch(networks):
    ours, theirs = networks
    for x in (X, X[:, ::2], X.transpose(0, 1), X[0]):
        assert uses_onednn(lambda x=x: ours(x))
        torch.testing.assert_close(results(ours, x), results(theirs, x), rtol=1e-5, atol=1e-5)
    assert {'aten::mkldnn_linear_backward_weights'} <= operators(lambda: results(ours))
    assert not uses_onednn(lambda: results(theirs))


def test_a_network_equals_itself_with_the_other_library(monkeypatch):
    torch.manual_seed(0)
    shape = {'embed_dim': 32, 'depths': [2, 2], 'num_heads': [2, 4], 'shuffle_size': [2, 1]}
    network = MSGTransformer(img_size=56, num_classes=10, drop_path_rate=0.0, **shape).train()
    images = torch.randn(2, 3, 56, 56)
    ours = results(network, images)
    monkeypatch.setattr(linear, 'LIBRARY', 'pytorch')
    for one, other in zip(ours, results(network, images), strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm() + 1e-8
    assert not uses_onednn(lambda: network(images))


def test_compiled_networks_are_left_to_pytorch(networks):
    ours, theirs = networks
    targets = []

    def backend(graph, example):
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == 'call_function')
        return graph.forward

    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    assert torch.equal(compiled(X), theirs(X))
    assert sum('linear' in target for target in targets) == 2
    assert not any('mkldnn' in target for target in targets)
    recomputed = torch.compile(lambda x: checkpoint(ours, x, use_reentrant=False), backend=backend, fullgraph=True)
    assert torch.equal(recomputed(X), theirs(X))
    strict = torch.export.export(ours, (X,), strict=True)
    assert not any('mkldnn' in str(node.target) for node in strict.graph.nodes)


def test_other_tensors_are_left_to_pytorch():
    x, weight = torch.randn(6, 12), torch.randn(20, 12)
    for bias in (torch.randn(20, 3)[:, 1], torch.zeros(1).expand(20), torch.tensor(2.0), torch.ones(1)):
        with OneDNNLinear():
            y = F.linear(x, weight, bias)
        torch.testing.assert_close(y, x @ weight.t() + bias, rtol=1e-4, atol=1e-4)
    with OneDNNLinear(), pytest.raises(RuntimeError, match='shapes cannot be multiplied'):
        F.linear(x, weight[:, :5])


def test_outputs_can_be_changed_in_place(networks):
    def changed(network):
        x = X.clone().requires_grad_()
        y = network(x)
        y += 1
        y[:, 0] = 0
        return torch.autograd.grad(y.relu_().sum(), [x, *network.parameters()])

    torch.testing.assert_close(*map(changed, networks), rtol=1e-5, atol=1e-5)


def test_batched_gradients(networks):
    def jacobian(network):
        return torch.autograd.functional.jacobian(network, X[:1], vectorize=True)

    def of_weights(network):
        y = network(X)
        return torch.autograd.grad(y, [*network.parameters()], torch.stack([y, y + 1]).detach(), is_grads_batched=True)

    torch.testing.assert_close(*map(jacobian, networks), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*map(of_weights, networks), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('precision', [torch.bfloat16, torch.float64])
def test_other_precisions_are_left_to_pytorch(networks, precision):
    ours, theirs = (network.to(precision) for network in networks)
    assert torch.equal(ours(X.to(precision)), theirs(X.to(precision)))
    assert not uses_onednn(lambda: ours(X.to(precision)))


def test_autocast_is_left_to_pytorch(networks):
    ours, theirs = networks
    with torch.autocast('cpu', torch.bfloat16):
        assert ours(X).dtype is torch.bfloat16
        assert torch.equal(ours(X), theirs(X))


def test_an_export_has_pytorchs_operators(networks):
    ours, _ = networks
    program = torch.export.export(ours, (X,))
    assert [str(n.target) for n in program.graph.nodes if n.op == 'call_function'].count('aten.linear.default') == 2
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # TorchScript is deprecated
        assert 'aten::linear' in str(torch.jit.trace(ours, X).inlined_graph)


def test_empty_batches_and_meta_tensors(networks):
    ours, _ = networks
    assert ours(X[:0]).shape == (0, 4, 5)
    assert ours.to('meta')(X.to('meta')).shape == (3, 4, 5)


@pytest.mark.parametrize(
    'transform',
    [
        lambda f, p: grad(lambda p: f(p, X).square().sum())(p),
        lambda f, p: vmap(grad(lambda p, x: f(p, x).square().sum()), (None, 0))(p, X),
        lambda f, p: jvp(lambda p, x: f(p, x), (p, X), ({k: torch.ones_like(v) for k, v in p.items()}, X)),
        lambda f, p: hessian(lambda x: f(p, x).square().sum())(X[:1, :2]),
        lambda f, p: hessian(lambda b: f({**p, 'first.bias': b}, X).square().sum())(p['first.bias']),
    ],
    ids=['grad', 'vmap', 'jvp', 'hessian', 'hessian of a weight'],
)
def test_transforms_of_torch_func(networks, transform):
    p = {name: value.detach() for name, value in networks[0].named_parameters()}
    ours, theirs = (transform(lambda p, x, n=n: functional_call(n, p, (x,)), p) for n in networks)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_second_derivatives(networks):
    def of_gradient(network):
        x = X.clone().requires_grad_()
        gradients = torch.autograd.grad(network(x).square().sum(), [x, *network.parameters()], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), [x, *network.parameters()])

    torch.testing.assert_close(*map(of_gradient, networks), rtol=1e-4, atol=1e-4)


def test_hooks_pickling_and_quantization(networks):
    ours, _ = networks
    seen = []
    handle = ours.first.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    ours(X)
    handle.remove()
    assert seen == [(3, 4, 20)]
    assert torch.equal(pickle.loads(pickle.dumps(ours))(X), ours(X))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # moves to torchao
        quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(ours), {nn.Linear})
    assert type(quantized.first) is not nn.Linear
    assert (quantized(X) - ours(X)).norm() < 0.1 * ours(X).norm()


def test_flops_are_counted(networks):
    register_flop_formulas()
    counts = []
    for network in networks:
        x = X.clone().requires_grad_()
        with FlopCounterMode(display=False) as counter:
            network(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 3 * 2 * 12 * (12 * 20 + 20 * 5)


def test_small_layers_are_left_to_pytorch(networks, monkeypatch):
    monkeypatch.setattr(linear, 'MIN_MULTIPLY_ADDS', 3 * 4 * 12 * 20 + 1)
    assert not uses_onednn(lambda: networks[0](X))


def test_only_linear_is_replaced_in_a_context():
    layer = nn.Linear(12, 5)
    with OneDNNLinear():
        assert uses_onednn(lambda: layer(X))
        assert torch.equal(F.relu(X), X.clamp(min=0))
    assert not uses_onednn(lambda: layer(X))


AMD, INTEL = 'AMD EPYC 9554', 'Intel(R) Xeon(R) Platinum 8488C'


@pytest.mark.parametrize(
    ('choice', 'name', 'avx512', 'mkl_assumes_intel', 'library'),
    [
        ('', AMD, True, False, 'onednn'),
        ('auto', AMD, True, False, 'onednn'),
        ('auto', AMD, False, False, 'pytorch'),
        ('auto', AMD, True, True, 'pytorch'),
        ('auto', INTEL, True, False, 'pytorch'),
        ('pytorch', AMD, True, False, 'pytorch'),
        ('onednn', INTEL, False, False, 'onednn'),
    ],
)
def test_choice_by_processor(monkeypatch, choice, name, avx512, mkl_assumes_intel, library):
    capabilities = {'cpu_name': name, 'avx512_f': avx512}
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: capabilities, raising=False)
    monkeypatch.setattr(linear, '_mkl_assumes_intel', lambda: mkl_assumes_intel)
    assert choose_library(choice) == library
    monkeypatch.setattr(linear, 'HAS_OPERATOR', False)
    assert choose_library(choice) == 'pytorch'


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match='MSG_CPU_LINEAR is .mkl.: write one of auto, pytorch, onednn'):
        choose_library('mkl')
