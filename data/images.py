"""Reading image files, with errors that name the file at fault."""

import codecs
import errno
import glob
import io
import os
import random
import stat
import struct
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from utils import UserError, printable

Item = TypeVar('Item')

# An image as a dataset gives it: the content of a file, or decoded; arrays are (H, W, 3) or (H, W), uint8
AnyImage = bytes | Image.Image | np.ndarray

# The most bytes of a file, or of a member of an archive, that are read as one encoded image. The limit of a decoded
# image is Pillow's: twice `Image.MAX_IMAGE_PIXELS`, 179 million pixels.
MAX_IMAGE_BYTES = 512 << 20

# Pillow's names of the formats that are decoded, and the suffixes of their files. Pillow knows others; of them, EPS
# runs a program.
IMAGE_FORMATS = {
    'JPEG': ('.jpg', '.jpeg', '.jfif', '.jpe'),
    'PNG': ('.png',),
    'WEBP': ('.webp',),
    'TIFF': ('.tif', '.tiff'),
    'BMP': ('.bmp',),
    'PPM': ('.ppm', '.pgm', '.pbm', '.pnm'),
    'GIF': ('.gif',),
    'AVIF': ('.avif',),
    'JPEG2000': ('.jp2', '.j2k'),
}
IMAGE_SUFFIXES = tuple(suffix for suffixes in IMAGE_FORMATS.values() for suffix in suffixes)


class LoaderError(UserError):
    """Base class of errors that DataLoader workers pass on to the main process.

    PyTorch raises the error of a DataLoader worker again in the main process, with the whole traceback as its message,
    so only the last line is kept.
    """

    def __init__(self, message: str):
        last_line = (message.strip().splitlines() or [''])[-1]
        super().__init__(last_line.removeprefix(f'{type(self).__module__}.{type(self).__name__}: '))


class DataError(LoaderError):
    """A folder or image that cannot be used; the message names it and the remedy."""


class PartError(LoaderError):
    """A user's dataset, transform or loss returns something invalid. Not a `DataError`, so it is never skipped."""


class OpenFilesError(LoaderError):
    """The limit of open files is reached. Not a `DataError`: no image is at fault, so none may be skipped."""


def is_image_file(name: str | Path) -> bool:
    """Whether a file is an image by the suffix of its name."""
    return str(name).lower().endswith(IMAGE_SUFFIXES)


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file for reading. Pipes, devices and sockets are refused: they may block, or never end.

    Raises:
        OSError: it cannot be opened, or is not a regular file.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(code, os.strerror(code) if code == errno.EISDIR else 'not a regular file', str(path))
    return open(path, 'rb')


def read_error(name: str | Path, error: Exception, remedy: str) -> LoaderError:
    """The error in one line for a file that cannot be opened or read.

    Args:
        name: what messages call the file, such as `image x.png`.
        error: of the system, or of a library.
        remedy: what the user can do about it.
    """
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return OpenFilesError(
            f'{name} cannot be opened ({error.strerror}): raise the limit of open files, such as with '
            f'`ulimit -n 65536`, or write a smaller DATA.NUM_WORKERS'
        )
    text = error.strerror if isinstance(error, OSError) and error.strerror else ' '.join(str(error).split())
    return DataError(f'{name} cannot be read ({text or type(error).__name__}): {remedy}')


def existing_path(folder: Path, name: str) -> Path:
    """Find a file in a folder, where its name may be composed or decomposed (Unicode's NFC or NFD).

    If there is no such file, the path has the name as given.
    """
    path = folder / name
    if name.isascii() or os.path.exists(path):
        return path
    others = (folder / unicodedata.normalize(form, name) for form in ('NFC', 'NFD'))
    return next(filter(os.path.exists, others), path)


def load_image(path: str | Path, mode: str = 'RGB', upright: bool = False) -> Image.Image:
    """Read and decode an image file; see `decode_image`.

    Raises:
        DataError: the file cannot be read or decoded.
    """
    return decode_image(read_file(path), path, mode, upright)


