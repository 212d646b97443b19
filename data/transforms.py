"""The published transforms: timm's augmentation for training, a resize and crop for evaluation."""

from collections.abc import Callable

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.transforms import str_to_interp_mode
from torchvision import transforms
from yacs.config import CfgNode

from data.images import DataError

# PIL mode, mean and standard deviation by number of channels; grey has the mean over ImageNet's channels.
_CHANNELS = {
    3: ('RGB', IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    1: ('L', (sum(IMAGENET_DEFAULT_MEAN) / 3,), (sum(IMAGENET_DEFAULT_STD) / 3,)),
}


def build_transform(config: CfgNode, is_train: bool) -> Callable:
    """Build the transform from a PIL image to a normalised tensor (C, H, W).

    Raises:
        DataError: a number of channels or an augmentation policy that is not supported.
    """
    size, interpolation = config.DATA.IMG_SIZE, config.DATA.INTERPOLATION
    _, mean, std = _channels(config)
    if is_train:
        aug = config.AUG
        try:
            return create_transform(
                input_size=size,
                is_training=True,
                scale=tuple(aug.SCALE),
                ratio=tuple(aug.RATIO),
                hflip=aug.HFLIP,
                color_jitter=aug.COLOR_JITTER or None,
                auto_augment=None if aug.AUTO_AUGMENT in ('', 'none') else aug.AUTO_AUGMENT,
                interpolation=interpolation,
                re_prob=aug.REPROB,
                re_mode=aug.REMODE,
                re_count=aug.RECOUNT,
                mean=mean,
                std=std,
            )
        except (AssertionError, KeyError, ValueError) as error:  # from timm's parser of the policy
            raise DataError(
                f'AUG.AUTO_AUGMENT is {aug.AUTO_AUGMENT!r}, which timm cannot parse: '
                f'write none, or a policy such as rand-m9-mstd0.5-inc1'
            ) from error
    mode = str_to_interp_mode(interpolation)
    if config.TEST.CROP:
        resize = [transforms.Resize(int(256 / 224 * size), mode), transforms.CenterCrop(size)]
    else:
        resize = [transforms.Resize((size, size), mode)]
    return transforms.Compose([*resize, transforms.ToTensor(), transforms.Normalize(mean, std)])


def image_mode(config: CfgNode) -> str:
    """PIL mode of the images: RGB or L (grey)."""
    return _channels(config)[0]


def _channels(config: CfgNode) -> tuple[str, tuple[float, ...], tuple[float, ...]]:
    channels = config.MODEL.MSG.IN_CHANS
    if channels not in _CHANNELS:
        raise DataError(f'MODEL.MSG.IN_CHANS is {channels}, but images have 3 channels or 1: write 3 or 1')
    return _CHANNELS[channels]
