"""`torch.compile` of the whole network as one graph: minutes of compilation, so slow."""

import copy

import pytest
import torch
import torch.nn.functional as F

from models import MSGTransformer
from tests.fill import fill_, images, labels
from tests.test_msg_transformer import V2, micro

pytestmark = pytest.mark.slow


@torch.no_grad()
def test_tiny_inference():
    model = fill_(MSGTransformer()).eval()
    x = images(2, 224)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('types', [{}, V2], ids=['v1', 'v2'])
def test_training_forward_and_backward(types):
    plain = fill_(micro(**types)).train()
    compiled = copy.deepcopy(plain)
    graph = torch.compile(compiled, fullgraph=True)
    for model in (plain, graph):
        F.cross_entropy(model(images(2, 56)), labels(2, 10)).backward()
    for (name, one), two in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-5, msg=name)
