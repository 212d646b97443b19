"""The classifier as a backbone: its maps, and images of any size."""

from math import ceil

import pytest
import torch

from detection.models.backbone import (
    MSGBackbone,
    add_branch,
    merge,
    run_block_padded,
    run_stage,
    shuffle_any_grid,
)
from models import MSGTransformer
from models.embedding import OverlapPatchMerging, PatchMerging
from models.msg_block import RegionDropPath
from models.windows import join_windows, shuffle_msg_tokens, split_windows
from tests.fill import fill_, images, normal

SMALL = {'embed_dim': 16, 'depths': (1, 1, 2, 1), 'num_heads': (1, 2, 4, 8), 'drop_path_rate': 0.0}
V2 = {'embed_type': 'overlap', 'merge_type': 'overlap'}


@pytest.mark.parametrize('version', [{}, V2], ids=['v1', 'v2'])
@pytest.mark.parametrize('training', [False, True])
def test_at_224_it_is_the_classifier_to_the_bit(version, training):
    options = SMALL | version | {'drop_path_rate': 0.3}
    classifier, backbone = MSGTransformer(**options), MSGBackbone(**options)
    fill_(classifier)
    missing = backbone.load_state_dict(classifier.state_dict(), strict=False)
    assert all(name.startswith('out_norms.') for name in missing.missing_keys)
    assert missing.unexpected_keys == ['head.weight', 'head.bias']
    for model in (classifier, backbone):
        model.train(training)
    batch = images(2, 224)

    torch.manual_seed(3)
    patches, msg = classifier.embed(batch)
    expected = []
    for layer in classifier.layers:  # what each stage gives to its merging
        x = join_windows(patches, msg)
        for block in layer.blocks:
            x = block(x)
        patches, msg = split_windows(x, layer.layout.window)
        expected.append(patches)
        if layer.downsample is not None:
            patches, msg = layer.downsample(patches), layer.downsample(msg)
    torch.manual_seed(3)
    maps = backbone(batch)

    assert list(maps) == ['0', '1', '2', '3']
    norms = (*backbone.out_norms, classifier.norm)
    for stage, norm, told in zip(expected, norms, maps.values(), strict=True):
        assert torch.equal(norm(stage).permute(0, 3, 1, 2), told)
    if not training:
        classifier.layers[-1].register_forward_hook(lambda *_: None)  # to it, the classifier gives all tokens, too
        assert torch.equal(classifier.forward_features(batch), classifier.norm(msg).mean(dim=(1, 2)))


@pytest.mark.parametrize('version', [{}, V2], ids=['v1', 'v2'])
@pytest.mark.parametrize('size', [(224, 448), (225, 223), (8, 300), (1, 1), (128, 96)])
def test_images_of_any_size(version, size):
    backbone = MSGBackbone(**SMALL, **version).eval()
    maps = backbone(torch.randn(1, 3, *size))
    for i, (told, channels) in enumerate(zip(maps.values(), backbone.out_channels, strict=True)):
        assert told.shape == (1, channels, *(ceil(side / (4 * 2**i)) for side in size))
        assert told.isfinite().all()
        assert told.is_contiguous()
        torch.testing.assert_close(told.mean(dim=1), torch.zeros_like(told[:, 0]), atol=1e-5, rtol=0)  # normalised


def test_stages_after_the_first_may_shuffle_too_where_224_has_one_window():
    backbone = MSGBackbone(**SMALL, shuffle_size=(4, 4, 2, 2))
    assert [layer.layout.region for layer in backbone.layers] == [4, 4, 2, 2]
    assert [layer.layout.window for layer in backbone.layers] == [7, 7, 7, 7]


@pytest.mark.parametrize('rate', [0.0, 0.5])
def test_the_padded_way_is_the_plain_one_where_windows_tile(rate):
    stage = fill_(MSGBackbone(**SMALL | {'drop_path_rate': rate})).train().layers[2]
    patches, msg = normal('patches', (2, 14, 28, 64)), normal('msg', (2, 2, 4, 64))
    torch.manual_seed(1)
    plain = run_stage(stage, patches, msg)
    torch.manual_seed(1)
    for block in stage.blocks:
        patches, msg = run_block_padded(block, patches, msg)
    torch.testing.assert_close((patches, msg), plain, rtol=1e-4, atol=1e-5)


