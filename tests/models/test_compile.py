"""The network under `torch.compile`: minutes of compilation, so slow.

Inductor's C++ takes most of the time, and grows with the number of blocks. So it compiles narrow, shallow networks,
while the networks of full size are traced, and run without C++.
"""

import copy

import pytest
import torch
import torch.nn.functional as F

from models.exchange import EXCHANGES
from tests.helpers.golden import GOLDEN, VERSIONS, assert_close, fill_, golden_network, images, labels, micro, normal
from tests.helpers.runs import CPU
from tools.benchmark.cases import Setting
from tools.benchmark.classifiers import ClassifierCase

pytestmark = pytest.mark.slow

TWO_STAGES = {'depths': (1, 1), 'num_heads': (1, 2), 'shuffle_size': (2, 1)}


@pytest.fixture(autouse=True)
def reset():
    """PyTorch compiles at most eight variants of a function."""
    torch.compiler.reset()


def assert_recorded_logits(logits, record):
    assert_close(logits[:, :10], record['logits'])
    assert_close([logits.mean(), logits.std()], [record['logits_mean'], record['logits_std']])


# Base has the most blocks: one graph holds them all. Micro has every kind of layer.
@pytest.mark.parametrize(('size', 'backend'), [('base', 'eager'), ('micro', 'inductor')])
@pytest.mark.parametrize('version', VERSIONS)
@torch.inference_mode()
def test_recorded_outputs(version, size, backend):
    record = GOLDEN[version, size]
    model = torch.compile(golden_network(version, size).eval(), fullgraph=True, backend=backend)
    assert_recorded_logits(model(images(2, record['size'])), record)


@pytest.mark.parametrize('version', VERSIONS)
def test_recorded_outputs_loss_and_gradient_norms(version):
    """Through the compiler's forward and backward graphs of the full size, each operator run by PyTorch."""
    record = GOLDEN[version, 'tiny']
    model = golden_network(version, 'tiny').train()
    graph = torch.compile(model, fullgraph=True, backend='aot_eager')
    logits = graph(images(2, record['size']))
    loss = F.cross_entropy(logits, labels(2, model.num_classes))
    loss.backward()
    assert_recorded_logits(logits.detach(), record)
    assert_close(loss.item(), record['loss'])
    for name, p in model.named_parameters():
        assert p.grad.norm().item() == pytest.approx(record['grad_norm'][name], rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize('types', VERSIONS.values(), ids=VERSIONS)
def test_gradients_equal_eager_ones(types):
    plain = fill_(micro(**TWO_STAGES, **types)).train()
    compiled = copy.deepcopy(plain)
    graph = torch.compile(compiled, fullgraph=True)
    for model in (plain, graph):
        F.cross_entropy(model(images(2, 56)), labels(2, 10)).backward()
    for (name, one), two in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-5, msg=name)


@torch.inference_mode()
def test_outputs_of_all_exchanges_equal_eager_ones():
    for name in EXCHANGES.keys() - {'shuf', 'none'}:  # which the networks have
        torch.compiler.reset()
        exchange, msg = fill_(EXCHANGES[name](16, 2)), normal('msg', (2, 3, 5, 16))
        torch.testing.assert_close(torch.compile(exchange, fullgraph=True)(msg), exchange(msg), msg=name)


def test_freezing_gives_the_same_logits():
    case = ClassifierCase(fill_(micro(**TWO_STAGES)), Setting(compile_mode='freezing', batch=2, size=56), CPU)
    case.warm_up()
    with torch.inference_mode():
        torch.testing.assert_close(case(), case.network(case.images), rtol=1e-4, atol=1e-4)
