"""Reading image files, with errors that name the file at fault."""

import codecs
import glob
import io
import os
import random
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torchvision.datasets.folder import is_image_file

from utils import UserError

Item = TypeVar('Item')


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


def read_header(path: str | Path, data: bytes | None = None) -> ImageHeader:
    """Read an image's header, without its pixels.

    Args:
        path: the image.
        data: content of its file; None reads it.

    Raises:
        DataError: the file is not an image.
    """
    try:
        with Image.open(path if data is None else io.BytesIO(data)) as file:
            exif = Image.Image.getexif(file)  # PNG's own would decode the image first
            orientation = exif.get(ExifTags.Base.Orientation, 1)
            header = ImageHeader(file.size, orientation if orientation in range(1, 9) else 1)
            # PIL opens a TIFF file with its upright size.
            return header._replace(size=header.upright_size) if file.format == 'TIFF' else header
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def turn_upright(data: bytes, name: str | Path, mode: str = 'RGB') -> bytes:
    """An encoded image, encoded again without loss where EXIF turns it.

    Args:
        data: content of an image file.
        name: of the image, for errors.
        mode: PIL mode of the turned image: RGB or L.

    Raises:
        DataError: it cannot be decoded.
    """
    if data and read_header(name, data).orientation == 1:
        return data
    turned = io.BytesIO()
    decode_image(data, name, mode, upright=True).save(turned, 'PPM')
    return turned.getvalue()


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
    """The images among files, below folders, among the matches of patterns, and listed on standard input for `-`.

    In folders and among matches, files of other kinds are left out, and so are hidden ones in folders; linked folders
    are not. A list has a file or folder on each line; one that does not exist is kept, as an image that cannot be read.

    Raises:
        DataError: there are none, or a path does not exist and, as a pattern, matches nothing.
    """
    paths = list(paths)
    images = []
    for path in paths:
        if path == _STDIN:
            images += [image for listed in _listed_paths() for image in _images_at(listed)]
        elif path.exists():
            images += _images_at(path)
        elif matches := sorted(map(Path, glob.glob(str(path), recursive=True))):
            below = (image for match in matches for image in _images_at(match) if is_image_file(image.name))
            images += dict.fromkeys(below)  # ** matches folders and what is in them
        else:
            problem = 'matches no file' if glob.has_magic(str(path)) else 'does not exist'
            raise DataError(f'{path} {problem}: give image files or folders')
    if not images:
        raise DataError(f'no images in {", ".join("standard input" if x == _STDIN else str(x) for x in paths)}')
    return images


_STDIN = Path('-')


def _listed_paths() -> list[Path]:
    """Paths on standard input, one on each line; blank lines are ignored."""
    lines = sys.stdin.buffer.read().removeprefix(codecs.BOM_UTF8).splitlines()
    return [Path(os.fsdecode(line)) for line in lines if line.strip()]


def _images_at(path: Path) -> list[Path]:
    """The images below a folder; a file as it is."""
    return [x for x in _files_below(path) if is_image_file(x.name)] if path.is_dir() else [path]


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


def choose_images(images: Sequence[Item], limit: int | None) -> Sequence[Item]:
    """At most `limit` of the images, in their order, chosen at random but always the same; None takes all."""
    if limit is None or limit >= len(images):
        return images
    return [images[i] for i in sorted(random.Random(0).sample(range(len(images)), limit))]
