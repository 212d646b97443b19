import copy
import pickle

import numpy as np
import pytest
import torch

from models.attention import WindowAttention
from models.msg_block import MSGBlock
from models.windows import WindowPadding, join_windows, split_windows, window_padding
from tests.helpers import numpy_block
from tests.helpers.golden import fill_, normal


def small_block(**options):
    """A block of windows of 3 x 3 patches in regions of 2 x 2, and 4 x 2 windows of two images."""
    arguments = {'dim': 16, 'window_size': 3, 'shuffle_size': 2, 'num_heads': 2}
    return fill_(MSGBlock(**arguments | options)), torch.randn(2, 4, 2, 10, 16)


@pytest.mark.parametrize('grad', [True, False], ids=['plain', 'fused'])
def test_block_equals_the_numpy_version(grad):
    block, x = small_block()
    weights = {name: value.double().numpy() for name, value in block.state_dict().items()}
    expected = np.stack([numpy_block.block(image.double().numpy(), weights, w=3, s=2, heads=2) for image in x])
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


def test_dropout_and_drop_path_act_everywhere():
    block, x = small_block(drop=0.25, attn_drop=0.5, drop_path=0.75)
    block.train()
    calls = []
    for module in (block.attn.proj_drop, block.mlp.drop, block.drop_path):
        module.register_forward_hook(lambda module, inputs, out: calls.append((module, tuple(out.shape))))
    block(x)
    assert calls == [
        (block.attn.proj_drop, (2, 4, 2, 10, 16)),
        (block.drop_path, (2, 4, 2, 10, 16)),
        (block.mlp.drop, (2, 4, 2, 10, 64)),
        (block.mlp.drop, (2, 4, 2, 10, 16)),
        (block.drop_path, (2, 4, 2, 10, 16)),
    ]
    assert (block.attn.attn_drop.p, block.attn.proj_drop.p, block.mlp.drop.p) == (0.5, 0.25, 0.25)
    assert (block.drop_path.rate, block.drop_path.shuffle_size) == (0.75, 2)


def test_flops_count_the_layers_of_a_block():
    norms, windows, tokens, N, C = 2 * 8 * 200, 4, 200, 50, 8
    attention = windows * (3 * N * C * C + 2 * N * N * C + N * C * C)
    assert MSGBlock(C, 7, 2, 2, mlp_ratio=3.0).flops((14, 14)) == norms + attention + 2 * tokens * C * 3 * C


@pytest.mark.parametrize('grad', [True, False], ids=['plain', 'fused'])
@pytest.mark.parametrize('grid', [(12, 6), (10, 5)])
def test_msg_only_computes_the_msg_tokens_of_the_whole_block(grad, grid):
    block, x = small_block(drop_path=0.5)
    padding = window_padding(grid, 3, x.device)
    with torch.set_grad_enabled(grad):
        for training in (True, False):
            block.train(training)
            torch.manual_seed(1)
            whole = block(x, padding)
            torch.manual_seed(1)
            msg = block(x, padding, msg_only=True)
            assert msg.shape == (2, 4, 2, 1, 16)
            torch.testing.assert_close(msg, whole[:, :, :, :1])


def test_padding_is_added_after_the_first_norm_and_removed_before_the_mlp():
    """Against the steps of the specification, one window at a time."""
    block = fill_(MSGBlock(16, 7, 2, 2)).eval()
    patches, msg = normal('patches', (1, 10, 15, 16)), normal('msg', (1, 2, 3, 16))
    windows = block(join_windows(patches, msg, 7), window_padding((10, 15), 7, patches.device))
    measured = split_windows(windows, 7, (10, 15))

    grid = torch.zeros(1, 14, 21, 16)
    grid[:, :10, :15] = block.norm1(patches)
    patch_update, msg_update = torch.zeros_like(grid), torch.zeros_like(msg)
    for row in range(2):
        for column in range(3):
            square = (slice(None), slice(7 * row, 7 * row + 7), slice(7 * column, 7 * column + 7))
            window = torch.cat((block.norm1(msg)[:, row, column, None], grid[square].flatten(1, 2)), dim=1)
            x = block.attn(window)  # (1, N, C)
            msg_update[:, row, column], patch_update[square] = x[:, 0], x[:, 1:].view(1, 7, 7, 16)
    patches, msg = patches + patch_update[:, :10, :15], block.exchange(msg + msg_update)
    expected = patches + block.mlp(block.norm2(patches)), msg + block.mlp(block.norm2(msg))
    torch.testing.assert_close(measured, expected, rtol=1e-4, atol=1e-5)


