"""Networks through PyTorch's own exporter, without `tools.export`."""

import onnxruntime
import pytest
import torch

from models import MSGTransformer
from tests.helpers.documents import code_blocks
from tests.helpers.golden import V2, fill_, micro, normal
from tests.helpers.paths import ROOT

DROP_RATES = {'drop_rate': 0.1, 'attn_drop_rate': 0.1, 'drop_path_rate': 0.2}


def test_no_operator_of_the_evaluated_network_is_random():
    model = micro(**DROP_RATES).eval()
    graph = torch.export.export(model, (torch.randn(1, 3, 56, 56),)).graph
    calls = [node for node in graph.nodes if node.op == 'call_function']
    assert not [node for node in calls if node.target == torch.ops.aten.dropout.default and node.args[2]]
    assert not [node for node in calls if 'bernoulli' in node.name or 'rand' in node.name]


def assert_equals_eager(path, model, sizes):
    """Assert that an ONNX file gives the network's logits for these image sizes, in batches of 1 and 3."""
    session = onnxruntime.InferenceSession(path)
    for batch in (1, 3):
        for size in sizes:
            images = normal('images', (batch, 3, *size))
            [logits] = session.run(None, {session.get_inputs()[0].name: images.numpy()})
            torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=0, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_documented_code_exports_the_stored_network_for_any_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the code writes its file
    names = {}
    for code in code_blocks((ROOT / 'docs' / 'export.md').read_text(), 'python'):
        exec(code, names)
    assert_equals_eager('nano.onnx', names['model'], ((112, 112), (4, 4), (33, 57), (97, 130)))


@pytest.mark.slow
@torch.no_grad()
def test_onnx_of_version_2_with_dynamic_sizes_equals_eager(tmp_path):
    options = {'patch_size': 2, 'embed_dim': 8, 'depths': (1, 1), 'num_heads': (1, 2), 'shuffle_size': (2, 1)}
    model = fill_(MSGTransformer(img_size=None, num_classes=3, window_size=3, **options, **V2)).eval()
    axes = {0: 'batch', 2: 'height', 3: 'width'}
    program = torch.onnx.export(model, (torch.randn(2, 3, 24, 36),), dynamic_shapes=(axes,), dynamo=True, verbose=False)
    program.save(tmp_path / 'a.onnx')
    assert_equals_eager(tmp_path / 'a.onnx', model, ((24, 36), (2, 2), (9, 31), (33, 57)))
