"""Networks that are built on the meta device and get their weights afterwards, as large models are loaded."""

import pytest
import torch

from detection.models import build_detector
from models import MSGTransformer
from tests.helpers.detectors import tiny_detector
from tests.helpers.golden import VERSIONS, fill_, micro, normal

NETWORKS = {
    **{version: lambda types=types: micro(**types) for version, types in VERSIONS.items()},
    'no MSG tokens': lambda: micro(use_msg_tokens=False),
    'position embedding': lambda: micro(ape=True),
    'exchanges': lambda: micro(manip_type=['mix', 'global', 'attention']),
    'detector': lambda: build_detector(tiny_detector()),
}


def empty_then_copied(build, path):
    with torch.device('meta'):
        model = build()
    model.to_empty(device='cpu')
    model.load_state_dict(torch.load(path))
    return model


def assigned(build, path):
    with torch.device('meta'):
        model = build()
    model.load_state_dict(torch.load(path, mmap=True), assign=True)
    return model


def moved_to_meta_and_back(build, path):
    model = build()
    model.load_state_dict(torch.load(path, map_location='meta'), assign=True)
    model.to_empty(device='cpu')
    model.load_state_dict(torch.load(path))
    return model


def loaded_like_transformers(build, path):
    """Each entry replaces its meta tensor; buffers that no checkpoint has become uninitialised memory."""
    model = assigned(build, path)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.empty_like(buffer, device='cpu'))
    return model


@torch.no_grad()
@pytest.mark.parametrize('load', [empty_then_copied, assigned, moved_to_meta_and_back, loaded_like_transformers])
@pytest.mark.parametrize('build', NETWORKS.values(), ids=NETWORKS)
def test_outputs_have_the_same_bits(build, load, tmp_path):
    model = build().eval()
    if isinstance(model, MSGTransformer):
        fill_(model)
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    loaded = load(build, tmp_path / 'weights.pth').eval()
    assert not [name for name, x in (*loaded.named_parameters(), *loaded.named_buffers()) if x.is_meta]
    if isinstance(model, MSGTransformer):
        images = normal('images', (1, 3, 33, 57))
        assert torch.equal(loaded(images), model(images))
        return
    images = [normal('image', (3, 64, 96)).sigmoid()]
    [found], [expected] = loaded(images), model(images)
    assert len(expected['boxes'])
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize('build', NETWORKS.values(), ids=NETWORKS)
def test_every_buffer_is_in_the_state_dict(build):
    with torch.device('meta'):
        model = build()
    assert {name for name, _ in model.named_buffers()} <= model.state_dict().keys()
