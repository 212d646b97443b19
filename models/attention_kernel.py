"""Window attention in one Triton kernel forward and one backward, which never write a window's scores to memory.

Plain matmuls write and read the (windows, h, N, N) scores several times, and `scaled_dot_product_attention` writes the
gradient of every window's bias. Here, a program keeps one head's bias, loops over several windows, and sums the
gradient of the bias over these windows in registers. The backward pass recomputes the probabilities.

Letters: N tokens in a window, C channels, h heads, d = C/h channels per head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# A tile of tokens x tokens must fit into registers. MAX_PROGRAMS fill the largest GPUs several times over.
MAX_TOKENS, MAX_HEAD_CHANNELS = 64, 64
MAX_PROGRAMS = 2048


@triton.jit
def _tile(pointer, tokens, channels, row_stride, mask):
    return tl.load(pointer + tokens[:, None] * row_stride + channels[None, :], mask=mask, other=0.0)


@triton.jit
def _load_bias(pointer, tokens, N):
    """One head's bias, with -inf in the columns beyond N."""
    rows, columns = tokens[:, None], tokens[None, :]
    bias = tl.load(pointer + rows * N + columns, mask=(rows < N) & (columns < N), other=0.0)
    return tl.where(columns < N, bias.to(tl.float32), float('-inf'))


@triton.jit
def _probabilities(q, k, bias, scale):
    scores = tl.dot(q, tl.trans(k), input_precision='ieee') * scale + bias
    weights = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    return weights / tl.sum(weights, axis=1)[:, None]


