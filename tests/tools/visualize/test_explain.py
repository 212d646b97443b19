import numpy as np
import pytest
import torch
from torch import nn

from models.windows import split_windows
from tests.helpers.golden import V2
from tests.helpers.traces import build, trace
from tools.visualize.explain import (
    grad_cam,
    msg_attention,
    trace_blocks,
    traced_logits,
    window_in_stage,
    window_influence,
)


@pytest.mark.parametrize(
    'options', [{}, V2, {'manip_type': 'none'}, {'head_tokens': 'patches'}, {'in_chans': 1}, {'num_classes': 0}]
)
@pytest.mark.parametrize('size', [(32, 32), (23, 37)])
def test_a_trace_computes_what_the_network_does(options, size):
    model = build(**options)
    image = torch.randn(1, model.in_chans, *size)
    stages = trace_blocks(model, image)
    torch.testing.assert_close(traced_logits(model, stages), model(image))
    maps = model.forward_intermediates(image, intermediates_only=True, output_fmt='NHWC')
    for stage, expected in zip(stages, maps, strict=True):
        patches, _ = split_windows(stage.windows[-1], stage.window_size, stage.grid)
        torch.testing.assert_close(patches, expected)
        assert stage.window_grid == tuple(-(-side // stage.window_size) for side in stage.grid)


@pytest.mark.parametrize('size', [(32, 32), (23, 37)])
def test_attention_weights_are_those_of_the_attention(size):
    model = build()
    stages = trace(model, *size)
    for stage, maps in zip(stages, msg_attention(stages), strict=True):
        (nH, nW), w = stage.window_grid, stage.window_size
        for block, windows, weights in zip(stage.blocks, stage.windows[:-1], maps, strict=True):
            attn = block.attn
            assert weights.shape == (nH, nW, attn.num_heads, w, w)
            x = block.norm1(windows)
            x = x if stage.padding is None else stage.padding.zero(x)
            patches = weights.flatten(-2)
            row = torch.cat((1 - patches.sum(dim=-1, keepdim=True), patches), dim=-1)  # (nH, nW, h, N)
            values = attn.qkv(x).chunk(3, dim=-1)[2][0].unflatten(-1, (attn.num_heads, -1))  # (nH, nW, N, h, d)
            output = attn.proj(torch.einsum('abhn,abnhd->abhd', row, values).flatten(-2))
            torch.testing.assert_close(output, attn(x, msg_only=True)[0, :, :, 0], atol=1e-5, rtol=1e-4)


def region(grid, window, size):
    """The windows of the shuffle region that holds a window, as a boolean array."""
    rows, columns = np.arange(grid[0]), np.arange(grid[1])
    return np.outer(rows // size == window[0] // size, columns // size == window[1] // size)


def reach(stages, stage, block, window, tokens, source):
    return (window_influence(stages, stage, block, window, tokens, source) > 0).numpy()


@pytest.mark.parametrize('options', [{}, V2])
@pytest.mark.parametrize('size', [(32, 32), (26, 38)])
@pytest.mark.parametrize('stage', [0, 1])
def test_within_a_stage_influence_reaches_exactly_the_shuffle_region(options, size, stage):
    stages = trace(build(**options), *size)
    grid = stages[stage].window_grid
    for window in ((0, 0), (1, 2), (grid[0] - 1, grid[1] - 1)):
        own, shuffled = region(grid, window, 1), region(grid, window, 2)
        assert own.sum() == 1
        for block in range(len(stages[stage].blocks)):
            # The MSG token gets chunks of the region's others at the end of attention; patches read it a block later.
            assert np.array_equal(reach(stages, stage, block, window, 'msg', stage), shuffled)
            patches = reach(stages, stage, block, window, 'patches', stage)
            assert np.array_equal(patches, own if block == 0 else shuffled)


def test_without_the_shuffle_influence_stays_in_the_window():
    stages = trace(build(manip_type='none'))
    for stage, block in ((0, 0), (0, 2), (1, 1)):
        for tokens in ('msg', 'patches'):
            shares = window_influence(stages, stage, block, (1, 2), tokens, stage)
            assert shares[1, 2] == 1
            assert shares.count_nonzero() == 1


def test_across_stages_the_reach_grows_by_merging_and_by_the_regions_of_the_next_stage():
    stages = trace(build(img_size=64, shuffle_size=(2, 2)), 64, 64)  # 16 x 16 windows, then 8 x 8
    window = (5, 6)
    counts = {
        (stage, block, tokens): reach(stages, stage, block, window_in_stage(window, stage), tokens, 0)
        for stage, block in ((0, 0), (0, 1), (1, 0), (1, 1))
        for tokens in ('patches', 'msg')
    }
    assert {key: int(value.sum()) for key, value in counts.items()} == {
        (0, 0, 'patches'): 1, (0, 0, 'msg'): 4, (0, 1, 'patches'): 4, (0, 1, 'msg'): 4,
        (1, 0, 'patches'): 4, (1, 0, 'msg'): 16, (1, 1, 'patches'): 16, (1, 1, 'msg'): 16,
    }  # fmt: skip
    assert np.array_equal(counts[1, 1, 'patches'], region((16, 16), window, 4))
    assert all(value[window] for value in counts.values())


def test_shares_are_the_norms_of_the_jacobian():
    model = build(img_size=16)
    stages = trace(model, 16, 16)
    stage = stages[0]

    def chosen_token(windows):
        for block in stage.blocks[:2]:
            windows = block(windows, stage.padding)
        return windows[0, 1, 1, 0]

    jacobian = torch.autograd.functional.jacobian(chosen_token, stage.windows[0].detach())  # (C, 1, nH, nW, N, C)
    norms = jacobian.square().sum(dim=(0, 1, 4, 5)).sqrt()
    shares = window_influence(stages, 0, 1, (1, 1), 'msg', probes=200)
    torch.testing.assert_close(shares, norms / norms.sum(), atol=0.02, rtol=0.1)
    assert torch.equal(shares, window_influence(stages, 0, 1, (1, 1), 'msg', probes=200))


@pytest.mark.parametrize('stage', [0, 1, -1])
def test_grad_cam_is_a_map_of_the_patches_and_leaves_no_gradients_behind(stage):
    model = build()
    stages = trace(model, 22, 34)
    heat = grad_cam(model, stages, 1, stage)
    assert heat.shape == stages[stage].grid
    assert heat.any()
    assert (heat >= 0).all()
    assert all(parameter.grad is None for parameter in model.parameters())
    nn.init.zeros_(model.head.weight)
    assert not grad_cam(model, trace(model), 1, stage).any()


def test_grad_cam_lies_where_the_patches_are():
    """Where the map is that of the embedding, a bright rectangle is two values: its own and the background's."""
    model = build(depths=(1, 1))
    image = torch.full((1, 3, 32, 32), -1.0)
    image[:, :, 20:28, 4:12] = 1.0
    stages = trace_blocks(model, image)
    for class_index in range(3):
        heat = grad_cam(model, stages, class_index, 0)  # (16, 16), patches of 2 pixels
        if heat.any():
            inside = torch.zeros(16, 16, dtype=torch.bool)
            inside[10:14, 2:6] = True
            assert heat[inside].std() < 1e-4 * heat.max()
            assert heat[~inside].std() < 1e-4 * heat.max()
            assert (heat[inside].mean() - heat[~inside].mean()).abs() > 0.01 * heat.max()
            return
    raise AssertionError('no class has a map')


def test_grad_cam_is_linear_in_the_logit():
    model = build()
    image = torch.randn(1, 3, 32, 32)
    stages = trace_blocks(model, image)
    before = grad_cam(model, stages, 0)
    with torch.no_grad():
        model.head.weight[1] = 2 * model.head.weight[0]
    torch.testing.assert_close(grad_cam(model, trace_blocks(model, image), 1), 2 * before)


def test_grad_cam_needs_classes():
    model = build(num_classes=0)
    with pytest.raises(ValueError, match='the network has no classes'):
        grad_cam(model, trace(model), 0)


def test_frozen_networks_and_other_grad_modes_change_nothing():
    model = build()
    image = torch.randn(1, 3, 32, 32)

    def measure():
        stages = trace_blocks(model, image)
        return window_influence(stages, 0, 1, (0, 0)), grad_cam(model, stages, 1)

    expected = measure()
    with torch.no_grad():
        torch.testing.assert_close(measure(), expected)
    model.requires_grad_(False)
    torch.testing.assert_close(measure(), expected)
