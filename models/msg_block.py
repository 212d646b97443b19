"""A stage and its blocks: window attention, the shuffle of MSG tokens, MLP.

Letters: B images, H x W the patch grid, nH x nW the window grid, w window size, N = w^2 + 1 tokens in a window (the MSG
token first), C channels, h heads, d = C/h channels per head, s size of a shuffle region in windows.

Source: Fang et al., arXiv:2105.15168, section 3.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .layers import Mlp, NormLayer, RegionDropPath
from .pyramid import Size
from .resize import resize_bias_table
from .windows import (
    WindowPadding,
    attention_bias_index,
    join_windows,
    relative_position_index,
    shuffle_msg_tokens,
    split_windows,
    window_padding,
)


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
        use_msg_tokens: whether windows have a MSG token.
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
        # Part of published checkpoints; `bias_index` extends it to all N tokens.
        self.register_buffer('relative_position_index', relative_position_index(window_size))
        self.register_buffer('bias_index', self._make_bias_index(window_size), persistent=False)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        if use_msg_tokens:
            nn.init.trunc_normal_(self.rel_pos_msg, std=0.02)

    def _make_bias_index(self, window_size: int) -> Tensor:
        return attention_bias_index(window_size) if self.use_msg_tokens else relative_position_index(window_size)

    def set_window_size(self, window_size: int) -> None:
        """Change the window size w; the bias table is interpolated."""
        table = self.relative_position_bias_table
        resized = resize_bias_table(table.detach(), window_size)
        self.relative_position_bias_table = nn.Parameter(resized, requires_grad=table.requires_grad)
        self.relative_position_index = relative_position_index(window_size).to(table.device)
        self.bias_index = self._make_bias_index(window_size).to(table.device)

    def position_bias(self) -> Tensor:
        """Bias of every query (row) towards every key (column), (1, h, N, N)."""
        table = self.relative_position_bias_table.T  # (h, (2w - 1)^2)
        if self.use_msg_tokens:
            table = torch.cat((table, self.rel_pos_msg.flatten(1)), dim=1)
        return table.index_select(1, self.bias_index.flatten()).view(1, self.num_heads, *self.bias_index.shape)

    def forward(self, x: Tensor, msg_only: bool = False) -> Tensor:
        """Attend within windows.

        Args:
            x: tokens (..., N, C).
            msg_only: compute the MSG token's output alone: patches are keys and values, but not queries.

        Returns:
            (..., N, C), or (..., 1, C) with `msg_only`.
        """
        *windows, N, C = x.shape
        qkv = self.qkv(x).view(-1, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (windows, h, N, d)
        bias = self.position_bias()  # (1, h, N, N)
        if msg_only:
            q, bias = q[:, :, :1], bias[:, :, :1]
        if bias.requires_grad:
            # PyTorch's fused CPU kernel has no gradient for a bias, and its fallback is slower than this.
            attn = (q * self.scale) @ k.transpose(-2, -1) + bias  # (windows, h, queries, N)
            x = self.attn_drop(attn.softmax(dim=-1)) @ v
        else:
            dropout = self.attn_drop.p if self.training else 0.0
            x = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype), dropout, scale=self.scale)
        x = x.transpose(1, 2).reshape(*windows, -1, C)
        return self.proj_drop(self.proj(x))


class MSGBlock(nn.Module):
    """Attention within windows, shuffle of the MSG tokens of each region, MLP.

    Args:
        dim: channels C.
        window_size: window size w, in patches.
        region_size: size s of a shuffle region, in windows.
        num_heads: heads h.
        mlp_ratio: hidden channels of the MLP, relative to C.
        qkv_bias, qk_scale, attn_drop: see `WindowAttention`.
        drop: dropout rate after the attention's projection and in the MLP.
        drop_path: stochastic-depth rate of both branches.
        norm_layer: called with C.
        shuffle: exchange MSG tokens (`manip_type` 'shuf') or leave them ('none').
        recompute_mlp: see `Mlp`.
        use_msg_tokens: whether windows have a MSG token; without, there is nothing to shuffle.
    """

    def __init__(
        self,
        dim: int,
        window_size: int,
        region_size: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer: NormLayer = nn.LayerNorm,
        shuffle: bool = True,
        recompute_mlp: bool = False,
        use_msg_tokens: bool = True,
    ):
        super().__init__()
        self.window_size = window_size
        self.shuffle = shuffle and use_msg_tokens
        self.shuffle_size = region_size if self.shuffle else 1
        self.norm1 = norm_layer(dim)
        self.attn = WindowAttention(dim, window_size, num_heads, qkv_bias, qk_scale, attn_drop, drop, use_msg_tokens)
        self.drop_path = RegionDropPath(drop_path, region_size)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop, recompute_mlp)

    def set_windows(self, window_size: int, region_size: int) -> None:
        """Change the window size w and the region size s; see `WindowAttention.set_window_size`."""
        if window_size != self.window_size:
            self.attn.set_window_size(window_size)
        self.window_size = window_size
        self.shuffle_size = region_size if self.shuffle else 1
        self.drop_path.region_size = region_size

    def forward(self, x: Tensor, padding: WindowPadding | None = None, msg_only: bool = False) -> Tensor:
        """Transform windows.

        Args:
            x: windows (B, nH, nW, N, C).
            padding: which tokens are padding, if any: it is zero after the first norm and left out of the MLP.
            msg_only: compute the MSG tokens alone.

        Returns:
            Windows (B, nH, nW, N, C), or their MSG tokens (B, nH, nW, 1, C) with `msg_only`.
        """
        x = x[:, :, :, : 1 if msg_only else None] + self.drop_path(self._attend(x, padding, msg_only))
        if self.shuffle_size > 1:
            msg = shuffle_msg_tokens(x[:, :, :, 0], self.shuffle_size)
            x = torch.cat((msg.unsqueeze(3), x[:, :, :, 1:]), dim=3)
        return x + self.drop_path(self._transform(x, None if msg_only else padding))

    def _attend(self, x: Tensor, padding: WindowPadding | None, msg_only: bool) -> Tensor:
        x = self.norm1(x)
        if padding is not None:
            x = padding.zero(x)
        return self.attn(x, msg_only)

    def _transform(self, x: Tensor, padding: WindowPadding | None) -> Tensor:
        if padding is None:
            return self.mlp(self.norm2(x))
        return padding.restore(self.mlp(self.norm2(padding.remove(x))))

    def flops(self, grid: tuple[int, int]) -> int:
        """Multiply-adds for a patch grid (H, W), by the authors' formula: norms, attention with its linears, MLP."""
        (H, W), w = grid, self.window_size
        windows = -(-H // w) * -(-W // w)
        tokens = H * W + windows * self.attn.use_msg_tokens
        C, N = self.mlp.fc1.in_features, w**2 + self.attn.use_msg_tokens
        attention = windows * (3 * N * C**2 + 2 * N**2 * C + N * C**2)
        return 2 * C * tokens + attention + 2 * tokens * C * self.mlp.fc1.out_features


class MSGStage(nn.Module):
    """The blocks of one stage, and the merging into the next.

    Args:
        blocks: first to last.
        downsample: halves a token grid and doubles its channels; None in the last stage.
        use_checkpoint: recompute each block in the backward pass instead of keeping its activations.
    """

    def __init__(self, blocks: Sequence[MSGBlock], downsample: nn.Module | None, use_checkpoint: bool = False):
        super().__init__()
        self.window_size = blocks[0].window_size
        self.use_checkpoint = use_checkpoint
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def set_windows(self, window_size: int, region_size: int) -> None:
        """Change the window size and the region size of all blocks."""
        self.window_size = window_size
        for block in self.blocks:
            block.set_windows(window_size, region_size)

    def forward(
        self, patches: Tensor, msg: Tensor | None, msg_only: bool = False
    ) -> tuple[Tensor | None, Tensor | None]:
        """Run the blocks.

        Args:
            patches: (B, H, W, C).
            msg: MSG tokens (B, nH, nW, C), or None.
            msg_only: compute the last block's MSG tokens alone, as a classifier reads nothing else.

        Returns:
            Patches (B, H, W, C), or None with `msg_only`, and MSG tokens (B, nH, nW, C), or None.
        """
        grid = patches.shape[1:3]
        padding = window_padding(grid, self.window_size, patches.device, msg is not None)
        x = join_windows(patches, msg, self.window_size)  # (B, nH, nW, N, C)
        for i, block in enumerate(self.blocks):
            is_last = i == len(self.blocks) - 1
            if self.use_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, padding, msg_only and is_last, use_reentrant=False)
            else:
                x = block(x, padding, msg_only and is_last)
        return (None, x.squeeze(3)) if msg_only else split_windows(x, self.window_size, grid)

    def merge(self, patches: Tensor, msg: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Merge both grids into (B, ceil(H/2), ceil(W/2), 2C) and (B, ceil(nH/2), ceil(nW/2), 2C)."""
        return self.downsample(patches), None if msg is None else self.downsample(msg)

    def flops(self, grid: Size) -> int:
        """Multiply-adds for a patch grid, by the authors' formula."""
        flops = sum(block.flops(grid) for block in self.blocks)
        if self.downsample is not None:
            flops += self.downsample.flops(grid)
            if self.blocks[0].attn.use_msg_tokens:
                flops += self.downsample.flops(grid.divided_by(self.window_size))
        return flops
