"""Output files of tools: checked before the work, and written atomically after it, or as results come."""

import io
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

import matplotlib
from matplotlib.figure import Figure

from text_files import read_json
from utils import OutputError, UserError, atomic_write


def prepare_output(path: Path) -> None:
    """Make the folder of a file that is to be written.

    Raises:
        OutputError: the folder cannot be made or written to, or something that is not a file has the name.
    """
    if path.exists() and not path.is_file():
        raise OutputError(f'{path} is a {"folder" if path.is_dir() else "device"}: give the name of a file')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise OutputError(f'{path}: {error.strerror}: write to another folder') from error


def refuse_overwriting(outputs: Iterable[Path], checkpoint: str | None, images: Iterable[Path] = ()) -> None:
    """Check that outputs differ from each other and from what is read.

    Raises:
        OutputError: two files are the same.
    """
    outputs = list(outputs)
    if len({path.resolve() for path in outputs}) < len(outputs):
        raise OutputError(f'two outputs have the name {outputs[0]}: write to another file')
    existing = {path.resolve(): path for path in outputs if path.exists()}
    if checkpoint and Path(checkpoint).resolve() in existing:
        raise OutputError(f'{checkpoint} is the checkpoint and would be overwritten: write to another file')
    names = {path.name for path in existing}
    for image in images if existing else ():
        if image.name in names and image.resolve() in existing:
            raise OutputError(f'{image} is one of the images and would be overwritten: write to another file')


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


def write_records(path: Path, content: Mapping[str, Any], key: str) -> None:
    """Write JSON whose list `key` comes last, with a line for each of its items.

    Raises:
        OutputError: it cannot be written.
    """
    head = json.dumps({name: value for name, value in content.items() if name != key}, indent=1).removesuffix('\n}')
    write_text(path, [head, f',\n "{key}": [\n  ', ',\n  '.join(map(json.dumps, content[key])), '\n ]\n}\n'])


def read_records(
    path: Path, report: Callable[[dict[str, Any]], Any], name: str, error_class: type[UserError]
) -> dict[str, Any]:
    """Read a JSON file of results that a tool has written.

    Args:
        path: the file.
        report: what makes a report of the results; they are refused if it fails.
        name: the usual name of the file, for error messages.
        error_class: class of the errors that are raised.

    Raises:
        error_class: the file cannot be read, or there is no report of what it holds.
    """
    results = read_json(path, str(path), error_class, f'give a {name}')
    try:
        report(results)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise error_class(f'{path} holds no results that this version reads: give a {name}') from error
    return results


def stream_text(path: Path, parts: Iterable[str], end: str = '') -> None:
    """Write a text as its parts come, so that the file holds what there is if the program is interrupted.

    Args:
        path: the file.
        parts: of the text; names of files in them need not be Unicode.
        end: written after the last part, and after the last one before an interrupt or error.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        with path.open('wb') as file:
            try:
                for part in parts:
                    file.write(part.encode(errors='surrogateescape'))
                    file.flush()
            finally:
                file.write(end.encode())
    except BrokenPipeError:  # of another output
        raise
    except OSError as error:
        raise OutputError(f'{path}: {error.strerror}: write to another folder, or make room') from error


def save_figure(figure: Figure, path: Path, dpi: int) -> None:
    """Write a figure in the format that the suffix names.

    SVG and PDF files have no date, no version and no random names, so that the same figure gives the same file. A PDF
    has TrueType fonts, which publishers ask for; an SVG has texts as outlines, which look the same on every machine.
    Once a figure was saved as SVG or PDF, its layout stays as it is.

    Raises:
        OutputError: it cannot be written.
    """
    suffix = path.suffix[1:].lower()
    write = _save_svg if suffix == 'svg' else Figure.savefig
    left_out = {'pdf': ('CreationDate', 'Creator', 'Producer'), 'svg': ('Date', 'Creator')}.get(suffix, ())
    metadata = dict.fromkeys(left_out) or None
    settings = {'pdf.fonttype': 42, 'svg.fonttype': 'path', 'svg.hashsalt': 'msg'}
    if left_out:
        _freeze_layout(figure)
    try:
        with matplotlib.rc_context(settings):
            atomic_write(path, lambda file: write(figure, file, format=suffix, dpi=dpi, metadata=metadata))
    except OSError as error:
        raise OutputError(f'{path}: {error.strerror}: write to another folder, or make room') from error


def _freeze_layout(figure: Figure) -> None:
    """Lay out a figure for the last time, and round the positions of its axes.

    Matplotlib's constrained layout adds numbers in the order of memory addresses, so that the last digits of positions
    differ between processes, and with them the files.
    """
    if figure.get_layout_engine() is None:
        return
    figure.draw_without_rendering()
    figure.set_layout_engine('none')
    for axes in figure.axes:
        axes.set_position([round(value, 9) for value in axes.get_position(original=True).bounds])


def _save_svg(figure: Figure, file: BinaryIO, **options: Any) -> None:
    """Write a figure as SVG, with its names numbered.

    Matplotlib makes names from hashes of positions, whose last digits differ between processes in figures with
    subfigures: see `_freeze_layout`.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, **options)
    text = buffer.getvalue().decode()
    names = dict.fromkeys(re.findall('id="([A-Za-z]+[0-9a-f]{10})"', text))
    numbered = {name: f'{name[:-10]}{number}' for number, name in enumerate(names, start=1)}
    file.write(re.sub(r'\b[A-Za-z]+[0-9a-f]{10}\b', lambda found: numbered.get(found[0], found[0]), text).encode())
