import copy
import pickle

import numpy as np
import pytest
import torch

from models.msg_block import MSGBlock, RegionDropPath, WindowAttention
from models.pyramid import Size, StageLayout
from tests import numpy_block
from tests.fill import fill_


@pytest.mark.parametrize('grad', [True, False], ids=['plain', 'fused'])
def test_block_equals_the_numpy_version(grad):
    w, s, heads, dim = 3, 2, 2, 16
    layout = StageLayout(Size(12, 6), w, s)
    block = fill_(MSGBlock(dim, layout, heads))
    x = torch.randn(2, 4, 2, w * w + 1, dim)
    weights = {name: value.double().numpy() for name, value in block.state_dict().items()}
    expected = np.stack([numpy_block.block(image.double().numpy(), weights, w, s, heads) for image in x])
    with torch.set_grad_enabled(grad):
        measured = block(x).detach().numpy()
    np.testing.assert_allclose(measured, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(('qkv_bias', 'qk_scale'), [(True, None), (False, None), (True, 0.3)])
def test_plain_and_fused_attention_agree(qkv_bias, qk_scale):
    attention = fill_(WindowAttention(16, 3, 4, qkv_bias, qk_scale))
    assert attention.scale == (qk_scale or 0.5)
    assert (attention.qkv.bias is not None) == qkv_bias
    x = torch.randn(6, 10, 16)
    plain = attention(x)
    with torch.no_grad():
        torch.testing.assert_close(attention(x), plain)


def test_attention_dropout_acts_in_training_only():
    attention = fill_(WindowAttention(16, 3, 4, attn_drop=0.5))
    x = torch.randn(6, 10, 16)
    assert not torch.equal(attention(x), attention(x))
    with torch.no_grad():
        assert not torch.equal(attention(x), attention(x))
        attention.eval()
        torch.testing.assert_close(attention(x), attention(x))


def test_dropout_and_drop_path_act_at_every_place():
    layout = StageLayout(Size(6, 6), 3, 2)
    block = MSGBlock(16, layout, 2, drop=0.25, attn_drop=0.5, drop_path=0.75).train()
    calls = []
    for module in (block.attn.attn_drop, block.attn.proj_drop, block.mlp.drop, block.drop_path):
        module.register_forward_hook(lambda module, inputs, out: calls.append((module, tuple(out.shape))))
    windows = (1, 2, 2, 10, 16)
    block(torch.randn(windows))
    assert calls == [
        (block.attn.attn_drop, (4, 2, 10, 10)),
        (block.attn.proj_drop, windows),
        (block.drop_path, windows),
        (block.mlp.drop, (1, 2, 2, 10, 64)),
        (block.mlp.drop, windows),
        (block.drop_path, windows),
    ]
    assert (block.attn.attn_drop.p, block.attn.proj_drop.p, block.mlp.drop.p) == (0.5, 0.25, 0.25)
    assert (block.drop_path.rate, block.drop_path.region_size) == (0.75, 2)


def test_drop_path_is_drawn_per_region_and_keeps_the_mean():
    drop = RegionDropPath(0.25, region_size=2).train()
    x = torch.ones(500, 4, 4, 3, 2)
    out = drop(x)
    regions = out.view(500, 2, 2, 2, 2, 3, 2).transpose(2, 3).reshape(500 * 4, -1)
    assert torch.equal(regions.min(dim=1).values, regions.max(dim=1).values)  # a region is dropped whole
    values = regions[:, 0].unique()
    torch.testing.assert_close(values, torch.tensor([0.0, 1 / 0.75]))
    per_image = regions[:, 0].view(500, 4)
    assert (per_image.min(dim=1).values < per_image.max(dim=1).values).any()  # not an image as one
    assert regions.mean().item() == pytest.approx(1.0, abs=0.05)
    assert drop.eval()(x) is x


def test_flops_count_the_layers_of_a_block():
    layout = StageLayout(Size(14, 14), 7, 2)
    norms, windows, tokens, N, C = 2 * 8 * 200, 4, 200, 50, 8
    attention = windows * (3 * N * C * C + 2 * N * N * C + N * C * C)
    assert MSGBlock(C, layout, 2, mlp_ratio=3.0).flops() == norms + attention + 2 * tokens * C * 3 * C


def wide(dim=16, heads=2, **kwargs):
    """A block of 4 x 2 windows of 3 x 3 patches in regions of 2 x 2, and windows for it."""
    block = fill_(MSGBlock(dim, StageLayout(Size(12, 6), 3, 2), heads, **kwargs))
    return block, torch.randn(2, 4, 2, 10, dim)


@pytest.mark.parametrize('grad', [True, False], ids=['plain', 'fused'])
def test_msg_tokens_alone_are_those_of_the_whole_block(grad):
    block, x = wide(drop_path=0.5)
    with torch.set_grad_enabled(grad):
        for mode in (True, False):
            block.train(mode)
            torch.manual_seed(1)
            whole = block(x)
            torch.manual_seed(1)
            alone = block(x, msg_only=True)
            assert alone.shape == (2, 4, 2, 1, 16)
            torch.testing.assert_close(alone, whole[:, :, :, :1])


def test_gelu_is_computed_again_in_the_backward_pass_and_not_kept():
    def kept(block):
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (shapes.append(tuple(t.shape)), t)[1], lambda t: t):
            out = block(x)
        out.sum().backward()
        return shapes.count((2, 4, 2, 10, 64)) + shapes.count((160, 64))

    block, x = wide(drop=0.5)
    plain = copy.deepcopy(block)
    plain.mlp.forward = lambda x: plain.mlp._contract(plain.mlp.fc1(x))
    torch.manual_seed(1)
    few = kept(block)
    torch.manual_seed(1)
    assert few < kept(plain)
    for (name, one), two in zip(block.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad), name  # with the same dropout


