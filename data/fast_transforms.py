"""The fast pipeline: what the published transforms compute, on arrays of 8 bits.

It draws the same random numbers in the same order, so a sample has the same crop, flip, operations and magnitudes in
both pipelines. Normalisation and the filling of erased rectangles run on the device: see `data.preprocess`.
"""

import math
import random

import cv2
import numpy as np
import torch
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from yacs.config import CfgNode

from data.array_augment import use_arrays
from data.dataset import NO_ERASING
from data.decoding import Box, Crop, EncodedImage
from data.images import AnyImage
from data.transforms import UserTransform, image_mode, resized_side, train_steps


class FastTrainTransform:
    """Random crop, flip and augmentation of an image; rectangles to erase are drawn here, and filled on the device.

    Args:
        config: the config tree.

    Raises:
        DataError: see `data.transforms.build_transform`.
    """

    def __init__(self, config: CfgNode):
        self.mode, self.size, self.upright = image_mode(config), config.DATA.IMG_SIZE, config.DATA.EXIF
        (self.random_crop, *flips), policies, (_, _, *erasings) = train_steps(config)
        self.flip_probability = flips[0].p if flips else 0
        self.policies, self.user_transform = [use_arrays(policy) for policy in policies], UserTransform(config)
        self.random_erasing = erasings[0] if erasings else None

    def __call__(self, data: AnyImage, name: str) -> tuple[Tensor, Tensor]:
        """The image (H, W, C), and the rectangles to erase; see `data.dataset.Sample`."""
        return _to_tensor(self.augment(self.decode(data, name))), self.draw_erasing()

    def decode(self, data: AnyImage, name: str) -> np.ndarray:
        """A random crop's pixels, (H, W, 3) or (H, W)."""
        image = EncodedImage(data, name, self.mode, self.upright)
        return image.crop(self.draw_crop(image.size), self.random_crop.interpolation)

    def augment(self, pixels: np.ndarray) -> np.ndarray:
        """The pixels, flipped at random, after the policy and the transform of `AUG.TRANSFORM`."""
        if self.flip_probability and torch.rand(1) < self.flip_probability:
            pixels = cv2.flip(pixels, 1)
        for policy in self.policies:
            pixels = policy(pixels)
        return self.user_transform(pixels)

    def draw_crop(self, size: tuple[int, int]) -> Crop:
        """Draw the crop of an image of some width and height."""
        width, height = size
        image = torch.empty((1, height, width), device='meta')  # timm reads its size
        top, left, height, width = self.random_crop.get_params(image, self.random_crop.scale, self.random_crop.ratio)
        return Crop(Box(left, top, width, height), (self.size, self.size), Box(0, 0, self.size, self.size))

    def draw_erasing(self) -> Tensor:
        """Draw the rectangles of random erasing: (RECOUNT, 5), see `Sample`; zeros for those that are not drawn."""
        if self.random_erasing is None:
            return NO_ERASING
        rectangles = draw_rectangles(self.random_erasing, self.size)
        rows = [(*rectangle, int(torch.randint(2**62, ()))) for rectangle in rectangles]
        missing = self.random_erasing.max_count - len(rows)
        return torch.tensor(rows + [(0,) * 5] * missing, dtype=torch.int64)


def draw_rectangles(erasing: RandomErasing, size: int) -> list[tuple[int, int, int, int]]:
    """Draw rectangles (top, left, height, width) of a square image with the random numbers that timm would."""
    rectangles = []
    if random.random() > erasing.probability:
        return rectangles
    count = erasing.min_count
    if erasing.min_count != erasing.max_count:
        count = random.randint(erasing.min_count, erasing.max_count)
    for _ in range(count):
        for _ in range(10):  # attempts
            area = random.uniform(erasing.min_area, erasing.max_area) * size * size / count
            aspect = math.exp(random.uniform(*erasing.log_aspect_ratio))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height < size and width < size:
                top, left = random.randint(0, size - height), random.randint(0, size - width)
                rectangles.append((top, left, height, width))
                break
    return rectangles


class FastEvalTransform:
    """Evaluation transform: the resized centre crop of an image, or the whole image without `TEST.CROP`.

    Args:
        config: the config tree.
    """

    def __init__(self, config: CfgNode):
        self.mode, self.size, self.upright = image_mode(config), config.DATA.IMG_SIZE, config.DATA.EXIF
        self.resized_side = resized_side(config) if config.TEST.CROP else None
        self.interpolation = str_to_interp_mode(config.DATA.INTERPOLATION)

    def __call__(self, data: AnyImage, name: str) -> tuple[Tensor, Tensor]:
        """The image (H, W, C) and no erasing; see `data.dataset.Sample`."""
        return _to_tensor(self.decode(data, name)), NO_ERASING

    def decode(self, data: AnyImage, name: str) -> np.ndarray:
        """The crop's pixels, (H, W, 3) or (H, W)."""
        image = EncodedImage(data, name, self.mode, self.upright)
        return image.crop(self.crop(image.size), self.interpolation)

    def crop(self, size: tuple[int, int]) -> Crop:
        """The crop of an image of some width and height: torchvision's Resize and CenterCrop, rounding included."""
        width, height = size
        whole, result = Box(0, 0, width, height), self.size
        if self.resized_side is None:
            return Crop(whole, (result, result), Box(0, 0, result, result))
        short, side = min(size), self.resized_side
        resized = tuple(side if x == short else int(side * x / short) for x in size)
        left, top = (round((x - result) / 2.0) for x in resized)
        return Crop(whole, resized, Box(left, top, result, result))


def _to_tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels).reshape(*pixels.shape[:2], -1))
