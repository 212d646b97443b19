import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine.config_tree import ConfigError
from models import MSGTransformer
from models.layers import (
    EMBED_TYPES,
    ConvStem,
    Mlp,
    OverlapPatchMerging,
    PatchMerging,
    RegionDropPath,
    conv_stem_channels,
)
from tests.helpers.golden import fill_, normal
from tools.flops import count_multiply_adds


def test_drop_path_is_drawn_per_region_and_keeps_the_mean():
    drop = RegionDropPath(0.25, shuffle_size=2).train()
    x = torch.ones(500, 4, 4, 3, 2)
    out = drop(x)
    regions = out.view(500, 2, 2, 2, 2, 3, 2).transpose(2, 3).reshape(500 * 4, -1)
    assert torch.equal(regions.min(dim=1).values, regions.max(dim=1).values)  # a region is dropped as a whole
    torch.testing.assert_close(regions[:, 0].unique(), torch.tensor([0.0, 1 / 0.75]))
    per_image = regions[:, 0].view(500, 4)
    assert (per_image.min(dim=1).values < per_image.max(dim=1).values).any()  # but not an image as a whole
    assert regions.mean().item() == pytest.approx(1.0, abs=0.05)
    assert drop.eval()(x) is x


def test_drop_path_of_regions_cut_by_the_border():
    drop, seen = RegionDropPath(0.5, shuffle_size=2).train(), set()
    for _ in range(10):
        for image in drop(torch.ones(3, 2, 3, 5, 4)):
            left, right = image[:, :2], image[:, 2:]
            assert len(left.unique()) == len(right.unique()) == 1
            seen.add((left[0, 0, 0, 0].item(), right[0, 0, 0, 0].item()))
    assert seen == {(x, y) for x in (0.0, 2.0) for y in (0.0, 2.0)}  # independent, divided by 1/2


@pytest.mark.parametrize('drop', [0.0, 0.5])
def test_recompute_keeps_no_gelu_output_and_gives_the_same_gradients(drop):
    gradients, kept = [], []
    for recompute in (False, True):
        mlp = fill_(Mlp(8, 32, drop, recompute)).train()
        shapes = []
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=shapes: (s.append(t.shape), t)[1], lambda t: t):
            out = mlp(normal('x', (4, 10, 8)))
        out.square().sum().backward()
        gradients.append([p.grad for p in mlp.parameters()])
        kept.append(sum(shape.numel() == 4 * 10 * 32 for shape in shapes))
    assert all(map(torch.equal, *gradients))
    assert kept[1] == 1 < kept[0]  # fc1's output alone


def test_the_mlp_checkpoints_nothing_unless_asked():
    assert not Mlp(8, 32).recompute


@pytest.mark.parametrize(
    ('kind', 'patch_size'),
    [(kind, size) for kind in EMBED_TYPES for size in (1, 2, 3, 4, 7, 8) if kind != 'conv' or size in (2, 4, 8)],
)
def test_the_embedding_pads_to_whole_patches(kind, patch_size):
    embed = fill_(EMBED_TYPES[kind](patch_size, 3, 8, nn.LayerNorm)).eval()
    images = normal('images', (1, 3, 2 * patch_size + 1, 3 * patch_size))
    whole = torch.zeros(1, 3, (2 + (patch_size > 1)) * patch_size + (patch_size == 1), 3 * patch_size)
    whole[:, :, : images.shape[2]] = images
    assert embed(images).shape == (1, 3, 3, 8)
    assert torch.equal(embed(images), embed(whole))


@pytest.mark.parametrize('kind', EMBED_TYPES)
def test_images_smaller_than_a_patch_are_refused(kind):
    embed = EMBED_TYPES[kind](4, 3, 8, None).eval()
    assert embed(torch.zeros(1, 3, 4, 4)).shape == (1, 1, 1, 8)
    for height, width in ((3, 57), (57, 3)):
        message = f'images of {height} x {width} pixels are smaller than one patch of 4 x 4'
        with pytest.raises(ValueError, match=message):
            embed(torch.zeros(1, 3, height, width))


