"""Multi-head self-attention within windows, with the fastest implementation for the device and precision.

Letters: N = w^2 + 1 tokens in a window of w x w patches (the MSG token first), C channels, h heads of d = C/h channels.

Source: Fang et al., arXiv:2105.15168, section 3.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .linear import apply_linear
from .resize import resize_bias_table
from .windows import add_msg_token, relative_position_index

try:
    from .attention_kernel import MAX_HEAD_CHANNELS, MAX_TOKENS, window_attention
except ImportError:  # no Triton on this system
    MAX_HEAD_CHANNELS = MAX_TOKENS = 0

# With more windows, the gradient of the bias fails in PyTorch's GPU kernel.
MAX_SDPA_WINDOWS = 65_535


def attend(qkv: Tensor, bias: Tensor, scale: float, dropout: float = 0.0, msg_only: bool = False) -> Tensor:
    """Compute attention, softmax(scale q k^T + bias) v, in each window and head.

    Args:
        qkv: queries, keys and values (windows, N, 3C), each of h heads of d channels.
        bias: position bias (1, h, N, N) of every query (row) towards every key (column).
        scale: factor on q.k.
        dropout: dropout rate after the softmax.
        msg_only: compute the outputs of the MSG tokens only.

    Returns:
        (windows, N, C), or (windows, 1, C) with `msg_only`.
    """
    path = choose_path(qkv, bias, dropout, msg_only)
    num_heads = bias.shape[1]
    if path == 'kernel':
        return window_attention(qkv, bias.squeeze(0).float(), scale, num_heads)
    windows, N, channels = qkv.shape
    q, k, v = qkv.view(windows, N, 3, num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)  # each (windows, h, N, d)
    if msg_only:
        q, bias = q[:, :, :1], bias[:, :, :1]
    if path == 'matmuls':
        attn = (q * scale) @ k.transpose(-2, -1) + bias  # (windows, h, queries, N)
        x = F.dropout(attn.softmax(dim=-1), dropout, training=dropout > 0).to(v.dtype) @ v
    else:
        with gpu_backends() if q.is_cuda else nullcontext():
            x = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype), dropout, scale=scale)
    return x.transpose(1, 2).reshape(windows, -1, channels // 3)


def choose_path(qkv: Tensor, bias: Tensor, dropout: float, msg_only: bool) -> str:
    """Choose the fastest implementation for a call of `attend`: 'kernel', 'sdpa' or 'matmuls'.

    The measurements behind the choice are in docs/performance_tables.md.
    """
    if qkv.is_cuda and qkv.dtype != torch.float32:
        if not dropout and not msg_only and fits_kernel(qkv, bias):
            return 'kernel'
        if not msg_only and qkv.shape[0] <= MAX_SDPA_WINDOWS:
            return 'sdpa'
    # PyTorch's fused CPU kernel is slower than matmuls in bfloat16, and has no gradient for a bias.
    if qkv.is_cpu and qkv.dtype == torch.bfloat16:
        return 'matmuls'
    return 'matmuls' if bias.requires_grad and torch.is_grad_enabled() else 'sdpa'


def fits_kernel(qkv: Tensor, bias: Tensor) -> bool:
    """Whether a window's tokens and a head's channels fit into the Triton kernel."""
    _, num_heads, N, _ = bias.shape
    return N <= MAX_TOKENS and qkv.shape[-1] // 3 // num_heads <= MAX_HEAD_CHANNELS


def gpu_backends() -> AbstractContextManager:
    """Context in which `scaled_dot_product_attention` does not use cuDNN.

    cuDNN's kernel refuses more than 65,535 windows, and its results with a bias are wrong where N % 128 is 64
    (https://github.com/pytorch/pytorch/issues/196678).
    """
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


class WindowAttention(nn.Module):
    """Multi-head self-attention among the N tokens of each window, with a learned position bias.

    Args:
        dim: channels C.
        window_size: window size w, in patches.
        num_heads: heads h; must divide `dim`.
        qkv_bias: add a learned bias to query, key and value.
        qk_scale: factor on q.k; None for d^-0.5.
        attn_drop: dropout rate after the softmax.
        proj_drop: dropout rate after the output projection.
        use_msg_tokens: whether windows have an MSG token.
    """

    def __init__(
        self,
        dim: int,
        window_size: int,
        num_heads: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        use_msg_tokens: bool = True,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window_size - 1) ** 2, num_heads))
        self.use_msg_tokens = use_msg_tokens
        if use_msg_tokens:  # [:, 0]: from a patch to the MSG token; [:, 1]: from the MSG token to any token.
            self.rel_pos_msg = nn.Parameter(torch.empty(num_heads, 2, 1, 1))
        # Persistent: published checkpoints contain it, and otherwise it would be undefined after `to_empty`.
        self.register_buffer('relative_position_index', relative_position_index(window_size))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        if use_msg_tokens:
            nn.init.trunc_normal_(self.rel_pos_msg, std=0.02)

    def set_window_size(self, window_size: int) -> None:
        """Change the window size w, and interpolate the bias table."""
        table = self.relative_position_bias_table
        resized = resize_bias_table(table.detach(), window_size)
        self.relative_position_bias_table = nn.Parameter(resized, requires_grad=table.requires_grad)
        self.relative_position_index = relative_position_index(window_size).to(table.device)

    def position_bias(self) -> Tensor:
        """Look up the position bias (1, h, N, N) of every query (row) towards every key (column)."""
        table, index = self.relative_position_bias_table.T, self.relative_position_index  # (h, (2w - 1)^2), (w^2, w^2)
        if self.use_msg_tokens:
            index = add_msg_token(index, table.shape[1])  # (N, N)
            table = torch.cat((table, self.rel_pos_msg.flatten(1)), dim=1)
        return table.index_select(1, index.flatten()).view(1, self.num_heads, *index.shape)

    def forward(self, x: Tensor, msg_only: bool = False) -> Tensor:
        """Attend within windows.

        Args:
            x: tokens (..., N, C).
            msg_only: compute only the MSG token's output: patches are keys and values, but not queries.

        Returns:
            (..., N, C), or (..., 1, C) with `msg_only`.
        """
        *windows, N, C = x.shape
        qkv = apply_linear(self.qkv, x).view(-1, N, 3 * C)
        dropout = self.attn_drop.p if self.training else 0.0
        x = attend(qkv, self.position_bias(), self.scale, dropout, msg_only)
        return self.proj_drop(apply_linear(self.proj, x.view(*windows, -1, C)))
