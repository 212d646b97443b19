"""Augmentation of an image (3, H, W) and its objects; random numbers are PyTorch's, on the CPU.

A target has `boxes` (n, 4) and `labels` (n,), perhaps `masks` (n, H, W) and `has_mask` (n,); others pass through.
torchvision's functions move the boxes. Masks are resized by `nearest-exact`, which torchvision does not use for them.
The size of a resized image is rounded to the nearest pixel, as in evaluation, where torchvision rounds down.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxFormat
from yacs.config import CfgNode

from detection.data.coco import Target

XYXY = BoundingBoxFormat.XYXY


class TrainTransform:
    """The augmentation of training: a flip, optionally a resize and a crop, and a resize to one of several sizes.

    Evaluation has none: the network resizes.

    Args:
        config: the config tree; `INPUT` is read.
    """

    def __init__(self, config: CfgNode):
        self.options = config.INPUT

    def __call__(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        """Augment an image and its objects."""
        options = self.options
        if _draw() < options.FLIP:
            image, target = flip(image, target)
        if _draw() < options.CROP_PROB:
            image, target = resize(image, target, _choose(options.CROP_RESIZE), options.CROP_MAX_LONG)
            image, target = random_crop(image, target, *options.CROP_SIZE)
        return resize(image, target, _choose(options.TRAIN_SHORT), options.MAX_LONG)


def flip(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Flip horizontally."""
    boxes = F.horizontal_flip_bounding_boxes(target['boxes'], XYXY, tuple(image.shape[1:]))
    flipped = {'masks': target['masks'].flip(2)} if 'masks' in target else {}
    return image.flip(2), target | {'boxes': boxes} | flipped


def resize(image: Tensor, target: Target, short: int, long: int) -> tuple[Tensor, Target]:
    """Resize to `resized_shape`, as in evaluation."""
    height, width = image.shape[1:]
    size = resized_shape(height, width, short, long)
    if size == (height, width):
        return image, target
    boxes, _ = F.resize_bounding_boxes(target['boxes'], canvas_size=(height, width), size=list(size))
    resized = {'boxes': boxes}
    if 'masks' in target:
        masks = target['masks']  # PyTorch refuses to resize an empty tensor
        masks = interpolate(masks[None], size, mode='nearest-exact')[0] if len(masks) else masks.new_zeros(0, *size)
        resized['masks'] = masks
    return interpolate(image[None], size, mode='bilinear')[0], target | resized


def resized_shape(height: int, width: int, short: int, long: int) -> tuple[int, int]:
    """Height and width with a short side of `short` pixels, or less where the long side would exceed `long`."""
    scale = min(short / min(height, width), long / max(height, width))
    return max(round(height * scale), 1), max(round(width * scale), 1)


def random_crop(image: Tensor, target: Target, low: int, high: int) -> tuple[Tensor, Target]:
    """Crop a rectangle with sides between `low` and `high` pixels, as far as the image has them.

    Boxes are clipped to it; objects with less than a pixel inside are dropped, perhaps all of them.
    """
    height, width = (_integer(min(length, low), min(length, high)) for length in image.shape[1:])
    top, left = _integer(0, image.shape[1] - height), _integer(0, image.shape[2] - width)
    boxes, _ = F.crop_bounding_boxes(target['boxes'], XYXY, top, left, height, width)
    visible = (boxes[:, 2:] - boxes[:, :2] >= 1).all(dim=1)
    rows, columns = slice(top, top + height), slice(left, left + width)
    cropped = {key: target[key][visible] for key in ('labels', 'masks', 'has_mask') if key in target}
    if 'masks' in cropped:
        cropped['masks'] = cropped['masks'][:, rows, columns]
    return image[:, rows, columns], target | cropped | {'boxes': boxes[visible]}


def _draw() -> float:
    return torch.rand(()).item()


def _integer(low: int, high: int) -> int:
    """A random integer from `low` to `high`, inclusive."""
    return int(torch.randint(low, high + 1, ()))


def _choose(values: Sequence[int]) -> int:
    return values[_integer(0, len(values) - 1)]
