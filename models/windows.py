"""Windows and shuffle regions: pure functions on shapes.

Letters: B images, H x W the patch grid, w window side, nH x nW = H/w x W/w the window grid (also the
grid of MSG tokens: one a window), s side of a shuffle region in windows, G = s^2 windows in a region,
N = w^2 + 1 tokens in a window, C channels.

Source: Fang et al., arXiv:2105.15168, section 3.
"""

import torch
from torch import Tensor


def join_windows(patches: Tensor, msg: Tensor) -> Tensor:
    """Cut the patch grid into windows and put each window's MSG token in front of its patches.

    Args:
        patches: patch tokens (B, H, W, C), with H and W multiples of the window grid.
        msg: MSG tokens (B, nH, nW, C).

    Returns:
        Windows (B, nH, nW, N, C): token 0 is the MSG token, then the patches row by row.
    """
    B, H, W, C = patches.shape
    nH, nW = msg.shape[1:3]
    x = patches.view(B, nH, H // nH, nW, W // nW, C)  # (B, nH, w, nW, w, C)
    x = x.transpose(2, 3).reshape(B, nH, nW, -1, C)  # (B, nH, nW, w*w, C)
    return torch.cat((msg.unsqueeze(3), x), dim=3)  # (B, nH, nW, N, C)


def split_windows(windows: Tensor, window_size: int) -> tuple[Tensor, Tensor]:
    """Undo `join_windows`.

    Args:
        windows: (B, nH, nW, N, C) with N = window_size^2 + 1.
        window_size: side w of a window, in patches.

    Returns:
        The patch grid (B, nH*w, nW*w, C) and the MSG tokens (B, nH, nW, C).
    """
    B, nH, nW, _, C = windows.shape
    w = window_size
    x = windows[:, :, :, 1:].view(B, nH, nW, w, w, C)  # (B, nH, nW, w, w, C)
    patches = x.transpose(2, 3).reshape(B, nH * w, nW * w, C)  # (B, H, W, C)
    return patches, windows[:, :, :, 0]


def shuffle_msg_tokens(msg: Tensor, region_size: int) -> Tensor:
    """Exchange channel chunks among the MSG tokens of each shuffle region.

    Every token of a region is cut into G chunks of C/G channels; new token g is chunk g of token 0,
    chunk g of token 1, and so on: a G x G transpose of chunks, which is its own inverse.

    Args:
        msg: MSG tokens (B, nH, nW, C); nH and nW are multiples of `region_size`, C of its square.
        region_size: side s of a region, in windows; 1 leaves the tokens as they are.

    Returns:
        Shuffled MSG tokens (B, nH, nW, C).
    """
    if region_size == 1:
        return msg
    B, nH, nW, C = msg.shape
    s, G = region_size, region_size**2
    x = msg.view(B, nH // s, s, nW // s, s, C).transpose(2, 3)  # (B, nH/s, nW/s, s, s, C)
    x = x.reshape(B, nH // s, nW // s, G, G, C // G)  # (.., token, chunk, C/G)
    x = x.transpose(3, 4).reshape(B, nH // s, nW // s, s, s, C)
    return x.transpose(2, 3).reshape(B, nH, nW, C)


def relative_position_index(window_size: int) -> Tensor:
    """Row of the bias table that each pair of patches of a window reads.

    Args:
        window_size: side w of a window, in patches.

    Returns:
        (w^2, w^2) int64: entry (i, j) is (dr + w - 1)(2w - 1) + dc + w - 1, where (dr, dc) is the position
        of query i minus that of key j (Liu et al., Swin Transformer, arXiv:2103.14030).
    """
    w = window_size
    position = torch.cartesian_prod(torch.arange(w), torch.arange(w))  # (w*w, 2): row, column
    offset = position[:, None] - position[None, :] + (w - 1)  # (w*w, w*w, 2), all >= 0
    return offset[..., 0] * (2 * w - 1) + offset[..., 1]