def evaluated(attention, x):
    with torch.no_grad():
        return attention(x)


def test_the_bias_is_kept_in_evaluation():
    attention = fill_(WindowAttention(16, 3, 4)).eval()
    x = torch.randn(6, 10, 16)
    evaluated(attention, x)
    bias = attention.evaluation_bias(torch.float32)
    assert attention.evaluation_bias(torch.float32) is bias
    assert bias.stride() == (4 * 10 * 16, 10 * 16, 16, 1)  # rows at multiples of 16
    assert torch.equal(bias[0], attention.position_bias())
    half = attention.evaluation_bias(torch.bfloat16)
    assert torch.equal(half[0], attention.position_bias().bfloat16())
    assert not any('kept' in name for name in attention.state_dict())


@pytest.mark.parametrize('parameter', ['relative_position_bias_table', 'rel_pos_msg'])
@pytest.mark.parametrize('change', ['step', 'adamw', 'by_hand', 'load', 'assign', 'no_grad', 'data', 'to', 'swap'])
def test_the_kept_bias_is_never_stale(change, parameter):
    attention = fill_(WindowAttention(16, 3, 4)).eval()
    x = torch.randn(6, 10, 16)
    before = evaluated(attention, x)
    state = {k: v.clone() for k, v in attention.state_dict().items()}
    state[parameter][:] = state[parameter].flip(0) * 3
    tensor = getattr(attention, parameter)
    if change in ('step', 'adamw', 'by_hand'):
        if change == 'by_hand':
            tensor.grad = torch.ones_like(tensor)
        else:
            attention(x).square().sum().backward()
        evaluated(attention, x)  # between the gradients and the step
        sgd = change == 'step'
        optimizer = torch.optim.SGD([tensor], lr=100.0) if sgd else torch.optim.AdamW([tensor], lr=1.0, fused=True)
        optimizer.step()
        optimizer.zero_grad()
        state[parameter] = tensor.detach().clone()
    elif change in ('load', 'assign'):
        attention.load_state_dict(state, assign=change == 'assign')
    elif change == 'no_grad':
        with torch.no_grad():
            tensor.copy_(state[parameter])
    elif change == 'data':  # behind autograd's back
        tensor.data.copy_(state[parameter])
        attention.eval()
    elif change == 'to':
        tensor.data.copy_(state[parameter])
        attention.double().float()
    else:
        setattr(attention, parameter, torch.nn.Parameter(state[parameter]))
    fresh = WindowAttention(16, 3, 4).eval()
    fresh.load_state_dict(state)
    after = evaluated(attention, x)
    assert torch.equal(after, evaluated(fresh, x))
    assert not torch.allclose(after, before)


def test_the_kept_bias_is_of_the_tensors_that_are_there():
    attention = fill_(WindowAttention(16, 3, 4)).eval()
    x = torch.randn(6, 10, 16)
    parameters = dict(attention.named_parameters())
    for factor in (1.0, 2.0, 3.0):  # each time freed, and allocated in the same place
        swapped = {name: value * factor if 'bias_table' in name else value for name, value in parameters.items()}
        plain = torch.func.functional_call(attention, swapped, x)
        with torch.no_grad():
            kept = torch.func.functional_call(attention, {k: v.detach().clone() for k, v in swapped.items()}, x)
        torch.testing.assert_close(kept, plain)
        del swapped, plain
    copied = copy.deepcopy(attention)
    with torch.no_grad():
        copied.relative_position_bias_table.mul_(5)
    torch.testing.assert_close(evaluated(copied, x), copied(x))


def test_the_kept_bias_is_in_no_file_and_no_trace():
    attention = fill_(WindowAttention(16, 3, 4)).eval()
    x = torch.randn(6, 10, 16)
    evaluated(attention, x)
    assert b'KeptBias' not in pickle.dumps(attention)
    assert evaluated(pickle.loads(pickle.dumps(attention)), x).equal(evaluated(attention, x))
    with torch.no_grad():
        traced = torch.jit.trace(attention, x, check_trace=False)
        attention.rel_pos_msg.mul_(3)
        torch.testing.assert_close(traced(x), attention(x))


def test_transforms_of_functions_go_through_a_block():
    block, x = wide()
    block.eval()
    parameters = dict(block.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(block, parameters, x[None]).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    loss(parameters, x[1]).backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(per_sample[name][1], parameter.grad, rtol=1e-4, atol=1e-4)
    evaluated(block, x)
    stacked, _ = torch.func.stack_module_state([block, copy.deepcopy(block)])
    with torch.no_grad():
        both = torch.func.vmap(lambda p: torch.func.functional_call(block, p, x))(stacked)
        torch.testing.assert_close(both[1], block(x))


def test_the_kept_bias_serves_both_modes_without_gradients():
    attention = fill_(WindowAttention(16, 3, 4)).eval()
    x = torch.randn(6, 10, 16)
    with torch.inference_mode():
        first = attention(x)
    torch.testing.assert_close(evaluated(attention, x), first)
    attention(x).sum().backward()  # with gradients, from the parameters
    assert attention.relative_position_bias_table.grad.abs().max() > 0
    with torch.inference_mode():
        made_in_inference = fill_(WindowAttention(16, 3, 4)).eval()
        torch.testing.assert_close(made_in_inference(x), first)