def read_file(path: str | Path) -> bytes:
    """Read an image file.

    Raises:
        DataError: it cannot be read, is not a regular file, or is larger than `MAX_IMAGE_BYTES`.
        OpenFilesError: too many files are open.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            check_image_bytes(size)
            return file.read(size)
    except (OSError, ValueError) as error:
        raise read_error(f'image {path}', error, 'replace or remove it') from error


def check_image_bytes(size: int) -> None:
    """Check the number of bytes of an encoded image before it is read.

    Raises:
        ValueError: it is above `MAX_IMAGE_BYTES`.
    """
    if size > MAX_IMAGE_BYTES:
        raise ValueError(f'{size:,} bytes are more than the limit of {MAX_IMAGE_BYTES:,}')


def to_image(image: AnyImage, name: str | Path, mode: str = 'RGB', upright: bool = False) -> Image.Image:
    """An image of any form as a PIL image with 8 bits per channel; for the arguments, see `decode_image`.

    Raises:
        DataError: it cannot be decoded.
        PartError: it has another form.
    """
    if isinstance(image, bytes):
        return decode_image(image, name, mode, upright)
    if isinstance(image, Image.Image):
        try:
            image.load()
            return _convert(image, mode, upright)
        except Exception as error:  # a file is read only now; see `decode_image`
            raise _unreadable(name, error) from error
    is_array = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.size > 0
    if is_array and (image.ndim == 2 or image.shape[2:] == (3,)):
        return Image.fromarray(image).convert(mode)
    raise PartError(
        f'image {name} is {kind_of_value(image)}: return a PIL image, an array of uint8, (H, W, 3) or (H, W), or the '
        f'content of a file'
    )


def kind_of_value(value: Any) -> str:
    """Describe a value that a user's code has returned, for messages: `a Tensor, float32, (3, 224, 224)`."""
    details = f', {value.dtype}, {tuple(value.shape)}' if hasattr(value, 'dtype') else ''
    return f'a {type(value).__name__}{details}'


def decode_image(data: bytes, name: str | Path, mode: str = 'RGB', upright: bool = False) -> Image.Image:
    """Decode an image, with 8 bits per channel.

    16-bit images keep their upper 8 bits, as do 32-bit integers if one is above 255. Floats are scaled by 255 if all
    are in [0, 1]. Other integers and floats are clipped to [0, 255].

    Args:
        data: content of an image file.
        name: of the image, for errors.
        mode: PIL mode: RGB, or L for one grey channel.
        upright: turn it as its EXIF orientation says; otherwise, it is read as stored.

    Raises:
        DataError: it is not an image, is truncated, or is too large to be safe.
    """
    if not data:
        raise DataError(f'image {name} is empty: replace or remove it')
    try:
        with _open_image(io.BytesIO(data)) as file:
            file.load()
            return _convert(file, mode, upright)
    except Exception as error:  # decoders raise errors of any type for damaged files
        raise _unreadable(name, error) from error


def _convert(image: Image.Image, mode: str, upright: bool) -> Image.Image:
    """A loaded image in another mode; see `decode_image`."""
    if upright:
        image = _turn_upright(image)
    if image.mode[0] in 'IF':  # PIL would clip it
        image = Image.fromarray(_to_8_bits(np.asarray(image), image.mode))
    return image.convert(mode)


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
        with open_regular(path) if data is None else io.BytesIO(data) as source, _open_image(source) as file:
            header = ImageHeader(file.size, _orientation(file))
            # PIL opens a TIFF file with its upright size.
            return header._replace(size=header.upright_size) if file.format == 'TIFF' else header
    except Exception as error:  # see `decode_image`
        raise _unreadable(path, error) from error


# How PIL turns an image of each EXIF orientation upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _turn_upright(file: Image.Image) -> Image.Image:
    """An image after it has been loaded, upright; PIL itself has turned a TIFF file."""
    orientation = 1 if file.format == 'TIFF' else _orientation(file)
    return file if orientation == 1 else file.transpose(_TURNS[orientation])


def _orientation(file: Image.Image) -> int:
    """EXIF orientation of an open file, 1 to 8; 1 (upright) where its EXIF data are damaged."""
    try:
        exif = Image.Image.getexif(file)  # PNG's own would decode the image first
        orientation = exif.get(ExifTags.Base.Orientation, 1)
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, struct.error):
        return 1
    return orientation if orientation in range(1, 9) else 1


def _open_image(source: BinaryIO) -> Image.Image:
    """An image of the known formats and of a safe size, not decoded yet."""
    return Image.open(source, formats=tuple(IMAGE_FORMATS))


