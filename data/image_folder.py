"""The format of a tree of class folders."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import is_image_file

from data.images import DataError, load_image


def open_folder(root: Path, transform: Callable, mode: str = 'RGB') -> ImageFolder:
    """Open the images below `root/<class>/`; classes are the sorted folder names.

    Args:
        root: folder of class folders.
        transform: from a PIL image to what the loader collates.
        mode: PIL mode of the images: RGB, or L for one grey channel.

    Raises:
        DataError: there is no such folder, it has no class folders, or a class has no images.
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
