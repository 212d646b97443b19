"""Masks of detections, kept within their boxes until they are needed.

Shapes: n detections in an image of H x W pixels. The masks of 100 detections in 4000 x 3000 pixels would take 1.2 GB as
bytes, and 4.8 GB as probabilities.
"""

from collections.abc import Iterator
from math import ceil, floor
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor


class PastedMask(NamedTuple):
    """A mask in its image: False outside these rows and columns.

    Attributes:
        rows, columns: the pixels whose centres are in the box.
        mask: boolean, (rows, columns).
    """

    rows: slice
    columns: slice
    mask: Tensor


class BoxMasks:
    """Masks of an image's detections; each is pasted, and thresholded at 0.5, when it is asked for.

    Args:
        probabilities: within each box, (n, 1, mask height, mask width).
        boxes: (n, 4), x1 y1 x2 y2 in pixels.
        size: height and width of the image.
    """

    def __init__(self, probabilities: Tensor, boxes: Tensor, size: tuple[int, int]):
        self.probabilities, self.boxes, self.size = probabilities, boxes, size

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: Tensor) -> 'BoxMasks':
        """The masks at these indices."""
        return BoxMasks(self.probabilities[index], self.boxes[index], self.size)

    def __iter__(self) -> Iterator[PastedMask]:
        return map(self.paste, range(len(self)))

    def cpu(self) -> 'BoxMasks':
        """The same on the CPU."""
        return BoxMasks(*(x.to('cpu', copy=True) for x in (self.probabilities, self.boxes)), self.size)

    def enlarged(self, factor: int) -> 'BoxMasks':
        """The masks of the image enlarged by a factor."""
        return BoxMasks(self.probabilities, self.boxes * factor, (self.size[0] * factor, self.size[1] * factor))

    def paste(self, index: int) -> PastedMask:
        """Paste a mask into its box, with bilinear interpolation at pixel centres."""
        x1, y1, x2, y2 = self.boxes[index].tolist()
        rows, columns = _pixels(y1, y2, self.size[0]), _pixels(x1, x2, self.size[1])
        device = self.probabilities.device
        y, x = (
            ((torch.arange(pixels.start, pixels.stop, device=device) + 0.5 - low) / (high - low) * 2 - 1)
            for pixels, low, high in ((rows, y1, y2), (columns, x1, x2))
        )
        grid = torch.stack(torch.meshgrid(x, y, indexing='xy'), dim=-1)  # (rows, columns, 2)
        probabilities = self.probabilities[index, None].float()
        mask = F.grid_sample(probabilities, grid[None], align_corners=False)[0, 0] > 0.5
        return PastedMask(slice(rows.start, rows.stop), slice(columns.start, columns.stop), mask)

    def dense(self) -> Tensor:
        """All masks in the whole image, boolean, (n, 1, H, W)."""
        masks = torch.zeros(len(self), 1, *self.size, dtype=torch.bool, device=self.probabilities.device)
        for canvas, (rows, columns, mask) in zip(masks[:, 0], self, strict=True):
            canvas[rows, columns] = mask
        return masks

    def rle(self) -> list[dict[str, Any]]:
        """Run lengths of each mask in the whole image, as pycocotools has them; on the CPU."""
        canvas = np.zeros(self.size, dtype=np.uint8, order='F')
        rles = []
        for rows, columns, mask in self:
            canvas[rows, columns] = mask.numpy()
            rles.append(coco_mask.encode(canvas))
            canvas[rows, columns] = 0
        return rles

    def segmentations(self) -> list[dict[str, Any]]:
        """`rle` as JSON files of COCO have it: the counts are text."""
        return [{'size': rle['size'], 'counts': rle['counts'].decode()} for rle in self.rle()]


def _pixels(low: float, high: float, count: int) -> range:
    """The pixels, of `count`, whose centres lie between two coordinates."""
    first, last = max(ceil(low - 0.5), 0), min(floor(high - 0.5), count - 1)
    return range(first, last + 1) if high > low and first <= last else range(0)
