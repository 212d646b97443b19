"""Tiled detection: where the overlapping tiles of an image are, and which detections of the tiles are kept.

Each tile is resized like a whole image, so that small objects are enlarged. Shapes: n detections.
"""

from dataclasses import dataclass
from math import ceil
from numbers import Integral, Real
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torchvision.ops import batched_nms
from yacs.config import CfgNode

from engine.config_tree import ConfigError

# Smallest tile, in pixels
MIN_SIZE = 32

# A box is cut if it ends this near to the border of its tile, relative to the tile's size, and the image goes on there.
CUT_MARGIN = 0.02

# A cut box is part of a whole box of its class that covers more than this fraction of it.
MAX_COVERED = 0.5

# Boxes that are compared with all others at a time, which bounds the memory
CHUNK = 256


@dataclass(frozen=True)
class Tiling:
    """How images are divided into tiles.

    Args:
        size: height and width of a tile, in pixels; 0 for no tiles.
        overlap: minimum overlap of neighbouring tiles, relative to their size, in [0, 0.9].
        sees_whole: whether objects are detected in the whole image too.

    Raises:
        ConfigError: a value cannot be used.
    """

    size: int = 0
    overlap: float = 0.2
    sees_whole: bool = True

    def __post_init__(self):
        if (
            not isinstance(self.size, Integral)
            or isinstance(self.size, bool)
            or (self.size != 0 and self.size < MIN_SIZE)
        ):
            raise ConfigError(
                f'the size of tiles (TEST.TILES) is {self.size!r}: write at least {MIN_SIZE} pixels, or 0 for no tiles'
            )
        object.__setattr__(self, 'size', int(self.size))  # of a NumPy integer, which may overflow
        if not isinstance(self.overlap, Real) or not 0 <= self.overlap <= 0.9:
            raise ConfigError(
                f'the overlap of tiles (TEST.TILE_OVERLAP) is {self.overlap!r}: write a number between 0 and 0.9'
            )

    @classmethod
    def of_config(cls, config: CfgNode) -> Self:
        """The tiling of `TEST`."""
        return cls(config.TEST.TILES, config.TEST.TILE_OVERLAP, config.TEST.TILE_WHOLE)

    def tiles(self, height: int, width: int) -> list['Tile']:
        """The fewest tiles that cover an image and overlap as they must, evenly spread; an image may be one tile."""
        rows, columns = (self._starts(length) for length in (height, width))
        return [Tile(top, left, min(self.size, height), min(self.size, width)) for top in rows for left in columns]

    def _starts(self, length: int) -> list[int]:
        """Where tiles start along a side of the image."""
        excess = length - self.size
        if not self.size or excess <= 0:
            return [0]
        gaps = ceil(excess / max(int(self.size * (1 - self.overlap)), 1))
        return [round(i * excess / gaps) for i in range(gaps + 1)]


class Tile(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def crop(self, image: Tensor) -> Tensor:
        """The part of an image (3, H, W)."""
        return image[:, self.top : self.top + self.height, self.left : self.left + self.width]

    def offset(self, boxes: Tensor) -> Tensor:
        """Boxes (n, 4) of the tile, in the image."""
        return boxes + boxes.new_tensor([self.left, self.top] * 2)

    def is_cut(self, boxes: Tensor, height: int, width: int) -> Tensor:
        """Which boxes (n, 4) of the tile end at a border beyond which the image, of this size, goes on: (n,)."""
        x_margin, y_margin = CUT_MARGIN * self.width, CUT_MARGIN * self.height
        x1, y1, x2, y2 = boxes.unbind(dim=1)
        cut = torch.zeros_like(x1, dtype=torch.bool)
        if self.left > 0:
            cut |= x1 < x_margin
        if self.top > 0:
            cut |= y1 < y_margin
        if self.left + self.width < width:
            cut |= x2 > self.width - x_margin
        if self.top + self.height < height:
            cut |= y2 > self.height - y_margin
        return cut


def merge_indices(boxes: Tensor, scores: Tensor, labels: Tensor, is_cut: Tensor, nms_iou: float) -> Tensor:
    """The detections of all tiles that are kept: NMS within each class, where whole objects take precedence.

    A cut box is dropped where a whole box of its class covers most of it, whatever the scores: NMS would keep both,
    since the IoU of an object and a part of it is small, or would keep the part.

    Args:
        boxes: (n, 4), in the image.
        scores: (n,).
        labels: (n,).
        is_cut: (n,), see `Tile.is_cut`.
        nms_iou: IoU threshold of NMS.

    Returns:
        Indices, highest scores first.
    """
    whole, cut = (
        rows[batched_nms(boxes[rows], scores[rows], labels[rows], nms_iou)]
        for rows in ((~is_cut).nonzero()[:, 0], is_cut.nonzero()[:, 0])
    )
    is_part = [
        (_is_covered(boxes[rows], boxes[whole]) & (labels[rows, None] == labels[whole])).any(dim=1)
        for rows in cut.split(CHUNK)
    ]
    kept = torch.cat((whole, cut[~torch.cat(is_part)]))
    return kept[scores[kept].argsort(descending=True, stable=True)]


def _is_covered(boxes: Tensor, others: Tensor) -> Tensor:
    """Which boxes (n, 4) are covered to more than `MAX_COVERED` by which of others (m, 4): (n, m)."""
    top_left = torch.maximum(boxes[:, None, :2], others[:, :2])  # (n, m, 2)
    bottom_right = torch.minimum(boxes[:, None, 2:], others[:, 2:])
    intersections = (bottom_right - top_left).clamp(min=0).prod(dim=2)
    return intersections > MAX_COVERED * (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)[:, None]
