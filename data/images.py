"""Reading image files, with errors that name the file at fault."""

import os
import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torchvision.datasets.folder import is_image_file

from utils import UserError


class DataError(UserError):
    """A folder or image that cannot be used; the message names it and the remedy.

    The error of a loader process is raised again in the main one with the whole traceback as its message, so only the
    last line is kept.
    """

    def __init__(self, message: str):
        last_line = message.strip().splitlines()[-1]
        super().__init__(last_line.removeprefix(f'{type(self).__module__}.{type(self).__name__}: '))


def load_image(path: str | Path, mode: str = 'RGB', upright: bool = False) -> Image.Image:
    """Read and decode an image, with 8 bits per channel.

    Of 16 bits, the upper 8 are taken, as of 32-bit integers where one is above 255. Floats are scaled by 255 where all
    are in [0, 1]. Other integers and floats are clipped to [0, 255].

    Args:
        path: the file.
        mode: PIL mode: RGB, or L for one grey channel.
        upright: rotate as EXIF says. Datasets are read as stored, as is usual.

    Raises:
        DataError: the file is not an image, is truncated, or is too large to be safe.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file) if upright else file
            if image.mode[0] in 'IF':  # PIL would clip it
                image = Image.fromarray(_to_8_bits(np.asarray(image), image.mode))
            return image.convert(mode)
    except Image.DecompressionBombError as error:
        raise DataError(f'image {path} is too large ({error}): scale it down or remove it') from error
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(
            f'image {path} cannot be read ({" ".join(str(error).split())}): replace or remove it'
        ) from error


def _to_8_bits(pixels: np.ndarray, mode: str) -> np.ndarray:
    """Grey values (H, W) of PIL's mode I;16, I or F as 8-bit ones."""
    pixels = np.nan_to_num(pixels)
    if mode.startswith('I;16') or (mode == 'I' and pixels.max() > 255):
        pixels = pixels >> 8
    elif mode == 'F' and pixels.min() >= 0 and pixels.max() <= 1:
        pixels = np.rint(pixels * 255)
    return pixels.clip(0, 255).astype(np.uint8)


def find_images(paths: Iterable[Path]) -> list[Path]:
    """The images among files and below folders; hidden ones in a folder are ignored, linked folders are not.

    Raises:
        DataError: there are none, or a path does not exist.
    """
    paths = list(paths)
    images = []
    for path in paths:
        if not path.exists():
            raise DataError(f'{path} does not exist: give image files or folders')
        images += _images_below(path) if path.is_dir() else [path]
    if not images:
        raise DataError(f'no images in {", ".join(map(str, paths))}')
    return images


def _images_below(folder: Path) -> list[Path]:
    # Path.rglob follows no links before Python 3.13
    files = (Path(parent, name) for parent, _, names in os.walk(folder, followlinks=True) for name in names)
    images = sorted(path for path in files if is_image_file(path.name))
    return [path for path in images if not any(part.startswith('.') for part in path.relative_to(folder).parts)]


def choose_images(paths: list[Path], limit: int | None) -> list[Path]:
    """At most `limit` of the images, chosen at random but always the same; None takes all."""
    return paths if limit is None or limit >= len(paths) else sorted(random.Random(0).sample(paths, limit))
