"""A pytest plugin for timm's own `tests/test_models.py`: it sees our networks alone, in every one of its lists.

`make test-timm` downloads timm's source archive and runs it.
"""

import pytest
import timm
import torch

import models  # noqa: F401 (registers the names)

TORCHSCRIPT = (
    'the network is not written for TorchScript, which PyTorch has deprecated: use torch.compile or torch.export'
)
EXCEPTIONS = {
    'test_model_forward_torchscript': TORCHSCRIPT,
    'test_model_forward_fx_torchscript': TORCHSCRIPT,
    'test_prune_intermediate_layers_contract': 'forward_features returns MSG tokens, and no feature map, of a pruned '
    'network too; tests/models/test_timm_methods.py tests the rest of the contract',
}
# The last block's MSG tokens alone are another matmul than every token, so the results differ by rounding.
LOOSER = {'test_model_forward_intermediates': {'rtol': 1e-4, 'atol': 1e-5}}

list_models = timm.list_models
assert_close = torch.testing.assert_close


def list_ours(filter='', module='', **options):
    """`timm.list_models` of our names; a list of timm's modules, as of those with feature maps, includes ours."""
    return [name for name in list_models(filter, **options) if name.startswith('msg_transformer')]


timm.list_models = list_ours


def pytest_collection_modifyitems(items, config):
    """Leave out tests of timm's other networks; expect the exceptions to fail."""
    ours = [item for item in items if 'msg_transformer' in item.name]
    config.hook.pytest_deselected(items=[item for item in items if item not in ours])
    items[:] = ours
    for item in ours:
        if item.originalname in EXCEPTIONS:
            item.add_marker(pytest.mark.xfail(reason=EXCEPTIONS[item.originalname], strict=True))


@pytest.fixture(autouse=True)
def tolerances(request, monkeypatch):
    """The tolerances of `LOOSER`."""
    looser = LOOSER.get(request.node.originalname)
    if looser:
        monkeypatch.setattr(torch.testing, 'assert_close', lambda a, b, **_: assert_close(a, b, **looser))
