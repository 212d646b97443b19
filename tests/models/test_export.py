"""Networks through PyTorch's own exporter, without `tools.export`."""

import onnxruntime
import pytest
import torch

from models import MSGTransformer
from tests.helpers.golden import VERSIONS, fill_, micro, normal

DROP_RATES = {'drop_rate': 0.1, 'attn_drop_rate': 0.1, 'drop_path_rate': 0.2}


def test_no_operator_of_the_evaluated_network_is_random():
    model = micro(**DROP_RATES).eval()
    graph = torch.export.export(model, (torch.randn(1, 3, 56, 56),)).graph
    calls = [node for node in graph.nodes if node.op == 'call_function']
    assert not [node for node in calls if node.target == torch.ops.aten.dropout.default and node.args[2]]
    assert not [node for node in calls if 'bernoulli' in node.name or 'rand' in node.name]


@pytest.mark.slow
@pytest.mark.parametrize('types', VERSIONS.values(), ids=VERSIONS)
def test_onnx_with_dynamic_sizes_equals_eager(types, tmp_path):
    model = MSGTransformer(
        img_size=None,
        patch_size=2,
        num_classes=3,
        embed_dim=8,
        depths=(1, 1),
        num_heads=(1, 2),
        window_size=3,
        shuffle_size=(2, 1),
        **types,
    )
    fill_(model).eval()
    axes = {0: 'batch', 2: 'height', 3: 'width'}
    program = torch.onnx.export(model, (torch.randn(2, 3, 24, 36),), dynamic_shapes=(axes,), dynamo=True, verbose=False)
    program.save(tmp_path / 'a.onnx')
    session = onnxruntime.InferenceSession(tmp_path / 'a.onnx')
    for batch in (1, 3):
        for size in ((24, 36), (2, 2), (9, 31), (33, 57)):
            images = normal('images', (batch, 3, *size))
            [logits] = session.run(None, {session.get_inputs()[0].name: images.numpy()})
            torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=0, atol=1e-5)
