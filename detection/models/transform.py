"""Images before the network, and detections after it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes

from detection.data.transforms import resized_shape
from detection.models.masks import BoxMasks


class DetectorTransform(GeneralizedRCNNTransform):
    """Normalises images and pads them to one size; in evaluation, also resizes images and maps detections back.

    Training images are resized by the dataset's transforms. torchvision's class rounds sizes and mask pixels
    differently from training here, which costs small objects much of their IoU.

    Args:
        min_size, max_size, image_mean, image_std, size_divisible: see `GeneralizedRCNNTransform`.
    """

    @contextmanager
    def resizing_to(self, short: int | None) -> Iterator[None]:
        """Context in which images get another short side in evaluation; None changes nothing."""
        min_size = self.min_size
        if short is not None:
            self.min_size = (short,)
        try:
            yield
        finally:
            self.min_size = min_size

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
    ) -> list[dict[str, Tensor | BoxMasks]]:
        """Map detections to the pixels of their images, with masks, if any, as `BoxMasks`."""
        if self.training:
            return result
        mapped = []
        for detections, resized, original in zip(result, image_shapes, original_image_sizes, strict=True):
            boxes = resize_boxes(detections['boxes'], resized, original)
            detections = detections | {'boxes': boxes}
            if 'masks' in detections:
                detections['masks'] = BoxMasks(detections['masks'], boxes, original)
            mapped.append(detections)
        return mapped
