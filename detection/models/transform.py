"""Images before the network, and detections after it."""

from math import ceil, floor

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes

from detection.data.transforms import resized_shape


class DetectorTransform(GeneralizedRCNNTransform):
    """Normalises images and pads them to one size; in evaluation, also resizes images and maps detections back.

    Training images are resized by the dataset's transforms. torchvision's class rounds sizes and mask pixels
    differently from training here, which costs small objects much of their IoU.

    Args:
        min_size, max_size, image_mean, image_std, size_divisible: see `GeneralizedRCNNTransform`.
    """

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Resize an image (3, H, W) in evaluation."""
        if self.training:
            return image, target
        size = resized_shape(*image.shape[-2:], self.min_size[-1], self.max_size)
        return F.interpolate(image[None], size, mode='bilinear')[0], target

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Map detections to the pixels of their images, with masks (n, 1, H, W) of probabilities."""
        if self.training:
            return result
        mapped = []
        for detections, resized, original in zip(result, image_shapes, original_image_sizes, strict=True):
            boxes = resize_boxes(detections['boxes'], resized, original)
            mapped.append(detections | {'boxes': boxes, 'masks': paste_masks(detections['masks'], boxes, original)})
        return mapped


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Paste masks into their boxes, with bilinear interpolation at pixel centres.

    Args:
        masks: probabilities within each box, (n, 1, mask size, mask size).
        boxes: (n, 4), x1 y1 x2 y2 in pixels.
        size: height and width of the image.

    Returns:
        (n, 1, height, width); 0 outside the boxes.
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
        resampled = F.grid_sample(mask[None], grid[None], align_corners=False)[0, 0]
        canvas[rows.start : rows.stop, columns.start : columns.stop] = resampled
    return pasted


def _pixels(low: float, high: float, count: int) -> range:
    """The pixels, of `count`, whose centres lie between two coordinates."""
    return range(max(ceil(low - 0.5), 0), min(floor(high - 0.5) + 1, count)) if high > low else range(0)
