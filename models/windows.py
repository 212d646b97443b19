"""Windows and their padding: pure functions on shapes.

Letters: B images, H x W the patch grid, w window size in patches, nH x nW = ceil(H/w) x ceil(W/w) the window grid (also
the grid of MSG tokens: one per window), N = w^2 + 1 tokens in a window, C channels.

Source: Fang et al., arXiv:2105.15168, section 3.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .pyramid import ceil_div
from .symbolic import (
    SymbolicPadding,
    contiguous_copy,
    crop,
    is_known_multiple,
    pad_to_multiple,
    symbolic_padding,
    with_grid,
)


def join_windows(patches: Tensor, msg: Tensor | None, window_size: int) -> Tensor:
    """Partition the patch grid into windows, each with its MSG token first; pad with zeros where windows do not tile.

    Args:
        patches: patch tokens (B, H, W, C).
        msg: MSG tokens (B, nH, nW, C); None for windows without MSG tokens.
        window_size: window size w, in patches.

    Returns:
        Windows (B, nH, nW, N, C): the MSG token, then the patches in row-major order.
    """
    B, H, W, C = patches.shape
    w = window_size
    nH, nW = ceil_div(H, w), ceil_div(W, w)
    x = pad_to_multiple(patches, w).view(B, nH, w, nW, w, C)
    x = contiguous_copy(x.transpose(2, 3)).view(B, nH, nW, w * w, C)
    if msg is None:
        return x
    return torch.cat((with_grid(msg, (nH, nW)).unsqueeze(3), x), dim=3)  # (B, nH, nW, N, C)


def split_windows(windows: Tensor, window_size: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """Merge windows into the patch grid, without padding, and the grid of MSG tokens: the inverse of `join_windows`.

    Args:
        windows: (B, nH, nW, N, C).
        window_size: window size w, in patches.
        grid: patch grid (H, W), without padding.

    Returns:
        Patch tokens (B, H, W, C), and MSG tokens (B, nH, nW, C) or None.
    """
    B, nH, nW, N, C = windows.shape
    w, (H, W) = window_size, grid
    msg, patches = split_msg_tokens(windows) if w * w < N else (None, windows)
    patches = patches.view(B, nH, nW, w, w, C).transpose(2, 3)  # (B, nH, w, nW, w, C)
    return crop(contiguous_copy(patches).view(B, nH * w, nW * w, C), (H, W)), msg


def split_msg_tokens(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Split windows (B, nH, nW, N, C) into views of MSG tokens (B, nH, nW, C) and patches (B, nH, nW, N - 1, C).

    The gradient of `split` is one concatenation; the gradient of two slices would be two zero-filled tensors, added.
    """
    msg, patches = windows.split((1, windows.shape[3] - 1), dim=3)
    return msg.squeeze(3), patches


class WindowPadding(NamedTuple):
    """Which tokens of padded windows are padding.

    Attributes:
        is_padding: (nH, nW, N, 1) boolean.
        real_index: positions of the other tokens among the nH * nW * N of an image, (L,).
    """

    is_padding: Tensor
    real_index: Tensor

    def zero(self, windows: Tensor) -> Tensor:
        """Set the padding of windows (B, nH, nW, N, C) to zero."""
        return windows.masked_fill(self.is_padding, 0.0)

    def remove(self, windows: Tensor) -> Tensor:
        """Remove the padding from windows (B, nH, nW, N, C), which leaves tokens (B, L, C)."""
        return windows.flatten(1, 3).index_select(1, self.real_index)

    def restore(self, tokens: Tensor) -> Tensor:
        """Undo `remove`: tokens (B, L, C) to windows (B, nH, nW, N, C), with zeros for padding."""
        nH, nW, N, _ = self.is_padding.shape
        B, _, C = tokens.shape
        windows = tokens.new_zeros(B, nH * nW * N, C).index_copy(1, self.real_index, tokens)
        return windows.view(B, nH, nW, N, C)


def window_padding(
    grid: tuple[int, int], window_size: int, device: torch.device, use_msg_tokens: bool = True
) -> WindowPadding | SymbolicPadding | None:
    """Find the padding that `join_windows` adds to a patch grid (H, W); None where windows tile the grid.

    Args:
        grid: patch grid (H, W), without padding.
        window_size: window size w, in patches.
        device: device of the returned tensors.
        use_msg_tokens: whether windows have an MSG token.
    """
    (H, W), w = grid, window_size
    if is_known_multiple(grid, w):
        return None
    nH, nW = ceil_div(H, w), ceil_div(W, w)
    is_below, is_right = torch.arange(nH * w, device=device) >= H, torch.arange(nW * w, device=device) >= W
    is_padding = is_below.view(nH, 1, w, 1) | is_right.view(nW, 1, w)  # (nH, nW, w, w)
    is_padding = F.pad(is_padding.view(nH, nW, w * w), (int(use_msg_tokens), 0)).unsqueeze(3)  # False for MSG tokens
    return symbolic_padding(grid, is_padding) or WindowPadding(is_padding, _real_index(grid, w, device, use_msg_tokens))


def _real_index(grid: tuple[int, int], window_size: int, device: torch.device, use_msg_tokens: bool) -> Tensor:
    """Positions of MSG tokens, then of patches, among the nH * nW * N tokens of an image's padded windows, (L,)."""
    (H, W), w = grid, window_size
    nH, nW, N = ceil_div(H, w), ceil_div(W, w), w * w + use_msg_tokens
    rows, columns = torch.arange(H, device=device)[:, None], torch.arange(W, device=device)
    window = rows // w * nW + columns // w  # (H, W)
    token = use_msg_tokens + rows % w * w + columns % w  # (H, W)
    real_index = (window * N + token).flatten()
    if use_msg_tokens:
        real_index = torch.cat((torch.arange(nH * nW, device=device) * N, real_index))
    return real_index


def relative_position_index(window_size: int) -> Tensor:
    """Row of the relative position bias table for each pair of patches in a window.

    Args:
        window_size: window size w, in patches.

    Returns:
        (w^2, w^2) int64: entry (i, j) is (dr + w - 1)(2w - 1) + dc + w - 1, where (dr, dc) is the position of query i
        minus that of key j (Liu et al., Swin Transformer, arXiv:2103.14030).
    """
    w = window_size
    position = torch.cartesian_prod(torch.arange(w), torch.arange(w))  # (w*w, 2): row, column
    offset = position[:, None] - position[None, :] + (w - 1)  # (w*w, w*w, 2), all >= 0
    return offset[..., 0] * (2 * w - 1) + offset[..., 1]


def add_msg_token(index: Tensor, rows: int) -> Tensor:
    """Extend `relative_position_index` by the MSG token, whose two entries follow those of the bias table.

    Args:
        index: (w^2, w^2) int64, for two patches.
        rows: rows of the bias table, (2w - 1)^2.

    Returns:
        (N, N) int64: `index` for two patches, `rows` for a patch attending to the MSG token, and `rows` + 1 for the MSG
        token attending to any token.
    """
    return F.pad(F.pad(index, (1, 0), value=rows), (0, 0, 1, 0), value=rows + 1)
