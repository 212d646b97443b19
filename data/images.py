"""Reading image files, with errors that name the file at fault."""

import io
import os
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
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
    """Read and decode an image file; see `decode_image`.

    Raises:
        DataError: the file cannot be read or decoded.
    """
    return decode_image(read_file(path), path, mode, upright)


def read_file(path: str | Path) -> bytes:
    """Read a file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f'image {path} cannot be read ({error.strerror}): replace or remove it') from error


def decode_image(data: bytes, name: str | Path, mode: str = 'RGB', upright: bool = False) -> Image.Image:
    """Decode an image, with 8 bits per channel.

    Of 16 bits, the upper 8 are taken, as of 32-bit integers where one is above 255. Floats are scaled by 255 where all
    are in [0, 1]. Other integers and floats are clipped to [0, 255].

    Args:
        data: content of an image file.
        name: of the image, for errors.
        mode: PIL mode: RGB, or L for one grey channel.
        upright: turn as EXIF says. Classification data are read as stored, as published.

    Raises:
        DataError: it is not an image, is truncated, or is too large to be safe.
    """
    if not data:
        raise DataError(f'image {name} is empty: replace or remove it')
    try:
        with Image.open(io.BytesIO(data)) as file:
            image = ImageOps.exif_transpose(file) if upright else file
            if image.mode[0] in 'IF':  # PIL would clip it
                image = Image.fromarray(_to_8_bits(np.asarray(image), image.mode))
            return image.convert(mode)
    except _UNREADABLE as error:
        raise _unreadable(name, error) from error


class ImageHeader(NamedTuple):
    """Stored width and height of an image, and its EXIF orientation: 1 is upright, 5 to 8 swap the sides."""

    size: tuple[int, int]
    orientation: int

    @property
    def upright_size(self) -> tuple[int, int]:
        """Width and height of the image as EXIF turns it."""
        return self.size[::-1] if self.orientation in range(5, 9) else self.size


def read_header(path: str | Path) -> ImageHeader:
    """Read an image's header, without its pixels.

    Raises:
        DataError: the file is not an image.
    """
    try:
        with Image.open(path) as file:
            exif = Image.Image.getexif(file)  # PNG's own would decode the image first
            orientation = exif.get(ExifTags.Base.Orientation, 1)
            header = ImageHeader(file.size, orientation if orientation in range(1, 9) else 1)
            # PIL opens a TIFF file with its upright size.
            return header._replace(size=header.upright_size) if file.format == 'TIFF' else header
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


# What PIL raises for files that it cannot, or should not, decode.
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def _unreadable(name: str | Path, error: Exception) -> DataError:
    if isinstance(error, Image.DecompressionBombError):
        return DataError(f'image {name} is too large ({error}): scale it down or remove it')
    text = 'no known image format' if isinstance(error, UnidentifiedImageError) else ' '.join(str(error).split())
    return DataError(f'image {name} cannot be read ({text}): replace or remove it')


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
        images += [x for x in _files_below(path) if is_image_file(x.name)] if path.is_dir() else [path]
    if not images:
        raise DataError(f'no images in {", ".join(map(str, paths))}')
    return images


def _files_below(folder: Path) -> list[Path]:
    """The files below a folder, in linked folders too, each folder once, but for hidden files and folders."""
    files, visited = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):  # Path.rglob follows no links before Python 3.13
        real = os.path.realpath(parent)
        if real in visited:  # links may form a circle
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        files += [Path(parent, name) for name in names if not name.startswith('.')]
    return sorted(files)


def report_other_files(paths: Iterable[Path]) -> None:
    """Say on stderr how many files below these folders are no images, by their names."""
    files = (file for path in paths if path.is_dir() for file in _files_below(path))
    if count := sum(not is_image_file(file.name) for file in files):
        print(f'{count} file(s) of other kinds left out', file=sys.stderr)


class ReadableImages:
    """Iterates over the files and upright images that can be read; the others are reported on stderr.

    Args:
        paths: image files.
        mode: PIL mode of the images.
    """

    def __init__(self, paths: Sequence[Path], mode: str = 'RGB'):
        self.paths, self.mode = paths, mode
        self.unreadable = 0

    def __iter__(self) -> Iterator[tuple[Path, Image.Image]]:
        self.unreadable = 0
        for path in self.paths:
            try:
                image = load_image(path, self.mode, upright=True)
            except DataError as error:
                print(f'error: {error}', file=sys.stderr)
                self.unreadable += 1
            else:
                yield path, image

    def check(self) -> None:
        """To be called at the end.

        Raises:
            DataError: images could not be read.
        """
        if self.unreadable:
            raise DataError(f'{self.unreadable} of {len(self.paths)} images cannot be read: see above')


def choose_images(paths: list[Path], limit: int | None) -> list[Path]:
    """At most `limit` of the images, chosen at random but always the same; None takes all."""
    return paths if limit is None or limit >= len(paths) else sorted(random.Random(0).sample(paths, limit))
