"""Padding, cropping and copying where sizes may be symbolic, as in `torch.export` and `torch.compile(dynamic=True)`.

Both trace one graph for all batch sizes and, on request, for all image sizes. Such a size is a `torch.SymInt`, and the
graph must not branch on it. So a symbolic grid is always padded, if only by nothing, and its
padding is always masked: the result is the same, and takes longer. With sizes that are plain integers, each function
computes just what the network needs. No other module of the network distinguishes the two cases.

Letters: B images, H x W a token grid, nH x nW the window grid, N tokens in a window, C channels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value

from .pyramid import ceil_div


def is_symbolic(*sizes: int) -> bool:
    """Whether one of these sizes is symbolic: left dynamic by `torch.export` or `torch.compile`."""
    return not all(has_static_value(size) for size in sizes)


def is_known_multiple(sizes: Sequence[int], divisor: int) -> bool:
    """Whether all sizes are multiples of `divisor`; False if one is symbolic."""
    return not is_symbolic(*sizes) and all(size % divisor == 0 for size in sizes)


def is_known_equal(sizes: Sequence[int], others: Sequence[int]) -> bool:
    """Whether sizes are equal; False if one is symbolic."""
    return not is_symbolic(*sizes, *others) and tuple(sizes) == tuple(others)


def padding_to_multiple(size: int, multiple: int) -> int:
    """Padding that extends a size to the next multiple.

    `-size % multiple` is the same number, but `torch.export` cannot prove that a size padded so is a multiple.
    """
    return ceil_div(size, multiple) * multiple - size


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pad a token grid (B, H, W, C) with zeros, right and bottom, to multiples of `multiple`."""
    H, W = x.shape[1:3]
    if is_known_multiple((H, W), multiple):
        return x
    return F.pad(x, (0, 0, 0, padding_to_multiple(W, multiple), 0, padding_to_multiple(H, multiple)))


def crop(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Crop a token grid to its upper left part of H x W tokens, (B, H, W, C)."""
    H, W = grid
    if not is_symbolic(H, W):
        return x[:, :H, :W]
    # A slice would add a guard that the grid is large enough.
    rows, columns = torch.arange(H, device=x.device), torch.arange(W, device=x.device)
    return x.index_select(1, rows).index_select(2, columns)


def with_grid(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return a token grid (B, H, W, C), declared to have the size `grid`.

    A symbolic size may have been computed in two ways, such as the grid of MSG tokens by merging and from the patch
    grid. PyTorch cannot prove that both are equal, and would add a guard.
    """
    return crop(x, grid) if is_symbolic(*grid) else x


def contiguous_copy(x: Tensor) -> Tensor:
    """Copy a tensor into contiguous memory; `contiguous` and `reshape` would add a guard on symbolic strides."""
    return x.clone(memory_format=torch.contiguous_format)


def to_convolution_input(x: Tensor, stride: int) -> Tensor:
    """Permute a token grid (B, H, W, C) to the input (B, C, H, W) of a convolution with this stride.

    The convolution itself pads a grid, but only a multiple of the stride keeps symbolic output sizes simple. With
    channels last in memory, it would add a guard on a symbolic batch size. A grid of one column is padded, too: in
    bfloat16 on CPUs with instructions for it, oneDNN 3.10 leaves memory uninitialized in the weight gradient of a
    3 x 3 convolution of stride 2 with padding 1 over one column.
    """
    if is_symbolic(*x.shape[1:3]) or x.shape[2] == 1:
        x = pad_to_multiple(x, stride)
    x = x.permute(0, 3, 1, 2)
    return contiguous_copy(x) if is_symbolic(*x.shape) else x


class SymbolicPadding(NamedTuple):
    """The padding of a symbolic grid, with the methods of `WindowPadding`: it is masked, and never removed.

    Attributes:
        is_padding: (nH, nW, N, 1) boolean.
    """

    is_padding: Tensor

    def zero(self, windows: Tensor) -> Tensor:
        """Set the padding of windows (B, nH, nW, N, C) to zero."""
        return windows.masked_fill(self.is_padding, 0.0)

    def remove(self, windows: Tensor) -> Tensor:
        """Return the windows (B, nH, nW, N, C) as they are."""
        return windows

    def restore(self, windows: Tensor) -> Tensor:
        """Return the windows (B, nH, nW, N, C) as they are."""
        return windows


def symbolic_padding(grid: tuple[int, int], is_padding: Tensor) -> SymbolicPadding | None:
    """Padding of a symbolic patch grid (H, W), given the mask (nH, nW, N, 1); None for a grid of plain integers."""
    return SymbolicPadding(is_padding) if is_symbolic(*grid) else None
