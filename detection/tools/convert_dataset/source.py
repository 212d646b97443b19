"""What readers of other programs' data return, and how they decode texts and find images."""

import codecs
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote

from data import DataError
from data.images import existing_path, open_regular


class Item(NamedTuple):
    """An image and its objects.

    Attributes:
        path: of the image.
        name: of the image in the dataset, with folders.
        size: width and height, in pixels, upright.
        objects: each with `category`, a name, and COCO's `bbox`, `segmentation` if it has a mask, and `iscrowd`.
    """

    path: Path
    name: str
    size: tuple[int, int]
    objects: list[dict[str, Any]]


@dataclass
class Source:
    """A dataset of another program.

    Attributes:
        categories: names, in the order of their labels.
        splits: images by the split's name, `train`, `val` or `test`.
        notes: what the user should know: choices that the files leave open, and what is left out.
    """

    categories: list[str]
    splits: dict[str, list[Item]]
    notes: list[str] = field(default_factory=list)


# UTF-32 first: its mark begins with that of UTF-16.
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: 'utf-8-sig',
    codecs.BOM_UTF32_LE: 'utf-32',
    codecs.BOM_UTF32_BE: 'utf-32',
    codecs.BOM_UTF16_LE: 'utf-16',
    codecs.BOM_UTF16_BE: 'utf-16',
}


def decode_file(path: Path, find_encoding: Callable[[bytes], str] = lambda _: 'utf-8') -> str:
    """Read a text file.

    Args:
        path: the file.
        find_encoding: returns the encoding of a content without a byte order mark.

    Raises:
        DataError: it cannot be read, or is in another encoding.
    """
    try:
        with open_regular(path) as file:
            content = file.read()
    except OSError as error:
        raise DataError(f'{path}: {error.strerror}') from error
    encoding = next((x for mark, x in _BYTE_ORDER_MARKS.items() if content.startswith(mark)), None)
    encoding = encoding or find_encoding(content)
    try:
        return content.decode(encoding)
    except (UnicodeError, LookupError) as error:
        raise DataError(f'{path} is not text in {encoding.upper()}: save it as UTF-8') from error


def read_lines(path: Path) -> list[str]:
    """The lines of a text file in UTF-8 or with a byte order mark, without spaces around them.

    Raises:
        DataError: it cannot be read.
    """
    return [line.strip() for line in decode_file(path).splitlines()]


def find_image(name: str, folders: Sequence[Path]) -> tuple[Path, str] | None:
    """Find an image by the name that an annotation file gives it.

    Backslashes may separate folders, and characters may be percent-encoded. Of a path that does not exist here, such as
    one of another computer or a URL, the last part is looked for.

    Args:
        name: a file name with or without folders, a path or a URL.
        folders: that may hold the image.

    Returns:
        The image, and its name in one of the folders.
    """
    spellings = dict.fromkeys(x for text in (name, unquote(name)) for x in (text, text.replace('\\', '/')))
    last_parts = dict.fromkeys(PurePosixPath(x).name for x in spellings)
    choices = ((existing_path(folder, x), x) for x in (*spellings, *last_parts) if x for folder in folders)
    return next((choice for choice in choices if os.path.isfile(choice[0])), None)