def test_content_of_padding_is_ignored():
    block = fill_(MSGBlock(16, 7, 2, 2)).eval()
    x = join_windows(normal('patches', (1, 10, 15, 16)), normal('msg', (1, 2, 3, 16)), 7)
    padding = window_padding((10, 15), 7, x.device)
    other = torch.where(padding.is_padding, torch.full_like(x, 9.0), x)
    torch.testing.assert_close(padding.remove(block(other, padding)), padding.remove(block(x, padding)))


@pytest.mark.parametrize('rate', [0.0, 0.5])
def test_padding_of_no_token_changes_no_bit(rate):
    block = fill_(MSGBlock(dim=8, window_size=3, shuffle_size=2, num_heads=2, drop_path=rate)).train()
    x = normal('windows', (2, 2, 2, 10, 8))
    is_padding = torch.zeros(2, 2, 10, 1, dtype=torch.bool)
    outputs = []
    for padding in (None, WindowPadding(is_padding, torch.arange(40))):
        torch.manual_seed(5)
        outputs.append(block(x, padding))
    assert torch.equal(*outputs)
    assert window_padding((6, 6), 3, x.device) is None


def test_position_bias_is_one_lookup_of_both_tables():
    attention = fill_(WindowAttention(16, 3, 4))
    bias = attention.position_bias()
    assert bias.shape == (1, 4, 10, 10)
    table, to_msg, from_msg = attention.relative_position_bias_table, *attention.rel_pos_msg.flatten(1).T
    assert torch.equal(bias[0, :, 1:, 1:], table[attention.relative_position_index].permute(2, 0, 1))
    assert torch.equal(bias[0, :, 1:, 0], to_msg[:, None].expand(-1, 9))
    assert torch.equal(bias[0, :, 0], from_msg[:, None].expand(-1, 10))


@pytest.mark.parametrize('parameter', ['relative_position_bias_table', 'rel_pos_msg'])
@pytest.mark.parametrize('change', ['step', 'load', 'assign', 'data', 'swap'])
def test_attention_uses_the_current_parameters(change, parameter):
    attention = fill_(WindowAttention(16, 3, 4)).eval()
    x = torch.randn(6, 10, 16)
    with torch.inference_mode():
        before = attention(x)
    state = {k: v.clone() for k, v in attention.state_dict().items()}
    state[parameter][:] = state[parameter].flip(0) * 3
    tensor = getattr(attention, parameter)
    if change == 'step':
        attention(x).square().sum().backward()
        torch.optim.AdamW([tensor], lr=1.0, fused=True).step()
        state[parameter] = tensor.detach().clone()
    elif change in ('load', 'assign'):
        attention.load_state_dict(state, assign=change == 'assign')
    elif change == 'data':  # unseen by autograd
        tensor.data.copy_(state[parameter])
    else:
        setattr(attention, parameter, torch.nn.Parameter(state[parameter]))
    fresh = WindowAttention(16, 3, 4).eval()
    fresh.load_state_dict(state)
    with torch.inference_mode():
        after = attention(x)
        assert torch.equal(after, fresh(x))
    assert not torch.allclose(after, before)


def test_block_supports_torch_func_and_pickling():
    block, x = small_block()
    block.eval()
    parameters = dict(block.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(block, parameters, x[None]).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    loss(parameters, x[1]).backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(per_sample[name][1], parameter.grad, rtol=1e-4, atol=1e-4)
    stacked, _ = torch.func.stack_module_state([block, copy.deepcopy(block)])
    with torch.no_grad():
        expected = block(x)
        both = torch.func.vmap(lambda p: torch.func.functional_call(block, p, x))(stacked)
        torch.testing.assert_close(both[1], expected)
        torch.testing.assert_close(pickle.loads(pickle.dumps(block))(x), expected)
