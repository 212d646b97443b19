"""The pyramid: the patch grid, windows, shuffle regions and channels of each stage.

Source: Fang et al., arXiv:2105.15168, sections 3.1 to 3.3.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import gcd, lcm
from typing import NamedTuple


def ceil_div(size: int, divisor: int) -> int:
    """Divide a size, rounding up.

    `-(-size // divisor)` is the same number, but `torch.onnx` translates `//` to a division that rounds towards zero.
    """
    return (size + divisor - 1) // divisor


class Size(NamedTuple):
    """Height and width: of an image in pixels, of a patch grid in patches, of a window grid in windows."""

    height: int
    width: int

    @classmethod
    def of(cls, size: int | Sequence[int]) -> 'Size':
        """Create a size from one number, for a square, or from (height, width)."""
        return cls(size, size) if isinstance(size, int) else cls(*size)

    def __str__(self) -> str:
        return f'{self.height} x {self.width}'

    def divided_by(self, divisor: int) -> 'Size':
        """Divide height and width, rounding up."""
        return Size(ceil_div(self.height, divisor), ceil_div(self.width, divisor))

    def is_multiple_of(self, divisor: int) -> bool:
        """Whether height and width are multiples of `divisor`."""
        return self.height % divisor == 0 and self.width % divisor == 0


class StageLayout(NamedTuple):
    """Layout of one stage.

    Attributes:
        dim: channels C.
        depth: blocks.
        num_heads: attention heads.
        window_size: window size w, in patches.
        shuffle_size: size s of a shuffle region, in windows.
    """

    dim: int
    depth: int
    num_heads: int
    window_size: int
    shuffle_size: int


def plan_pyramid(
    img_size: Size | None,
    patch_size: int,
    window_size: int,
    embed_dim: int,
    depths: Sequence[int],
    num_heads: Sequence[int],
    shuffle_size: Sequence[int],
    channel_multiples: Sequence[Callable[[int], int]] | None = None,
) -> list[StageLayout]:
    """Choose the channels, window size and shuffle size of every stage, first to last.

    Channels double and the patch grid halves from stage to stage. If windows and shuffle regions tile the grids of all
    stages at `img_size`, a stage whose patch grid is smaller than a window gets a window of the grid's smaller side,
    and a stage of one window gets a shuffle size of 1. Otherwise, and without an `img_size`, every stage has the window
    size and shuffle size of the arguments, and grids are padded.

    Args:
        img_size: image size in pixels; None if no size is preferred.
        patch_size: patch size, in pixels.
        window_size: window size, in patches.
        embed_dim: channels of the first stage.
        depths: blocks per stage.
        num_heads: attention heads per stage.
        shuffle_size: size of a shuffle region per stage, in windows.
        channel_multiples: for each stage, `Exchange.channel_multiple`, called with the shuffle size; None without MSG
            tokens.

    Raises:
        ValueError: the image is smaller than a patch, the lists differ in length, a stage has no blocks, the window
            size is not positive, or channels do not divide into heads and as the exchanges need.
    """
    if not len(depths) == len(num_heads) == len(shuffle_size) > 0:
        raise ValueError(
            f'depths {list(depths)}, num_heads {list(num_heads)} and shuffle_size {list(shuffle_size)} differ in '
            f'length, or are empty: write one entry per stage in each'
        )
    if not isinstance(window_size, int) or window_size < 1:
        raise ValueError(f'window_size is {window_size!r}: write a positive integer')
    if min(depths) < 1:
        raise ValueError(f'depths {list(depths)} has a stage without blocks: write 1 or more')
    if img_size is not None and min(img_size) < patch_size:
        raise ValueError(f'image size {img_size} is smaller than one patch of {patch_size} x {patch_size} pixels')
    windows, regions = [window_size] * len(depths), list(shuffle_size)
    if img_size is not None:
        grids = patch_grids(img_size, patch_size, len(depths))
        fitted = [min(window_size, *grid) for grid in grids]
        if _tiles(img_size, patch_size, grids, fitted, regions):
            windows = fitted
            regions = [1 if max(grid) == w else s for grid, w, s in zip(grids, windows, regions, strict=True)]
    multiples = [1] * len(regions)
    if channel_multiples is not None:
        multiples = [multiple(s) for multiple, s in zip(channel_multiples, regions, strict=True)]
    _check_channels(embed_dim, num_heads, multiples)
    dims = [embed_dim * 2**i for i in range(len(depths))]
    return [StageLayout(*layout) for layout in zip(dims, depths, num_heads, windows, regions, strict=True)]


def patch_grids(img_size: Size, patch_size: int, stages: int) -> list[Size]:
    """Compute the patch grid of each stage: halved from stage to stage, rounding up."""
    return [img_size.divided_by(patch_size).divided_by(2**i) for i in range(stages)]


def _tiles(
    img_size: Size, patch_size: int, grids: Sequence[Size], windows: Sequence[int], regions: Sequence[int]
) -> bool:
    """Whether nothing is padded: patches, windows, regions and the 2 x 2 merging of patches and MSG tokens all fit."""
    if not img_size.is_multiple_of(patch_size * 2 ** (len(grids) - 1)):
        return False
    msg_grids = [grid.divided_by(w) for grid, w in zip(grids, windows, strict=True)]
    return (
        all(grid.is_multiple_of(w) for grid, w in zip(grids, windows, strict=True))
        and all(grid.is_multiple_of(s) or grid == (1, 1) for grid, s in zip(msg_grids, regions, strict=True))
        and all(fine == (2 * coarse.height, 2 * coarse.width) for fine, coarse in pairwise(msg_grids))
    )


def _check_channels(embed_dim: int, num_heads: Sequence[int], multiples: Sequence[int]) -> None:
    """Check each stage's channels, multiples of heads and of what exchanges need; the error names a valid factor."""
    needed = 1
    for i, (heads, multiple) in enumerate(zip(num_heads, multiples, strict=True)):
        divisor = lcm(heads, multiple)
        needed = lcm(needed, divisor // gcd(divisor, 2**i))
    if embed_dim % needed:
        raise ValueError(
            f'embed_dim {embed_dim} does not fit: the channels of each stage must be multiples of num_heads '
            f'{list(num_heads)} and of {list(multiples)}, which the exchange of MSG tokens needs: '
            f'choose a multiple of {needed}'
        )
