"""What the detector does to images before its network, and to detections after it."""

from math import ceil, floor

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes

from detection.data.transforms import fitted_size


class DetectorTransform(GeneralizedRCNNTransform):
    """Normalises images and pads them to one size; in evaluation, resizes them before and detections back after.

    Training images have been resized by the data's transforms. torchvision's class rounds sizes and the pixels of masks
    in other ways than training here does, which costs small objects much of their overlap.

    Args:
        min_size, max_size, image_mean, image_std, size_divisible: see `GeneralizedRCNNTransform`.
    """

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """An image (3, H, W) in evaluation's size."""
        if self.training:
            return image, target
        size = fitted_size(*image.shape[-2:], self.min_size[-1], self.max_size)
        return F.interpolate(image[None], size, mode='bilinear')[0], target

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Detections in the pixels of their own images, with masks (n, 1, H, W) of probabilities."""
        if self.training:
            return result
        parts = zip(result, image_shapes, original_image_sizes, strict=True)
        moved = [(found, resize_boxes(found['boxes'], seen, own), own) for found, seen, own in parts]
        return [
            found | {'boxes': boxes, 'masks': paste_masks(found['masks'], boxes, own)} for found, boxes, own in moved
        ]


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Put masks where their boxes are, with bilinear interpolation at the centres of the image's pixels.

    Args:
        masks: probabilities in each box, (n, 1, side, side).
        boxes: (n, 4), x1 y1 x2 y2 in pixels.
        size: height and width of the image.

    Returns:
        (n, 1, height, width); 0 outside of the boxes.
    """
    pasted = masks.new_zeros(len(masks), 1, *size, dtype=torch.float32)
    for canvas, mask, (x1, y1, x2, y2) in zip(pasted[:, 0], masks.float(), boxes.tolist(), strict=True):
        rows, columns = _pixels(y1, y2, size[0]), _pixels(x1, x2, size[1])
        if not (rows and columns):
            continue
        y, x = (
            ((torch.arange(pixels.start, pixels.stop, device=masks.device) + 0.5 - low) / (high - low) * 2 - 1)
            for pixels, low, high in ((rows, y1, y2), (columns, x1, x2))
        )
        grid = torch.stack(torch.meshgrid(x, y, indexing='xy'), dim=-1)  # (rows, columns, 2)
        part = F.grid_sample(mask[None], grid[None], align_corners=False)[0, 0]
        canvas[rows.start : rows.stop, columns.start : columns.stop] = part
    return pasted


def _pixels(low: float, high: float, side: int) -> range:
    """The pixels of a side whose centres lie between two places."""
    return range(max(ceil(low - 0.5), 0), min(floor(high - 0.5) + 1, side)) if high > low else range(0)
