"""Augmentation of an image (3, H, W) and its objects; random numbers are PyTorch's, on the CPU.

A target has `boxes` (n, 4) and `labels` (n,), perhaps `masks` (n, H, W) and `has_mask` (n,); others pass through.
torchvision's functions move the boxes. Masks are resized by `nearest-exact`, which torchvision does not use for them.
The size of a resized image is rounded to the nearest pixel, as in evaluation, where torchvision rounds down.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.ops import masks_to_boxes
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxFormat
from yacs.config import CfgNode

Target = dict[str, Any]

# Keys of a target that have an entry for each object
OBJECT_KEYS = ('boxes', 'labels', 'masks', 'has_mask')

XYXY = BoundingBoxFormat.XYXY


class TrainTransform:
    """The augmentation of training: a flip, optionally a resize and a crop, and a resize to one of several sizes.

    With `INPUT.SCALE_JITTER`, large-scale jitter takes the place of the resizes and the crop. Evaluation has no
    augmentation: the network resizes.

    Args:
        config: the config tree; `INPUT` is read.
    """

    def __init__(self, config: CfgNode):
        self.options = config.INPUT

    def __call__(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        """Augment an image and its objects."""
        options = self.options
        if random_number() < options.FLIP:
            image, target = flip(image, target)
        if options.SCALE_JITTER:
            return scale_jitter(image, target, options.JITTER_SIZE, *options.SCALE_JITTER)
        if random_number() < options.CROP_PROB:
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
    return resize_to(image, target, resized_shape(*image.shape[1:], short, long))


def resize_to(image: Tensor, target: Target, size: tuple[int, int], antialias: bool = False) -> tuple[Tensor, Target]:
    """Resize to a height and width."""
    if size == tuple(image.shape[1:]):
        return image, target
    boxes, _ = F.resize_bounding_boxes(target['boxes'], canvas_size=tuple(image.shape[1:]), size=list(size))
    resized = {'boxes': boxes}
    if 'masks' in target:
        masks = target['masks']  # PyTorch refuses to resize an empty tensor
        masks = interpolate(masks[None], size, mode='nearest-exact')[0] if len(masks) else masks.new_zeros(0, *size)
        resized['masks'] = masks
    return interpolate(image[None], size, mode='bilinear', antialias=antialias)[0], target | resized


def resized_shape(height: int, width: int, short: int, long: int) -> tuple[int, int]:
    """Height and width with a short side of `short` pixels, or less where the long side would exceed `long`."""
    scale = min(short / min(height, width), long / max(height, width))
    return max(round(height * scale), 1), max(round(width * scale), 1)


def random_crop(image: Tensor, target: Target, low: int, high: int) -> tuple[Tensor, Target]:
    """Crop a rectangle with sides between `low` and `high` pixels, as far as the image has them.

    For the objects, see `crop`.
    """
    height, width = (random_integer(min(length, low), min(length, high)) for length in image.shape[1:])
    top, left = random_integer(0, image.shape[1] - height), random_integer(0, image.shape[2] - width)
    return crop(image, target, top, left, height, width)


def crop(image: Tensor, target: Target, top: int, left: int, height: int, width: int) -> tuple[Tensor, Target]:
    """Crop a rectangle, which is black where it is outside the image.

    Boxes are clipped to it; objects with less than a pixel inside are dropped, perhaps all of them.
    """
    rectangle = top, left, height, width
    boxes, _ = F.crop_bounding_boxes(target['boxes'], XYXY, *rectangle)
    visible = (boxes[:, 2:] - boxes[:, :2] >= 1).all(dim=1)
    cropped = select_objects(target | {'boxes': boxes}, visible)
    if 'masks' in cropped:
        cropped['masks'] = F.crop(cropped['masks'], *rectangle)
    return F.crop(image, *rectangle), cropped


def select_objects(target: Target, rows: Tensor) -> Target:
    """The objects of these rows: booleans (n,), or indices."""
    return target | {key: target[key][rows] for key in OBJECT_KEYS if key in target}


def fit_cut_boxes(target: Target, size: Sequence[int]) -> Target:
    """`fit_boxes` of the objects whose boxes reach the border of an image of this height and width."""
    boxes, (height, width) = target['boxes'], size
    return fit_boxes(target, ((boxes <= 0) | (boxes >= boxes.new_tensor([width, height] * 2))).any(dim=1))


def fit_boxes(target: Target, rows: Tensor) -> Target:
    """Fit the boxes of some objects to their masks, and drop all objects whose masks are empty.

    Objects without a mask stay as they are.

    Args:
        target: its masks may have become smaller than its boxes.
        rows: objects whose boxes are fitted, booleans (n,).
    """
    if 'masks' not in target:
        return target
    masks, boxes, has_mask = target['masks'], target['boxes'].clone(), has_masks(target)
    fitted = rows & has_mask
    boxes[fitted] = masks_to_boxes(masks[fitted]) + torch.tensor([0.0, 0.0, 1.0, 1.0])  # of pixel indices
    return select_objects(target | {'boxes': boxes}, masks.flatten(1).any(dim=1).bool() | ~has_mask)


def has_masks(target: Target) -> Tensor:
    """Which objects have a mask, booleans (n,)."""
    return target.get('has_mask', torch.ones(len(target['boxes']), dtype=torch.bool))


def scale_jitter(image: Tensor, target: Target, size: int, min_scale: float, max_scale: float) -> tuple[Tensor, Target]:
    """Large-scale jitter: resize by a random scale, and crop what exceeds a square of `size` pixels.

    Smaller images are not padded to the square, because a batch pads them to its largest image anyway. Boxes of objects
    that are cut are fitted to what is left of their masks; objects of which nothing is left are dropped.

    Args:
        image: (3, H, W).
        target: its objects.
        size: height and width of the square.
        min_scale: smallest scale. At a scale of 1, the image just fits into the square.
        max_scale: largest scale.
    """
    scale = (min_scale + (max_scale - min_scale) * random_number()) * size / max(image.shape[1:])
    shape = tuple(max(round(length * scale), 1) for length in image.shape[1:])
    image, target = resize_to(image, target, shape, antialias=True)  # at a tenth of its size, it would alias
    image, target = random_crop(image, target, size, size)
    return image, fit_cut_boxes(target, image.shape[1:])


def random_number() -> float:
    """A random number in [0, 1)."""
    return torch.rand(()).item()


def random_integer(low: int, high: int) -> int:
    """A random integer from `low` to `high`, inclusive."""
    return int(torch.randint(low, high + 1, ()))


def _choose(values: Sequence[int]) -> int:
    return values[random_integer(0, len(values) - 1)]