def test_a_block_pads_after_its_first_norm_and_crops_before_its_mlp():
    """Against the steps of the specification one by one, on windows that are padded to the right and below."""
    block = fill_(MSGBackbone(**SMALL)).eval().layers[2].blocks[0]
    patches, msg = normal('p', (1, 10, 15, 64)), normal('m', (1, 2, 3, 64))
    told = run_block_padded(block, patches, msg)

    grid = torch.zeros(1, 14, 21, 64)
    grid[:, :10, :15] = block.norm1(patches)
    attended, of_msg = torch.zeros_like(grid), torch.zeros_like(msg)
    for row in range(2):
        for column in range(3):
            square = (slice(None), slice(7 * row, 7 * row + 7), slice(7 * column, 7 * column + 7))
            window = torch.cat((block.norm1(msg)[:, row, column, None], grid[square].flatten(1, 2)), dim=1)
            x = block.attn(window)  # (1, N, C)
            of_msg[:, row, column], attended[square] = x[:, 0], x[:, 1:].view(1, 7, 7, 64)
    patches, msg = patches + attended[:, :10, :15], msg + of_msg
    msg = shuffle_any_grid(msg, 2)
    expected = patches + block.mlp(block.norm2(patches)), msg + block.mlp(block.norm2(msg))
    torch.testing.assert_close(told, expected, rtol=1e-4, atol=1e-5)


def test_a_token_keeps_its_chunk_where_its_partner_is_padding():
    msg = torch.arange(3 * 5 * 8.0).view(1, 3, 5, 8)
    told = shuffle_any_grid(msg, 2)
    assert torch.equal(told[:, :2, :4], shuffle_msg_tokens(msg[:, :2, :4], 2))
    for row, column in [(2, 0), (2, 3), (0, 4), (1, 4), (2, 4)]:  # regions that are cut
        top, left = row - row % 2, column - column % 2
        chunks = []
        for i in range(4):  # the partners of the region, row by row
            y, x = top + i // 2, left + i % 2
            own, mine = msg[0, row, column].view(4, 2), 2 * (row - top) + column - left
            chunks.append(msg[0, y, x].view(4, 2)[mine] if y < 3 and x < 5 else own[i])
        assert torch.equal(told[0, row, column], torch.cat(chunks))
    assert torch.equal(told.flatten().sort()[0], msg.flatten())  # nothing is lost


def test_drop_path_is_drawn_once_a_region_cut_or_not():
    drop_path = RegionDropPath(0.5, region_size=2).train()
    patches, msg = torch.zeros(3, 10, 15, 4), torch.zeros(3, 2, 3, 4)
    seen = set()
    for _ in range(10):
        of_patches, of_msg = add_branch(drop_path, 7, patches, msg, torch.ones_like(patches), torch.ones_like(msg))
        for b in range(3):
            left, right = of_msg[b, :, :2], of_msg[b, :, 2:]
            assert len(left.unique()) == len(right.unique()) == 1
            assert (of_patches[b, :, :14] == left[0, 0, 0]).all()
            assert (of_patches[b, :, 14:] == right[0, 0, 0]).all()
            seen.add((left[0, 0, 0].item(), right[0, 0, 0].item()))
    assert seen == {(x, y) for x in (0.0, 2.0) for y in (0.0, 2.0)}  # independent, the survivors divided by 1/2


@pytest.mark.parametrize('kind', [PatchMerging, OverlapPatchMerging])
def test_odd_grids_are_padded_with_zeros_before_they_are_merged(kind):
    module = fill_(kind(4, torch.nn.LayerNorm))
    x = normal('odd', (2, 5, 7, 4))
    whole = torch.zeros(2, 6, 8, 4)
    whole[:, :5, :7] = x
    torch.testing.assert_close(merge(module, x), module(whole))
    assert merge(module, x).shape == (2, 3, 4, 8)


@pytest.mark.parametrize('size', [(224, 224), (100, 72)])
def test_recomputing_activations_changes_no_gradient(size):
    batch = images(2, 224)[:, :, : size[0], : size[1]]
    gradients = []
    for use_checkpoint in (False, True):
        backbone = fill_(MSGBackbone(**SMALL | {'drop_path_rate': 0.3}, use_checkpoint=use_checkpoint)).train()
        torch.manual_seed(2)
        sum(level.square().mean() for level in backbone(batch).values()).backward()
        gradients.append([p.grad for p in backbone.parameters()])
    assert all(map(torch.equal, *gradients))
    names = [name for name, _ in backbone.named_parameters()]
    noise = ('rel_pos_msg', 'qkv.bias')
    for name, gradient in zip(names, gradients[0], strict=True):
        assert name.endswith(noise) or 0 < gradient.norm() < float('inf'), name
