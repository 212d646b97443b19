"""The network as it is rewritten for inference runtimes, run eagerly."""

import copy

import pytest
import torch

from detection.models import build_detector
from models import MSGTransformer
from tests.helpers.detectors import tiny_detector
from tests.helpers.golden import VERSIONS, fill_
from tools.export.rewrite import rewrite_for_runtimes

VARIANTS = {
    **VERSIONS,
    'other scale, no bias': {'qk_scale': 0.3, 'qkv_bias': False},
    'no shuffle': {'manip_type': 'none'},
    'mean, shift': {'manip_type': ['mean', 'shift']},
    'attention, global': {'manip_type': ['attention', 'global']},
    'mix': {'manip_type': 'mix'},
    'no MSG tokens': {'use_msg_tokens': False, 'head_tokens': 'patches'},
    'head of patches': {'head_tokens': 'patches'},
}


@torch.no_grad()
@pytest.mark.parametrize('for_onnxruntime', [True, False])
@pytest.mark.parametrize('options', VARIANTS.values(), ids=VARIANTS)
def test_outputs_are_equal(options, for_onnxruntime):
    layout = {'depths': (1, 2), 'num_heads': (1, 2), 'window_size': 3, 'shuffle_size': (2, 2)}
    model = fill_(MSGTransformer(img_size=24, patch_size=2, num_classes=3, embed_dim=8, **layout, **options)).eval()
    before = copy.deepcopy(model.state_dict())
    rewritten = rewrite_for_runtimes(model, for_onnxruntime)
    for size in ((24, 24), (33, 57)):  # without and with padding
        images = torch.randn(2, 3, *size)
        torch.testing.assert_close(rewritten(images), model(images), rtol=0, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_feature_maps_of_a_backbone_are_equal():
    backbone = fill_(build_detector(tiny_detector())).eval().backbone.body
    images = torch.randn(1, 3, 64, 96)
    maps = rewrite_for_runtimes(backbone, for_onnxruntime=True)(images)
    torch.testing.assert_close(maps, backbone(images), rtol=0, atol=1e-5)
