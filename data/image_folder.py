"""A tree of class folders, with errors that name the folder or image at fault."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import is_image_file


class DataError(ValueError):
    """A folder or image that cannot be used; the message names it and the remedy.

    A loader process that fails has its error raised again in the main one with the whole traceback as message, so
    only the last line is kept.
    """

    def __init__(self, message: str):
        last_line = message.strip().splitlines()[-1]
        super().__init__(last_line.removeprefix(f'{type(self).__module__}.{type(self).__name__}: '))


def open_folder(root: Path, transform: Callable, mode: str = 'RGB') -> ImageFolder:
    """A data set of the images under `root/<class>/`, whose classes are the folders' names in order.

    Args:
        root: folder of class folders.
        transform: from a PIL image to what the loader collates.
        mode: PIL mode of the images: RGB, or L for one grey channel.

    Raises:
        DataError: no such folder, no class folders, or a class without images.
    """
    if not root.is_dir():
        raise DataError(
            f'data folder {root} does not exist: give --data-path the folder that holds train/<class>/ and val/<class>/'
        )
    classes = sorted(path for path in root.iterdir() if path.is_dir())
    if not classes:
        raise DataError(f'data folder {root} has no class folders: put the images of each class in a folder of its own')
    for folder in classes:
        if not any(is_image_file(path.name) for path in folder.rglob('*')):
            raise DataError(f'class folder {folder} holds no images: add some or remove it')
    return ImageFolder(root, transform, loader=partial(load_image, mode=mode))


def load_image(path: str | Path, mode: str = 'RGB', upright: bool = False) -> Image.Image:
    """Read and decode one image; of 16 bits a pixel, the upper 8.

    Args:
        path: of the file.
        mode: PIL mode: RGB, or L for one grey channel.
        upright: turn the image as its camera says (EXIF). Data sets are read as they are, like everywhere.

    Raises:
        DataError: the file is not an image, or is cut short.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file) if upright else file
            if image.mode.startswith('I;16'):  # which PIL would clip
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert(mode)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(
            f'image {path} cannot be read ({" ".join(str(error).split())}): replace or remove it'
        ) from error
