"""The pyramid: which patch grid, window and shuffle region each stage works on.

Source: Fang et al., arXiv:2105.15168, sections 3.1 to 3.3.
"""

from dataclasses import dataclass
from itertools import product
from math import lcm
from typing import NamedTuple


class PyramidError(ValueError):
    """An image size, window or width that the network cannot be built with."""


class Size(NamedTuple):
    """Height and width, in whatever unit the name says."""

    height: int
    width: int

    def __str__(self) -> str:
        return f'{self.height} x {self.width}'


@dataclass(frozen=True)
class StageLayout:
    """What one stage works on.

    Attributes:
        grid: patch grid H x W.
        window: side w of a window, in patches.
        region: side s of a shuffle region, in windows.
    """

    grid: Size
    window: int
    region: int

    @property
    def msg_grid(self) -> Size:
        """Windows, and so MSG tokens, along each side."""
        return Size(self.grid.height // self.window, self.grid.width // self.window)


def plan_pyramid(
    img_size: tuple[int, int], patch_size: int, window_size: int, shuffle_size: list[int]
) -> list[StageLayout]:
    """Lay out every stage, first to last; the grid halves from each to the next.

    A stage whose smaller side is at most `window_size` gets windows of that side, and a stage of one window
    has regions of one window.

    Args:
        img_size: image (height, width) in pixels.
        patch_size: side of a patch, in pixels.
        window_size: side of a window, in patches.
        shuffle_size: side of a shuffle region, in windows, per stage; its length is the number of stages.

    Raises:
        PyramidError: the windows or regions do not tile; the message names image sizes that work.
    """
    try:
        return _lay_out(Size(*img_size), patch_size, window_size, shuffle_size)
    except PyramidError as error:
        sizes = _sizes_that_work(Size(*img_size), patch_size, window_size, shuffle_size)
        raise PyramidError(
            f'image size {Size(*img_size)}: {error}. Image sizes that work with patch size {patch_size}, window size '
            f'{window_size} and shuffle sizes {",".join(map(str, shuffle_size))}: {sizes}'
        ) from None


def _lay_out(img_size: Size, patch_size: int, window_size: int, shuffle_size: list[int]) -> list[StageLayout]:
    if img_size.height % patch_size or img_size.width % patch_size:
        raise PyramidError(f'not a multiple of the patch size {patch_size}')
    stages: list[StageLayout] = []
    grid = Size(img_size.height // patch_size, img_size.width // patch_size)
    for number, region in enumerate(shuffle_size, start=1):
        if min(grid) < 1:
            raise PyramidError(f'nothing is left of the patch grid in stage {number}')
        window = min(window_size, *grid)
        if grid.height % window or grid.width % window:
            raise PyramidError(f'the {grid} patches of stage {number} do not divide into {window} x {window} windows')
        stage = StageLayout(grid, window, region)
        if stage.msg_grid == (1, 1):
            stage = StageLayout(grid, window, region=1)
        elif stage.msg_grid.height % region or stage.msg_grid.width % region:
            raise PyramidError(
                f'the {stage.msg_grid} windows of stage {number} do not divide into '
                f'shuffle regions of {region} x {region}'
            )
        # MSG tokens are merged 2 x 2 like patches, so a window must still hold one token after every merging.
        if stages and (stages[-1].msg_grid != (2 * stage.msg_grid.height, 2 * stage.msg_grid.width)):
            raise PyramidError(
                f'the {stages[-1].msg_grid} MSG tokens of stage {number - 1} do not merge 2 x 2 into '
                f"one for each of stage {number}'s {stage.msg_grid} windows"
            )
        stages.append(stage)
        if number < len(shuffle_size) and (grid.height % 2 or grid.width % 2):
            raise PyramidError(f'the {grid} patches of stage {number} do not halve')
        grid = Size(grid.height // 2, grid.width // 2)
    return stages


def _sizes_that_work(img_size: Size, patch_size: int, window_size: int, shuffle_size: list[int], most: int = 4) -> str:
    """The image sizes nearest to the one wanted that tile, as text."""
    period = lcm(*(patch_size * window_size * 2**i * s for i, s in enumerate(shuffle_size)))  # its multiples all tile
    step = patch_size * 2 ** (len(shuffle_size) - 1)  # every grid but the last is halved

    def candidates(side: int) -> range:
        return range(step, side + 2 * period + 1, step)

    if img_size.height == img_size.width:
        sizes = (Size(side, side) for side in candidates(img_size.height))
    else:
        sizes = map(Size._make, product(candidates(img_size.height), candidates(img_size.width)))

    def tiles(size: Size) -> bool:
        try:
            return bool(_lay_out(size, patch_size, window_size, shuffle_size))
        except PyramidError:
            return False

    def distance(size: Size) -> int:
        return abs(size.height - img_size.height) + abs(size.width - img_size.width)

    nearest = sorted(filter(tiles, sizes), key=distance)[:most]
    return ', '.join(str(size.height if size.height == size.width else size) for size in sorted(nearest)) or 'none'
