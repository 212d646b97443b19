"""A stage and its blocks: window attention, the exchange of MSG tokens, MLP.

Letters: B images, H x W the patch grid, nH x nW the window grid, w window size, N = w^2 + 1 tokens in a window (the MSG
token first), C channels, h heads, d = C/h channels per head, s size of a shuffle region in windows.

Source: Fang et al., arXiv:2105.15168, section 3.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import WindowAttention
from .exchange import Exchange, NoExchange, Shuffle
from .layers import Mlp, NormLayer, RegionDropPath
from .pyramid import Size, ceil_div
from .windows import (
    WindowPadding,
    join_windows,
    split_msg_tokens,
    split_windows,
    window_padding,
)


class MSGBlock(nn.Module):
    """Attention within windows, exchange of MSG tokens, MLP.

    Args:
        dim: channels C.
        window_size: window size w, in patches.
        shuffle_size: size s of a shuffle region, in windows.
        num_heads: heads h.
        mlp_ratio: hidden channels of the MLP, relative to C.
        qkv_bias, qk_scale, attn_drop: see `WindowAttention`.
        drop: dropout rate after the attention's projection and in the MLP.
        drop_path: stochastic-depth rate of both branches.
        norm_layer: called with C.
        exchange: class of the exchange of MSG tokens.
        recompute_mlp: see `Mlp`.
        use_msg_tokens: whether windows have an MSG token; without MSG tokens, there is nothing to exchange.
    """

    def __init__(
        self,
        dim: int,
        window_size: int,
        shuffle_size: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer: NormLayer = nn.LayerNorm,
        exchange: type[Exchange] = Shuffle,
        recompute_mlp: bool = False,
        use_msg_tokens: bool = True,
    ):
        super().__init__()
        self.window_size = window_size
        self.norm1 = norm_layer(dim)
        self.attn = WindowAttention(dim, window_size, num_heads, qkv_bias, qk_scale, attn_drop, drop, use_msg_tokens)
        self.exchange = (exchange if use_msg_tokens else NoExchange)(dim, shuffle_size)
        self.drop_path = RegionDropPath(drop_path, shuffle_size)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop, recompute_mlp)

    @property
    def shuffle_size(self) -> int:
        """The size s of a region of the exchange, in windows."""
        return self.exchange.region_size

    def set_windows(self, window_size: int, shuffle_size: int) -> None:
        """Change the window size w and the size s of a shuffle region; see `WindowAttention.set_window_size`."""
        if window_size != self.window_size:
            self.attn.set_window_size(window_size)
        self.window_size = window_size
        self.exchange.region_size = shuffle_size
        self.drop_path.shuffle_size = shuffle_size

    def forward(self, x: Tensor, padding: WindowPadding | None = None, msg_only: bool = False) -> Tensor:
        """Run attention, exchange and MLP.

        Args:
            x: windows (B, nH, nW, N, C).
            padding: which tokens are padding, if any: they are zero after the first norm, and skip the MLP.
            msg_only: compute only the MSG tokens.

        Returns:
            Windows (B, nH, nW, N, C), or their MSG tokens (B, nH, nW, 1, C) with `msg_only`.
        """
        x = (x[:, :, :, :1] if msg_only else x) + self.drop_path(self._attend(x, padding, msg_only))
        x = self._exchange(x)
        return x + self.drop_path(self._transform(x, None if msg_only else padding))

    def _attend(self, x: Tensor, padding: WindowPadding | None, msg_only: bool) -> Tensor:
        x = self.norm1(x)
        if padding is not None:
            x = padding.zero(x)
        return self.attn(x, msg_only)

    def _exchange(self, x: Tensor) -> Tensor:
        msg, patches = split_msg_tokens(x)
        exchanged = self.exchange(msg)
        return x if exchanged is msg else torch.cat((exchanged.unsqueeze(3), patches), dim=3)

    def _transform(self, x: Tensor, padding: WindowPadding | None) -> Tensor:
        if padding is None:
            return self.mlp(self.norm2(x))
        return padding.restore(self.mlp(self.norm2(padding.remove(x))))

    def flops(self, grid: tuple[int, int]) -> int:
        """Multiply-adds for a patch grid (H, W), by the authors' formula: norms, attention with its linears, MLP.

        Those of an exchange are added; the published one has none.
        """
        (H, W), w = grid, self.window_size
        nH, nW = ceil_div(H, w), ceil_div(W, w)
        windows = nH * nW
        tokens = H * W + windows * self.attn.use_msg_tokens
        C, N = self.mlp.fc1.in_features, w**2 + self.attn.use_msg_tokens
        attention = windows * (3 * N * C**2 + 2 * N**2 * C + N * C**2)
        mlp = 2 * tokens * C * self.mlp.fc1.out_features
        return 2 * C * tokens + attention + self.exchange.flops((nH, nW)) + mlp


class MSGStage(nn.Module):
    """The blocks of one stage, and the merging into the next.

    Args:
        blocks: first to last.
        downsample: halves a token grid and doubles its channels; None in the last stage.
        use_checkpoint: recompute each block in the backward pass instead of keeping its activations.
    """

    def __init__(self, blocks: Sequence[MSGBlock], downsample: nn.Module | None, use_checkpoint: bool = False):
        super().__init__()
        self.window_size, self.shuffle_size = blocks[0].window_size, blocks[0].shuffle_size
        self.use_checkpoint = use_checkpoint
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def set_windows(self, window_size: int, shuffle_size: int) -> None:
        """Change the window size and the size of a shuffle region in all blocks."""
        self.window_size, self.shuffle_size = window_size, shuffle_size
        for block in self.blocks:
            block.set_windows(window_size, shuffle_size)

    def forward(
        self, patches: Tensor, msg: Tensor | None, msg_only: bool = False
    ) -> tuple[Tensor | None, Tensor | None]:
        """Run the blocks.

        Args:
            patches: (B, H, W, C).
            msg: MSG tokens (B, nH, nW, C), or None.
            msg_only: compute only the MSG tokens in the last block: all that a classifier on MSG tokens reads.

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
        """Merge patches into (B, ceil(H/2), ceil(W/2), 2C) and MSG tokens into (B, ceil(nH/2), ceil(nW/2), 2C)."""
        return self.downsample(patches), None if msg is None else self.downsample(msg)

    def flops(self, grid: Size) -> int:
        """Multiply-adds for a patch grid, by the authors' formula."""
        flops = sum(block.flops(grid) for block in self.blocks)
        if self.downsample is not None:
            flops += self.downsample.flops(grid)
            if self.blocks[0].attn.use_msg_tokens:
                flops += self.downsample.flops(grid.divided_by(self.window_size))
        return flops