def _unreadable(name: str | Path, error: Exception) -> LoaderError:
    if isinstance(error, Image.DecompressionBombError):
        return DataError(f'image {name} is too large ({error}): scale it down or remove it')
    if isinstance(error, UnidentifiedImageError):
        error = ValueError('no known image format')
    return read_error(f'image {name}', error, 'replace or remove it')


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

    In folders and among matches, files of other kinds are left out; hidden files in folders are, too. Linked folders
    are followed. A list has a file or folder on each line; one that does not exist is kept, as an image that cannot be
    read.

    Raises:
        DataError: there are none, or a path does not exist and, as a pattern, matches nothing.
    """
    paths = list(paths)
    images = []
    for path in paths:
        if path == _STDIN:
            images += [image for listed in _listed_paths() for image in _images_at(listed)]
        elif os.path.exists(path):  # unlike Path.exists, of any path
            images += _images_at(path)
        elif matches := sorted(map(Path, glob.glob(str(path), recursive=True))):
            below = (image for match in matches for image in _images_at(match) if is_image_file(image.name))
            images += dict.fromkeys(below)  # ** matches folders and what is in them
        else:
            problem = 'matches no file' if glob.has_magic(str(path)) else 'does not exist'
            raise DataError(f'{path} {problem}: give image files or folders')
    if not images:
        where = ', '.join('standard input' if x == _STDIN else str(x) for x in paths)
        kinds = _other_kinds(paths)
        found = f', but {kinds.total()} file(s) of other kinds ({describe_kinds(kinds)}): {CONVERT}' if kinds else ''
        raise DataError(f'no images in {where}{found}')
    return images


_STDIN = Path('-')


def _listed_paths() -> list[Path]:
    """Paths on standard input, one on each line; blank lines are ignored."""
    lines = sys.stdin.buffer.read().removeprefix(codecs.BOM_UTF8).splitlines()
    return [_existing_path(os.fsdecode(line)) for line in lines if line.strip()]


def _existing_path(name: str) -> Path:
    """The path of a line of a list, which may have been written on Windows."""
    path, with_slashes = Path(name), Path(name.replace('\\', '/'))
    is_other = with_slashes != path and not os.path.exists(path) and os.path.exists(with_slashes)
    return with_slashes if is_other else path


def _images_at(path: Path) -> list[Path]:
    """The images below a folder; a file as it is."""
    return [x for x in _files_below(path) if is_image_file(x.name)] if os.path.isdir(path) else [path]


def _files_below(folder: Path) -> list[Path]:
    """The files below a folder, in linked folders too, each folder once, but for hidden files and folders."""
    files, visited = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):  # Path.rglob follows no links before Python 3.13
        real = os.path.realpath(parent)
        if real in visited:  # links may form a circle
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        files += [Path(parent, name) for name in names if not is_hidden(name)]
    return sorted(files)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, such as `.DS_Store`, or was added to a zip archive by macOS."""
    return name.startswith('.') or name == '__MACOSX'


# The remedy for images of unsupported formats
CONVERT = 'convert images of other kinds, such as HEIC or RAW, to JPEG or PNG'


def report_other_files(paths: Iterable[Path]) -> None:
    """Say on stderr how many files below these folders are not images, by the suffix of their names."""
    if kinds := _other_kinds(paths):
        print(f'{kinds.total()} file(s) of other kinds left out ({describe_kinds(kinds)})', file=sys.stderr)


def _other_kinds(paths: Iterable[Path]) -> Counter[str]:
    """Numbers of files below folders that are no images, by suffix."""
    files = (file for path in paths if os.path.isdir(path) for file in _files_below(path))
    return Counter(kind_of(file.name) for file in files if not is_image_file(file.name))


def kind_of(name: str) -> str:
    """A file's suffix in small letters, or 'no suffix'."""
    return os.path.splitext(name)[1].lower() or 'no suffix'


def describe_kinds(kinds: Counter[str]) -> str:
    """Numbers of files by suffix, in words; of many suffixes, the five most frequent ones."""
    frequent = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))[:5]
    parts = [f'{count} {printable(kind)}' for kind, count in frequent]
    return ', '.join([*parts, 'others'] if len(kinds) > 5 else parts)


def choose_images(images: Sequence[Item], limit: int | None) -> Sequence[Item]:
    """Choose at most `limit` images at random, always the same ones, and keep their order; None takes all."""
    if limit is None or limit >= len(images):
        return images
    return [images[i] for i in sorted(random.Random(0).sample(range(len(images)), limit))]