def test_the_conv_stem_is_convolutions_with_batch_norm_and_relu():
    stem = fill_(ConvStem(4, 3, 8, nn.LayerNorm)).train()
    images = x = normal('images', (2, 3, 12, 16))
    for block in list(stem.convs)[:2]:
        x = F.conv2d(x, block.conv.weight, stride=2, padding=1)
        x = (x - x.mean(dim=(0, 2, 3), keepdim=True)) / (x.var(dim=(0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
        x = (x * block.bn.weight.view(-1, 1, 1) + block.bn.bias.view(-1, 1, 1)).clamp(min=0)
    x = torch.einsum('bchw,dc->bhwd', x, stem.convs[2].weight[:, :, 0, 0]) + stem.convs[2].bias
    torch.testing.assert_close(stem(images), stem.norm(x))
    assert conv_stem_channels(16, 64) == [8, 16, 32, 64]


@pytest.mark.parametrize('patch_size', [2, 4, 8])
def test_flops_of_the_conv_stem_are_its_operators_and_its_norm(patch_size):
    for norm, norm_flops in ((nn.LayerNorm, 3 * 5 * 8), (None, 0)):
        stem = ConvStem(patch_size, 3, 8, norm).eval()
        counted = count_multiply_adds(lambda stem=stem: stem(torch.zeros(1, 3, 3 * patch_size, 5 * patch_size)))
        assert stem.flops((3, 5)) == counted + norm_flops


@pytest.mark.parametrize(
    ('patch_size', 'embed_dim', 'message'),
    [
        (1, 8, 'patch_size is 1: embed_type conv needs a power of two'),
        (6, 8, 'patch_size is 6: embed_type conv needs a power of two'),
        (8, 6, 'embed_dim is 6: embed_type conv with patches of 8 pixels needs a multiple of 4'),
    ],
)
def test_conv_stems_that_do_not_divide_are_refused(tiny_config, patch_size, embed_dim, message):
    options = {
        'patch_size': patch_size,
        'embed_dim': embed_dim,
        'depths': (1,),
        'num_heads': (1,),
        'shuffle_size': (1,),
    }
    with pytest.raises(ValueError, match=message):
        MSGTransformer(56, embed_type='conv', **options)
    with pytest.raises(ConfigError, match=f'MODEL.MSG: {message}'):
        tiny_config(
            MODEL__MSG__EMBED_TYPE='conv',
            **{f'MODEL__MSG__{key.upper()}': str(value) for key, value in options.items() if key != 'shuffle_size'},
            MODEL__MSG__SHUF_SIZE='[1]',
        )


@pytest.mark.parametrize('kind', [PatchMerging, OverlapPatchMerging])
def test_odd_grids_are_padded_with_zeros_before_merging(kind):
    module = fill_(kind(4, nn.LayerNorm))
    x = normal('odd', (2, 5, 7, 4))
    whole = torch.zeros(2, 6, 8, 4)
    whole[:, :5, :7] = x
    assert module(x).shape == (2, 3, 4, 8)
    torch.testing.assert_close(module(x), module(whole))


@pytest.mark.parametrize('grid', [(1, 1), (4, 1), (1, 4)])
def test_convolutions_merge_a_single_row_or_column_in_half_precision(grid):
    """oneDNN's gradient of a convolution over one column has uninitialized memory: see `to_convolution_input`."""
    merging = OverlapPatchMerging(16, nn.LayerNorm)
    gradients = []
    for enabled in (False, True):
        for _ in range(20):
            freed = [torch.full((2**n,), float('nan')) for n in range(8, 18)]
            del freed
            merging.zero_grad()
            with torch.autocast('cpu', torch.bfloat16, enabled):
                out = merging(normal('x', (8, *grid, 16)))
            (out.float() * normal('weights', out.shape)).sum().backward()
            gradients.append(merging.reduction.weight.grad.clone())
    scale = gradients[0].abs().max()
    for gradient in gradients:
        torch.testing.assert_close(gradient / scale, gradients[0] / scale, rtol=0, atol=0.05)


def test_merging_concatenates_column_by_column():
    merge = PatchMerging(1, lambda _: nn.Identity())
    nn.init.eye_(merge.reduction.weight)
    x = torch.arange(4.0).view(1, 2, 2, 1)
    assert merge(x).flatten().tolist() == [0, 2]  # (0, 0), then (1, 0)
