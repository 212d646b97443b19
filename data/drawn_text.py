"""Names of classes and files in drawings: what the fonts of this machine can show.

Matplotlib's own font, DejaVu Sans, has no Chinese, Japanese or Korean characters. Where names have characters that it
lacks, an installed font that has all of them is taken. Without one, such names are drawn in Latin letters, and a note
on stderr says so.
"""

import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
from anyascii import anyascii
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

from utils import printable

DEJAVU = Path(matplotlib.get_data_path()) / 'fonts' / 'ttf' / 'DejaVuSans.ttf'


class DrawnText(NamedTuple):
    """Texts as they can be drawn, and the file of a font that has all of their characters.

    Matplotlib takes the font as `font=`, next to `parse_math=False`: without it, $ and _ would have a meaning.
    """

    texts: list[str]
    font: Path


def fit_font(texts: Sequence[str]) -> DrawnText:
    """Choose a font for texts; control characters and undecodable bytes in them are escaped, line breaks are kept."""
    texts = ['\n'.join(map(printable, str(text).split('\n'))) for text in texts]
    missing = {char for text in texts for char in text if char != '\n'} - _characters(DEJAVU)
    if not missing:
        return DrawnText(texts, DEJAVU)
    font = _installed_font(frozenset(char for text in texts for char in text if char != '\n'))
    if font:
        return DrawnText(texts, font)
    _note_missing_font()
    return DrawnText([text if missing.isdisjoint(text) else _latin(text) for text in texts], DEJAVU)


def shorten(text: str, length: int) -> str:
    """Shorten a text to at most `length` characters, with an ellipsis in its middle, as names differ at their ends."""
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f'{text[:head]}…{text[len(text) - (length - 1 - head) :]}'


def _latin(text: str) -> str:
    """A text in Latin letters; characters that have none by their code."""
    return '\n'.join(anyascii(line) or ascii(line)[1:-1] for line in text.split('\n'))


@cache
def _characters(font: Path) -> frozenset[str]:
    """Characters that a font has."""
    return frozenset(map(chr, FT2Font(str(font)).get_charmap()))


@cache
def _installed_font(characters: frozenset[str]) -> Path | None:
    """A font of the system with all of some characters, a regular one first; None if there is none."""
    for font in _installed_fonts():
        if characters <= _characters(font):
            return font
    return None


@cache
def _installed_fonts() -> list[Path]:
    """Fonts of the system that can be read, regular ones first."""
    fonts = []
    for path in sorted(font_manager.findSystemFonts()):
        try:
            fonts.append((FT2Font(path).style_name not in ('Regular', 'Normal', 'Book', 'Medium'), Path(path)))
        except (OSError, RuntimeError):  # such as a colour font of bitmaps
            continue
    return [path for _, path in sorted(fonts)]


@cache
def _note_missing_font() -> None:
    """Say on stderr, once in a program, that some names are drawn in Latin letters."""
    print(
        'no font here has all characters of the names: some are drawn in Latin letters; install a font that has them, '
        'such as Noto Sans CJK',
        file=sys.stderr,
    )
