"""Resize weights to a different window size, shuffle region size or patch grid.

Letters: H x W the patch grid, w window size, h heads, s size of a shuffle region in windows, C channels.
"""

import math

import torch.nn.functional as F
from torch import Tensor

from .pyramid import ceil_div
from .symbolic import is_known_equal


def resize_grid(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Interpolate a grid of values (1, rows, columns, C) bicubically to `grid`, (rows, columns)."""
    if is_known_equal(x.shape[1:3], grid):
        return x
    resized = F.interpolate(x.permute(0, 3, 1, 2), grid, mode='bicubic', antialias=True)
    return resized.permute(0, 2, 3, 1)


def resize_bias_table(table: Tensor, window_size: int) -> Tensor:
    """Interpolate a relative position bias table ((2w - 1)^2, h) to a different window size."""
    size = 2 * window_size - 1
    return resize_grid(_as_square(table[None]), (size, size)).flatten(0, 2)


def resize_position_embedding(embedding: Tensor, grid: tuple[int, int], source: tuple[int, int]) -> Tensor:
    """Interpolate a position embedding (1, H * W, C) from the patch grid `source` to `grid`."""
    return resize_grid(embedding.unflatten(1, source), grid).flatten(1, 2)


def tile_msg_tokens(tokens: Tensor, shuffle_size: int) -> Tensor:
    """Repeat or crop the MSG tokens (1, s^2, 1, C) of a shuffle region to a different size of the region."""
    region = _as_square(tokens.squeeze(2))  # (1, s, s, C)
    times = ceil_div(shuffle_size, region.shape[1])
    region = region.repeat(1, times, times, 1)[:, :shuffle_size, :shuffle_size]
    return region.flatten(1, 2).unsqueeze(2)


def square_side(cells: int) -> int:
    """Side length of a square grid with this number of cells.

    Raises:
        ValueError: the number is not a square.
    """
    side = math.isqrt(cells)
    if side**2 != cells:
        raise ValueError(f'{cells} cells do not form a square grid')
    return side


def _as_square(x: Tensor) -> Tensor:
    """Reshape a flattened square grid (1, side^2, C) to (1, side, side, C)."""
    side = square_side(x.shape[1])
    return x.unflatten(1, (side, side))
