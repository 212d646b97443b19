"""Reading image files, with errors that name the file at fault."""

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
    """Read and decode an image; of 16 bits per pixel, the upper 8.

    Args:
        path: the file.
        mode: PIL mode: RGB, or L for one grey channel.
        upright: rotate as EXIF says. Datasets are read as stored, as is usual.

    Raises:
        DataError: the file is not an image, or is truncated.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file) if upright else file
            if image.mode.startswith('I;16'):  # PIL would clip it
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert(mode)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(
            f'image {path} cannot be read ({" ".join(str(error).split())}): replace or remove it'
        ) from error


def find_images(paths: Iterable[Path]) -> list[Path]:
    """The images among files and below folders.

    Raises:
        DataError: there are none, or a path does not exist.
    """
    paths = list(paths)
    images = []
    for path in paths:
        if not path.exists():
            raise DataError(f'{path} does not exist: give image files or folders')
        images += sorted(x for x in path.rglob('*') if is_image_file(x.name)) if path.is_dir() else [path]
    if not images:
        raise DataError(f'no images in {", ".join(map(str, paths))}')
    return images


def choose_images(paths: list[Path], limit: int | None) -> list[Path]:
    """At most `limit` of the images, chosen at random but always the same; None takes all."""
    return paths if limit is None or limit >= len(paths) else sorted(random.Random(0).sample(paths, limit))
