"""Images of any size, feature maps, and the head."""

import re
from math import ceil

import pytest
import torch

from models import MSGTransformer
from tests.helpers.golden import V2, fill_, images, micro, normal

SMALL = {'embed_dim': 16, 'depths': (1, 1, 2, 1), 'num_heads': (1, 2, 4, 8), 'drop_path_rate': 0.0, 'num_classes': 5}


def images_of(height, width, n=1):
    return normal(f'images-{height}-{width}', (n, 3, height, width))


@pytest.mark.parametrize('version', [{}, V2], ids=['v1', 'v2'])
@pytest.mark.parametrize('size', [(224, 448), (225, 223), (33, 57), (8, 300), (4, 4), (128, 96)])
@torch.no_grad()
def test_images_of_any_size(version, size):
    model = fill_(MSGTransformer(**SMALL, **version)).eval()
    batch = images_of(*size)
    features, maps = model.forward_intermediates(batch)
    assert MSGTransformer(**SMALL, **version, img_size=size).pool_size == features.shape[1:3]
    for i, x in enumerate(maps):
        assert x.shape == (1, 16 * 2**i, *(ceil(side / (4 * 2**i)) for side in size))
        assert x.isfinite().all()
        assert x.is_contiguous()
    assert features.shape == (1, *(ceil(side / 224) for side in size), 128)
    torch.testing.assert_close(model.forward_features(batch), features, rtol=1e-4, atol=1e-5)
    assert model(batch).shape == (1, 5)


@pytest.mark.parametrize('version', [{}, V2], ids=['v1', 'v2'])
@pytest.mark.parametrize('training', [False, True])
def test_forward_features_equals_forward_intermediates(version, training):
    model = fill_(MSGTransformer(**SMALL | version | {'drop_path_rate': 0.3})).train(training)
    batch = images(2, 224)
    torch.manual_seed(3)
    expected = model.forward_features(batch)
    torch.manual_seed(3)
    features, maps = model.forward_intermediates(batch)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert len(maps) == 4


@torch.no_grad()
def test_a_network_built_for_another_size_or_for_none_computes_the_same():
    options = SMALL | {'window_size': 7}
    reference = fill_(MSGTransformer(**options))
    for img_size in (None, 448, (225, 97)):
        other = MSGTransformer(**options, img_size=img_size)
        other.load_state_dict(reference.state_dict())
        for size in ((224, 224), (100, 150)):
            assert torch.equal(other.eval()(images_of(*size)), reference.eval()(images_of(*size)))


@torch.no_grad()
def test_padding_to_whole_patches_changes_nothing():
    """Whole patches of padding at the border change nothing but the windows they add."""
    model = fill_(MSGTransformer(**SMALL)).eval()
    batch = images_of(61, 90)
    padded = torch.nn.functional.pad(batch, (0, 2, 0, 3))  # to 64 x 92: whole patches
    assert torch.equal(model(batch), model(padded))


@pytest.mark.parametrize(
    ('arguments', 'stages'),
    [
        ({}, [0, 1, 2, 3]),
        ({'indices': 2}, [2, 3]),
        ({'indices': (0, 2)}, [0, 2]),
        ({'indices': [-1, 1]}, [1, 3]),
        ({'indices': (1,), 'stop_early': True}, [1]),
    ],
)
@torch.no_grad()
def test_feature_maps_follow_timms_conventions(arguments, stages):
    model = fill_(MSGTransformer(**SMALL)).eval()
    batch = images_of(100, 130)
    features, all_maps = model.forward_intermediates(batch)
    maps = model.forward_intermediates(batch, **arguments, intermediates_only=True)
    for i, x in zip(stages, maps, strict=True):
        assert torch.equal(x, all_maps[i])
    final, again = model.forward_intermediates(batch, **arguments)
    assert all(map(torch.equal, maps, again))
    if 'stop_early' in arguments:
        assert final.shape == (1, 2, 3, 32)  # MSG tokens of the second stage
    else:
        assert torch.equal(final, features)
    assert [info['num_chs'] for info in model.feature_info] == [x.shape[1] for x in all_maps]
    assert [info['reduction'] for info in model.feature_info] == [4, 8, 16, 32]
    channels_last = model.forward_intermediates(batch, **arguments, intermediates_only=True, output_fmt='NHWC')
    assert all(torch.equal(a, b.permute(0, 3, 1, 2)) for a, b in zip(maps, channels_last, strict=True))
    *others, last = model.forward_intermediates(batch, norm=True, intermediates_only=True)
    assert all(map(torch.equal, others, all_maps[:-1]))
    torch.testing.assert_close(last.permute(0, 2, 3, 1), model.norm(all_maps[-1].permute(0, 2, 3, 1)))


