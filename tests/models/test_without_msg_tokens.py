"""The variants that show what MSG tokens do: windows without them, and a head that reads patches."""

import pytest
import torch

from models import MSGTransformer
from tests.helpers.golden import fill_

SMALL = {'embed_dim': 16, 'depths': (1, 1, 2, 1), 'num_heads': (1, 2, 4, 8), 'num_classes': 5}
OVERLAP = {'embed_type': 'overlap', 'merge_type': 'overlap'}


@pytest.mark.parametrize('options', [{}, OVERLAP], ids=['v1', 'v2'])
def test_nothing_of_msg_tokens_is_left(options):
    full, bare = MSGTransformer(**SMALL, **options), MSGTransformer(**SMALL, **options, use_msg_tokens=False)
    shapes = {name: p.shape for name, p in full.named_parameters() if 'msg' not in name}
    assert {name: p.shape for name, p in bare.named_parameters()} == shapes
    assert bare.flops() < full.flops()
    fill_(bare).eval()(torch.randn(2, 3, 224, 224)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in bare.parameters())


@torch.no_grad()
def test_the_counted_multiply_adds_are_those_of_windows_of_patches():
    model = MSGTransformer(**SMALL, use_msg_tokens=False)
    H, C, w = 56, 16, 7
    block = model.layers[0].blocks[0].flops((H, H))
    windows, N = (H // w) ** 2, w * w
    assert block == 2 * C * H * H + windows * (3 * N * C**2 + 2 * N**2 * C + N * C**2) + 2 * H * H * C * 4 * C


@torch.no_grad()
def test_windows_do_not_see_each_other():
    stage = fill_(MSGTransformer(**SMALL, use_msg_tokens=False)).eval().layers[0]
    patches = torch.randn(1, 56, 56, 16)
    changed = patches.clone()
    changed[:, 7:14, 14:21] += 1
    (before, _), (after, msg) = stage(patches, None), stage(changed, None)
    assert msg is None
    is_changed = (before != after).any(-1)[0].view(8, 7, 8, 7).any(dim=3).any(dim=1)
    assert is_changed.nonzero().tolist() == [[1, 2]]


@torch.no_grad()
def test_attention_is_plain_window_attention():
    attn = fill_(MSGTransformer(**SMALL, use_msg_tokens=False)).layers[1].blocks[0].attn
    x = torch.randn(3, 49, 32)
    q, k, v = attn.qkv(x).view(3, 49, 3, 2, 16).permute(2, 0, 3, 1, 4)
    table = attn.relative_position_bias_table.view(13, 13, 2)
    position = torch.cartesian_prod(torch.arange(7), torch.arange(7))
    offset = position[:, None] - position + 6
    bias = table[offset[..., 0], offset[..., 1]].permute(2, 0, 1)
    weights = (q @ k.transpose(-2, -1) / 4 + bias).softmax(-1)
    torch.testing.assert_close(attn(x), attn.proj((weights @ v).transpose(1, 2).reshape(3, 49, 32)))


@pytest.mark.parametrize('options', [{'use_msg_tokens': False}, {'head_tokens': 'patches'}], ids=['bare', 'patches'])
@pytest.mark.parametrize('size', [(224, 224), (97, 130)], ids=str)
@torch.no_grad()
def test_the_head_reads_the_mean_of_the_normed_patches(options, size):
    model = fill_(MSGTransformer(**SMALL, **options)).eval()
    images = torch.randn(2, 3, *size)
    last = model.forward_intermediates(images, indices=1, output_fmt='NHWC', intermediates_only=True)[0]
    expected = model.head(model.norm(last).mean(dim=(1, 2)))
    torch.testing.assert_close(model(images), expected)
    torch.testing.assert_close(model.forward_head(model.forward_intermediates(images)[0]), expected)


def test_msg_tokens_with_a_patch_head_are_trained():
    model = MSGTransformer(**SMALL, head_tokens='patches')
    model(torch.randn(1, 3, 224, 224)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.msg_tokens.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="head_tokens is 'all': write one of 'msg', 'patches'"):
        MSGTransformer(**SMALL, head_tokens='all')
