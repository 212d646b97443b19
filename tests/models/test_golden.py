"""The network equals the published one: parameters, FLOPs, outputs and gradients recorded from the published code."""

import pytest
import torch
import torch.nn.functional as F

from config import load_config
from models import MSGTransformer, build_model, linear
from models.windows import join_windows
from tests.helpers.golden import GOLDEN, VERSIONS, assert_close, golden_network, images, labels

WITH_GRADIENTS = [key for key, record in GOLDEN.items() if 'loss' in record]


def in_regions(patches, msg, window, region):
    """Tokens in the published layout (B * regions, windows in a region, N, C)."""
    x = join_windows(patches, msg, window)
    B, nH, nW, N, C = x.shape
    x = x.view(B, nH // region, region, nW // region, region, N, C).transpose(2, 3)
    return x.reshape(-1, region**2, N, C)


@pytest.mark.parametrize(('version', 'size'), GOLDEN)
def test_parameters_flops_and_state_dict_are_exact(version, size):
    record = GOLDEN[version, size]
    with torch.device('meta'):
        model = MSGTransformer(**record['kwargs'], **VERSIONS[version])
    assert sum(p.numel() for p in model.parameters()) == record['params']
    assert model.flops() == record['flops']
    assert isinstance(model.flops(), int)
    shapes = [(name, list(value.shape)) for name, value in model.state_dict().items()]
    assert shapes == list(record['state_dict'].items())  # names, shapes and order


@pytest.mark.parametrize(('version', 'size'), GOLDEN)
@torch.no_grad()
def test_logits_and_the_tokens_of_every_stage(version, size):
    record = GOLDEN[version, size]
    model, batch = golden_network(version, size).eval(), images(2, record['size'])
    features, maps = model.forward_intermediates(batch)
    for logits in (model(batch), model.forward_head(features)):  # the last block's MSG tokens alone, and every token
        assert_close(logits[:, :10], record['logits'])
        assert_close([logits.mean(), logits.std()], [record['logits_mean'], record['logits_std']])

    patches, msg = model.embed(batch)
    stages = list(model.layers)
    followings = [*stages[1:], stages[-1]]
    for stage, following, feature_map, recorded in zip(stages, followings, maps, record['stages'], strict=True):
        patches, msg = stage(patches, msg)
        assert torch.equal(feature_map.permute(0, 2, 3, 1), patches)
        if stage is not following:
            patches, msg = stage.merge(patches, msg)
        block = following.blocks[0]
        regions = in_regions(patches, msg, block.window_size, block.shuffle_size)
        assert list(regions.shape) == recorded['shape']
        for tokens, prefix in ((regions, ''), (regions[:, :, 0], 'msg_')):
            assert_close([tokens.mean(), tokens.std()], [recorded[f'{prefix}mean'], recorded[f'{prefix}std']])
        assert_close(regions.flatten()[:4], recorded['head'])


@pytest.mark.parametrize(('version', 'size'), WITH_GRADIENTS)
def test_loss_and_gradient_norms(version, size):
    record = GOLDEN[version, size]
    model = golden_network(version, size).train()
    loss = F.cross_entropy(model(images(2, record['size'])), labels(2, model.num_classes))
    loss.backward()
    assert_close(loss.item(), record['loss'])
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    assert norms.keys() == record['grad_norm'].keys()
    for name, recorded in record['grad_norm'].items():
        assert norms[name] == pytest.approx(recorded, rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize('version', VERSIONS)
def test_the_same_with_linear_layers_by_the_other_library(version, monkeypatch):
    if not linear.HAS_OPERATOR:
        pytest.skip('PyTorch was built without oneDNN')
    other = 'pytorch' if linear.LIBRARY == 'onednn' else 'onednn'
    monkeypatch.setattr(linear, 'LIBRARY', other)
    test_logits_and_the_tokens_of_every_stage(version, 'tiny')
    test_loss_and_gradient_norms(version, 'tiny')


@pytest.mark.parametrize('size', ['tiny', 'small', 'base'])
@pytest.mark.parametrize(('version', 'prefix'), [('v1', 'msg'), ('v2', 'msg_v2')])
def test_config_files_build_the_published_networks(version, prefix, size):
    config = load_config(f'configs/{prefix}_{size}_p4_win7_224.yaml')
    with torch.device('meta'):
        model = build_model(config)
    record = GOLDEN[version, size]
    assert sum(p.numel() for p in model.parameters()) == record['params']
    assert model.flops() == record['flops']
    drop_path = {'v1': {'tiny': 0.2, 'small': 0.3, 'base': 0.5}, 'v2': {'tiny': 0.1, 'small': 0.3, 'base': 0.5}}
    assert drop_path[version][size] == config.MODEL.DROP_PATH_RATE
    assert model.layers[-1].blocks[-1].drop_path.rate == pytest.approx(drop_path[version][size])