@pytest.mark.parametrize('indices', [0, 5, -1, (4,), (-5,), ()])
def test_stages_that_do_not_exist_are_refused(indices):
    with pytest.raises(ValueError, match=re.escape(f'indices is {indices!r}: the network has 4 stages, 0 to 3')):
        MSGTransformer(**SMALL).forward_intermediates(images_of(32, 32), indices)


def test_flops_need_a_size():
    model = MSGTransformer(**SMALL, img_size=None)
    with pytest.raises(ValueError, match='built without an image size: give img_size'):
        model.flops()
    assert model.flops((224, 224)) == MSGTransformer(**SMALL).flops()


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match="output_fmt is 'NLC': write NCHW or NHWC"):
        MSGTransformer(**SMALL).forward_intermediates(images_of(32, 32), output_fmt='NLC')


@torch.no_grad()
def test_the_head_averages_msg_tokens_or_leaves_them():
    model = fill_(micro(img_size=112, shuffle_size=(4, 2, 2))).eval()
    features = model.forward_features(images(2, 112))
    assert features.shape == (2, 2, 2, 64)
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.sum(dim=(1, 2)) / 4)
    assert torch.equal(model(images(2, 112)), model.head(pooled))
    model = fill_(micro(img_size=112, shuffle_size=(4, 2, 2), num_classes=0, global_pool='')).eval()
    assert torch.equal(model(images(2, 112)), model.forward_features(images(2, 112)))


@torch.no_grad()
def test_the_position_embedding_is_resized_to_the_grid():
    model = fill_(micro(ape=True, patch_norm=False)).eval()
    assert torch.equal(model._position_embedding(28, 28), model.absolute_pos_embed.view(1, 28, 28, 16))
    ramp = torch.arange(28.0)[:, None].expand(28, 28)
    model.absolute_pos_embed.copy_(ramp.reshape(1, 784, 1).expand(1, 784, 16))
    resized = model._position_embedding(56, 42)
    assert resized.shape == (1, 56, 42, 16)
    inner = resized[0, 8:-8, :, 0]
    torch.testing.assert_close(inner, ((torch.arange(56.0) + 0.5) / 2 - 0.5)[8:-8, None].expand_as(inner))
    assert model(images_of(112, 84)).shape == (1, 10)
    with pytest.raises(ValueError, match='needs an img_size'):
        micro(ape=True, img_size=None)


@pytest.mark.parametrize('size', [(56, 56), (41, 33)])
def test_recomputing_activations_changes_no_gradient(size):
    batch, gradients = images_of(*size, n=2), []
    for options in ({}, {'use_checkpoint': True}, {'recompute_mlp': True}):
        model = fill_(micro(drop_path_rate=0.3, drop_rate=0.1, **options)).train()
        torch.manual_seed(2)
        sum(x.square().mean() for x in model.forward_intermediates(batch, intermediates_only=True)).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(map(torch.equal, gradients[0], gradients[1]))
    assert all(map(torch.equal, gradients[0], gradients[2]))


def test_flops_of_a_size_that_does_not_tile_count_whole_windows():
    model = micro(depths=(1,), num_heads=(1,), shuffle_size=(1,), num_classes=0)
    block = model.layers[0].blocks[0]
    assert block.flops((10, 15)) - block.flops((10, 14)) > block.flops((10, 14)) - block.flops((10, 13))
    assert model.flops((20, 30)) == model.patch_embed.flops((10, 15)) + block.flops((10, 15)) + 16 * (150 + 1)