@triton.jit
def _forward_kernel(
    qkv, bias, out, scale, windows, N,
    WINDOWS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    program, head = tl.program_id(0), tl.program_id(1)
    tokens, channels = tl.arange(0, TOKENS), tl.arange(0, CHANNELS)
    inside = (tokens[:, None] < N) & (channels[None, :] < D)
    C = HEADS * D
    tile_bias = _load_bias(bias + head * N * N, tokens, N)
    for number in range(WINDOWS):
        window = program * WINDOWS + number
        mask = inside & (window < windows)
        q_pointer = qkv + tl.cast(window, tl.int64) * (N * 3 * C) + head * D
        q = _tile(q_pointer, tokens, channels, 3 * C, mask)
        k = _tile(q_pointer + C, tokens, channels, 3 * C, mask)
        v = _tile(q_pointer + 2 * C, tokens, channels, 3 * C, mask)
        p = _probabilities(q, k, tile_bias, scale)
        values = tl.dot(p.to(v.dtype), v, input_precision='ieee')
        out_pointer = out + tl.cast(window, tl.int64) * (N * C) + head * D
        tl.store(out_pointer + tokens[:, None] * C + channels[None, :], values.to(v.dtype), mask=mask)


@triton.jit
def _backward_kernel(
    qkv, bias, out_grad, qkv_grad, bias_grad, scale, windows, N,
    WINDOWS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    program, head = tl.program_id(0), tl.program_id(1)
    tokens, channels = tl.arange(0, TOKENS), tl.arange(0, CHANNELS)
    inside = (tokens[:, None] < N) & (channels[None, :] < D)
    C = HEADS * D
    tile_bias = _load_bias(bias + head * N * N, tokens, N)
    tile_bias_grad = tl.zeros((TOKENS, TOKENS), tl.float32)
    for number in range(WINDOWS):
        window = program * WINDOWS + number
        mask = inside & (window < windows)
        offset = tl.cast(window, tl.int64) * (N * 3 * C) + head * D
        q = _tile(qkv + offset, tokens, channels, 3 * C, mask)
        k = _tile(qkv + offset + C, tokens, channels, 3 * C, mask)
        v = _tile(qkv + offset + 2 * C, tokens, channels, 3 * C, mask)
        out_offset = tl.cast(window, tl.int64) * (N * C) + head * D
        grad = _tile(out_grad + out_offset, tokens, channels, C, mask)
        p = _probabilities(q, k, tile_bias, scale)
        v_grad = tl.dot(tl.trans(p.to(grad.dtype)), grad, input_precision='ieee')
        p_grad = tl.dot(grad, tl.trans(v), input_precision='ieee')
        score_grad = p * (p_grad - tl.sum(p * p_grad, axis=1)[:, None])
        tile_bias_grad += score_grad
        score_grad = (score_grad * scale).to(q.dtype)
        q_grad = tl.dot(score_grad, k, input_precision='ieee')
        k_grad = tl.dot(tl.trans(score_grad), q, input_precision='ieee')
        grad_pointer = qkv_grad + offset + tokens[:, None] * (3 * C) + channels[None, :]
        tl.store(grad_pointer, q_grad.to(q.dtype), mask=mask)
        tl.store(grad_pointer + C, k_grad.to(q.dtype), mask=mask)
        tl.store(grad_pointer + 2 * C, v_grad.to(q.dtype), mask=mask)
    rows, columns = tokens[:, None], tokens[None, :]
    bias_grad_pointer = bias_grad + (program * HEADS + head) * N * N
    tl.store(bias_grad_pointer + rows * N + columns, tile_bias_grad, mask=(rows < N) & (columns < N))


# Each copy of the package in a process needs its own namespace: with two operators of one name, the first may crash.
_NAMESPACE = __name__.replace('.', '_')


def _launch(qkv: Tensor, num_heads: int) -> tuple[int, dict[str, int]]:
    """Choose the programs per head and the kernels' sizes: few distinct sizes, since each set is compiled."""
    windows, N, channels = qkv.shape
    d = channels // 3 // num_heads
    windows_per_program = triton.next_power_of_2(triton.cdiv(windows * num_heads, MAX_PROGRAMS))
    sizes = {
        'windows': windows,
        'N': N,
        'WINDOWS': windows_per_program,
        'HEADS': num_heads,
        'D': d,
        'TOKENS': max(16, triton.next_power_of_2(N)),
        'CHANNELS': max(16, triton.next_power_of_2(d)),
    }
    return triton.cdiv(windows, windows_per_program), sizes


@torch.library.custom_op(f'{_NAMESPACE}::window_attention', mutates_args=())
def window_attention(qkv: Tensor, bias: Tensor, scale: float, num_heads: int) -> Tensor:
    """Compute attention, softmax(scale q k^T + bias) v, in each window and head.

    Args:
        qkv: queries, keys and values (windows, N, 3C), contiguous, in half precision.
        bias: position bias (h, N, N), float32.
        scale: factor on q.k.
        num_heads: heads h.

    Returns:
        (windows, N, C).
    """
    windows, N, channels = qkv.shape
    out = qkv.new_empty(windows, N, channels // 3)
    programs, sizes = _launch(qkv, num_heads)
    _forward_kernel[programs, num_heads](qkv, bias, out, scale, **sizes)
    return out


@window_attention.register_fake
def _(qkv: Tensor, bias: Tensor, scale: float, num_heads: int) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3)


@torch.library.custom_op(f'{_NAMESPACE}::window_attention_backward', mutates_args=())
def window_attention_backward(
    out_grad: Tensor, qkv: Tensor, bias: Tensor, scale: float, num_heads: int
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of `window_attention` with respect to `qkv` and `bias`."""
    programs, sizes = _launch(qkv, num_heads)
    qkv_grad = torch.empty_like(qkv)
    bias_grads = bias.new_empty(programs, *bias.shape)  # summed in a fixed order
    _backward_kernel[programs, num_heads](qkv, bias, out_grad, qkv_grad, bias_grads, scale, **sizes)
    return qkv_grad, bias_grads.sum(0)


@window_attention_backward.register_fake
def _(out_grad: Tensor, qkv: Tensor, bias: Tensor, scale: float, num_heads: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(qkv), torch.empty_like(bias)


def _setup_context(ctx, inputs, output) -> None:
    qkv, bias, ctx.scale, ctx.num_heads = inputs
    ctx.save_for_backward(qkv, bias)


def _backward(ctx, out_grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    qkv, bias = ctx.saved_tensors
    return *window_attention_backward(out_grad.contiguous(), qkv, bias, ctx.scale, ctx.num_heads), None, None


window_attention.register_autograd(_backward, setup_context=_setup_context)
