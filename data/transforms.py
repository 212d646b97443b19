"""The published transforms: timm's augmentation for training, a resize and crop for evaluation."""

import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import v2
from yacs.config import CfgNode

from data.dataset import NO_ERASING
from data.images import AnyImage, DataError, PartError, kind_of_value, to_image
from extensions import Registry

# PIL mode, mean and standard deviation by number of channels; grey has the mean over ImageNet's channels.
_CHANNELS = {
    3: ('RGB', IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    1: ('L', (sum(IMAGENET_DEFAULT_MEAN) / 3,), (sum(IMAGENET_DEFAULT_STD) / 3,)),
}


def build_transform(config: CfgNode, is_train: bool) -> Callable[[Image.Image], Tensor]:
    """Build the published transform from a PIL image to a normalised tensor (C, H, W).

    Raises:
        DataError: a number of channels or an augmentation policy that is not supported.
    """
    if is_train:
        crop_and_flip, policies, conversions = train_steps(config)
        return transforms.Compose([*crop_and_flip, *policies, UserTransform(config).on_image, *conversions])
    size, mode = config.DATA.IMG_SIZE, str_to_interp_mode(config.DATA.INTERPOLATION)
    if config.TEST.CROP:
        resize = [transforms.Resize(resized_side(config), mode), transforms.CenterCrop(size)]
    else:
        resize = [transforms.Resize((size, size), mode)]
    return transforms.Compose([*resize, transforms.ToTensor(), transforms.Normalize(*mean_and_std(config))])


def resized_side(config: CfgNode) -> int:
    """Length to which the shorter side of an evaluated image is resized, before its centre is cropped."""
    return int(256 / 224 * config.DATA.IMG_SIZE)


def train_steps(config: CfgNode) -> tuple[list[Callable], list[Callable], list[Callable]]:
    """The steps of timm's augmentation: crop and flip; the policy; conversion, normalisation and random erasing.

    Raises:
        DataError: see `build_transform`.
    """
    mean, std = mean_and_std(config)
    aug = config.AUG
    try:
        steps = create_transform(
            input_size=config.DATA.IMG_SIZE,
            is_training=True,
            scale=tuple(aug.SCALE),
            ratio=tuple(aug.RATIO),
            hflip=aug.HFLIP,
            color_jitter=aug.COLOR_JITTER or None,
            auto_augment=None if aug.AUTO_AUGMENT in ('', 'none') else aug.AUTO_AUGMENT,
            interpolation=config.DATA.INTERPOLATION,
            re_prob=aug.REPROB,
            re_mode=aug.REMODE,
            re_count=aug.RECOUNT,
            mean=mean,
            std=std,
            separate=True,
        )
    except (AssertionError, KeyError, ValueError) as error:  # from timm's parser of the policy
        raise DataError(
            f'AUG.AUTO_AUGMENT is {aug.AUTO_AUGMENT!r}, which timm cannot parse: '
            f'write none, or a policy such as rand-m9-mstd0.5-inc1'
        ) from error
    return tuple(step.transforms for step in steps)


# Values of AUG.TRANSFORM
TRANSFORMS = Registry('transform', none=lambda config: None)


def register_transform(name: str) -> Callable[[Callable], Callable]:
    """Make a transform of training images available as `AUG.TRANSFORM name`.

    The decorated class or function is called with the config and gives a transform: one of albumentations, one of
    torchvision for tensors of uint8, or a function of an image, an array of uint8, (H, W, 3) or (H, W), that returns
    such an array. It is called after crop, flip and `AUG.AUTO_AUGMENT`, before random erasing. Numbers that it draws
    from `random`, `numpy.random` or `torch`, or that albumentations draws, depend only on the seed, the epoch and the
    index of the image.

    Raises:
        ValueError: the name belongs to another transform.
    """
    return TRANSFORMS.register(name)


class UserTransform:
    """The transform of `AUG.TRANSFORM` as a function of an array; without one, images stay unchanged.

    Args:
        config: the config tree.
    """

    def __init__(self, config: CfgNode):
        self.name = config.AUG.TRANSFORM
        self.transform = _on_arrays(TRANSFORMS[self.name](config))

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """The transformed image, (H, W, 3) or (H, W), uint8.

        Raises:
            PartError: the transform returns something else.
        """
        if self.transform is None:
            return pixels
        result = self.transform(pixels)
        if not isinstance(result, np.ndarray) or result.dtype != np.uint8 or result.shape != pixels.shape:
            raise PartError(
                f'AUG.TRANSFORM {self.name} returns {kind_of_value(result)} for an image of {pixels.shape}: return an '
                f'array of uint8 of the same shape'
            )
        return result

    def on_image(self, image: Image.Image) -> Image.Image:
        """The transformed PIL image."""
        return image if self.transform is None else Image.fromarray(self(np.array(image)))


def _on_arrays(transform: Any) -> Callable[[np.ndarray], Any] | None:
    """A transform as a function of an array.

    Raises:
        PartError: see `AlbumentationsTransform`.
    """
    albumentations = sys.modules.get('albumentations')  # already imported if the transform is from it
    if albumentations and isinstance(transform, albumentations.BasicTransform | albumentations.BaseCompose):
        return AlbumentationsTransform(transform)
    is_torchvision = isinstance(transform, v2.Transform) or type(transform).__module__.startswith('torchvision.')
    return TensorTransform(transform) if is_torchvision else transform


class AlbumentationsTransform:
    """A transform of albumentations as a function of an array.

    albumentations has its own random generators, which only `set_random_state` seeds. Before each image, they are
    seeded by a number of `torch`, which depends on the run's seed, the epoch and the index of the image.

    Args:
        transform: one, or a composition of several.

    Raises:
        PartError: the release of albumentations cannot be seeded: it is older than 2.
    """

    def __init__(self, transform: Any):
        if not hasattr(transform, 'set_random_state'):
            raise PartError('AUG.TRANSFORM needs a newer release: pip install "albumentations>=2"')
        self.transform = transform

    def __call__(self, pixels: np.ndarray) -> Any:
        """Transform an image (H, W, 3) or (H, W)."""
        seed = int(torch.randint(2**62, ()))
        self.transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
        return self.transform(image=pixels)['image']


class TensorTransform:
    """A transform of tensors (C, H, W), such as one of torchvision, as a function of an array.

    Args:
        transform: returns a uint8 tensor too.
    """

    def __init__(self, transform: Callable[[Tensor], Tensor]):
        self.transform = transform

    def __call__(self, pixels: np.ndarray) -> Any:
        """Transform an image (H, W, 3) or (H, W)."""
        result = self.transform(torch.from_numpy(np.atleast_3d(pixels)).permute(2, 0, 1))
        if not isinstance(result, Tensor) or result.ndim != 3:
            return result
        return result.permute(1, 2, 0).reshape(*result.shape[1:], *pixels.shape[2:]).numpy()


class PublishedTransform:
    """The published pipeline for images in any form; random erasing is part of it.

    Args:
        config: the config tree.
        is_train: for training, or for evaluation.
    """

    def __init__(self, config: CfgNode, is_train: bool):
        self.mode, self.upright = image_mode(config), config.DATA.EXIF
        self.transform = build_transform(config, is_train)

    def __call__(self, data: AnyImage, name: str) -> tuple[Tensor, Tensor]:
        """The image (C, H, W) and no erasing; see `data.dataset.Sample`."""
        return self.transform(to_image(data, name, self.mode, self.upright)), NO_ERASING


def image_mode(config: CfgNode) -> str:
    """PIL mode of the images: RGB or L (grey)."""
    return _channels(config)[0]


def mean_and_std(config: CfgNode) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, of pixels in [0, 1]."""
    return _channels(config)[1:]


def _channels(config: CfgNode) -> tuple[str, tuple[float, ...], tuple[float, ...]]:
    channels = config.MODEL.MSG.IN_CHANS
    if channels not in _CHANNELS:
        raise DataError(f'MODEL.MSG.IN_CHANS is {channels}, but images have 3 channels or 1: write 3 or 1')
    return _CHANNELS[channels]
