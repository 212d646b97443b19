"""Files that tools write: checked before the work, replaced in one step after it."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from matplotlib.figure import Figure

from utils import OutputError, atomic_write


def prepare_output(path: Path) -> None:
    """Make the folder of a file that is to be written.

    Raises:
        OutputError: the folder cannot be made, or something that is no file has the name.
    """
    if path.exists() and not path.is_file():
        raise OutputError(f'{path} is a {"folder" if path.is_dir() else "device"}: give the name of a file')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f'{path}: {error.strerror}: write to another folder') from error
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f'{path}: its folder cannot be written to: write to another one')


def prepare_figure(path: Path) -> None:
    """`prepare_output` for a figure, in a format that the suffix names.

    Raises:
        OutputError: see there, or the suffix is unknown.
    """
    formats = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix[1:].lower() not in formats:
        raise OutputError(f'{path} has no suffix of a picture: write .png or .svg, or one of {", ".join(formats)}')
    prepare_output(path)


def write_text(path: Path, parts: Iterable[str]) -> None:
    """Write a text as its parts come; names of files in it need not be Unicode.

    Raises:
        OutputError: it cannot be written.
    """

    def write(file: BinaryIO) -> None:
        for part in parts:
            file.write(part.encode(errors='surrogateescape'))

    try:
        atomic_write(path, write)
    except BrokenPipeError:  # of another output
        raise
    except OSError as error:
        raise OutputError(f'{path}: {error.strerror}: write to another folder, or make room') from error


def save_figure(figure: Figure, path: Path, dpi: int) -> None:
    """Write a figure in the format that the suffix names.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        atomic_write(path, lambda file: figure.savefig(file, format=path.suffix[1:].lower(), dpi=dpi))
    except OSError as error:
        raise OutputError(f'{path}: {error.strerror}: write to another folder, or make room') from error
