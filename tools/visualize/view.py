"""A network to look into, an image as it sees it, and the classes it knows."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.functional import InterpolationMode, to_tensor

from config import TREE
from data.build import EvalTransform
from data.images import decode_image, read_header
from data.preprocess import Preprocess
from data.transforms import image_mode, mean_and_std
from engine.distributed import choose_device
from engine.predictor import Predictor, upright_images
from tools.msg_network import build_with_msg_tokens
from utils import UserError, set_seed

MAX_RATIO = 100  # of an image's sides; resizing the shorter one would make the longer one enormous
MAX_PIXELS = 1024**2  # of an image, whose every activation is kept


class VisualizeError(UserError):
    """Something that cannot be drawn."""


class NarrowImageError(VisualizeError):
    """An image that is too narrow."""


class View(NamedTuple):
    """An image as a network sees it.

    Attributes:
        picture: (height, width, 3), 8 bits.
        image: normalised, (1, in_chans, height, width), on the network's device.
    """

    picture: np.ndarray
    image: Tensor


def random_predictor(cfg_file: str | None, opts: list[str]) -> Predictor:
    """A network of a config with random weights, always the same."""
    config = TREE.load(cfg_file, opts, upright_images())
    set_seed(0)
    device = choose_device(config.DEVICE, local_rank=config.LOCAL_RANK)
    names = [str(number) for number in range(config.MODEL.NUM_CLASSES)]
    return Predictor(config, build_with_msg_tokens(config).to(device).eval(), names, device)


def prepare(predictor: Predictor, data: bytes, name: str, size: int | None = None) -> View:
    """Prepare an image by evaluation's code, or resize all of it.

    Args:
        predictor: the network.
        data: content of an image file.
        name: of the image, for errors.
        size: of the shorter side, in pixels; None for evaluation's resizing and cropping.

    Raises:
        DataError: the image cannot be decoded.
        VisualizeError: it is too narrow, or would be too large or smaller than a patch.
    """
    config, device = predictor.config, predictor.device
    width, height = read_header(name, data).size if data else (1, 1)  # what is empty is for the decoder to refuse
    if max(width, height) > MAX_RATIO * min(width, height):
        raise NarrowImageError(
            f'an image of {width} x {height} pixels is too narrow: crop it to {MAX_RATIO} : 1 or less'
        )
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in mean_and_std(config))
    if size is None:
        prepared = Preprocess(config, device).prepare(EvalTransform(config)(data, name)[None])
    else:
        image = decode_image(data, name, image_mode(config), config.DATA.EXIF)
        patch, pixels = config.MODEL.MSG.PATCH_SIZE, size**2 * max(image.size) // min(image.size)
        if size < patch:
            raise VisualizeError(f'--size {size} is smaller than a patch of {patch} pixels: write a larger one')
        if pixels > MAX_PIXELS:
            raise VisualizeError(
                f'at --size {size} an image of {image.width} x {image.height} pixels has {pixels:,}, more than '
                f'{MAX_PIXELS:,}: write a smaller one'
            )
        resize = transforms.Resize(size, InterpolationMode(config.DATA.INTERPOLATION))
        prepared = ((to_tensor(resize(image)) - mean) / std)[None].to(device)
    pixels = (prepared[0].cpu() * std + mean).clamp(0, 1).mul(255).round().to(torch.uint8).expand(3, -1, -1)
    return View(pixels.permute(1, 2, 0).numpy(), prepared)


def find_class(class_names: Sequence[str], text: str) -> int:
    """The index of the class with this name, or else this number from 0.

    Raises:
        VisualizeError: there is none.
    """
    if text in class_names:
        return class_names.index(text)
    if text.isdecimal() and int(text) < len(class_names):
        return int(text)
    if not class_names:
        raise VisualizeError('the network has no classes')
    shown = ', '.join(class_names[:5]) + (', …' if len(class_names) > 5 else '')
    raise VisualizeError(f'no class {text}: write one of {shown}, or a number from 0 to {len(class_names) - 1}')
