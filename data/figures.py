"""Figures that tasks and tools share: a sheet of images with their predicted classes, and a confusion matrix."""

import textwrap
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from PIL import Image

from data.drawn_text import fit_font, shorten

MAX_NAME = 30  # characters of a class on the axes
MAX_NAMED = 100  # classes whose names stand on the axes
MAX_CONFUSIONS = 40  # listed next to the matrix of more classes
_MAX_LARGE = 20  # classes of a confusion matrix with large numbers, and with names on two sides only
_CELL = 0.36  # inches of a class in a confusion matrix
_LINE = 18  # characters that are as wide as an image
_THUMBNAIL = 256  # pixels: twice those of an image on the sheet


class SheetImage(NamedTuple):
    """An image of a sheet.

    Attributes:
        image: the image.
        predicted: name of the predicted class.
        probability: of the predicted class.
        label: name of the true class; None if it is unknown.
        is_unknown: whether the image probably shows none of the classes that the network knows.
    """

    image: Image.Image
    predicted: str
    probability: float
    label: str | None
    is_unknown: bool = False

    def title(self, predicted: str, label: str | None) -> str:
        """The predicted class, and the true one where it differs, by their names as they can be drawn."""
        lines = _wrap(predicted, f' ({self.probability:.0%})')
        if self.label not in (None, self.predicted):
            lines += _wrap(f'is {label}')
        if self.is_unknown:
            lines.insert(0, 'no known class?')
        return '\n'.join(lines)

    @property
    def color(self) -> str:
        """Green if the prediction is right, red if it is wrong, black if the true class is unknown."""
        if self.label is None:
            return 'black'
        return 'darkgreen' if self.label == self.predicted else 'firebrick'


def thumbnail(image: Image.Image) -> Image.Image:
    """A copy of an image with as many pixels as a sheet shows of it."""
    image = image.copy()
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return image


def draw_sheet(images: Sequence[SheetImage], note: str = '', columns: int = 8) -> Figure:
    """Draw a sheet of images whose titles are their predicted classes.

    Args:
        images: from left to right, row by row.
        note: text above the images.
        columns: images in a row.
    """
    rows = max(-(-len(images) // columns), 1)
    figure = Figure(figsize=(1.4 * columns, 1.7 * rows + (0.3 if note else 0)), layout='constrained')
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis('off')
    shown = list({name for x in images for name in (x.predicted, x.label) if name is not None})
    texts, font = fit_font(shown)
    names = dict(zip(shown, texts, strict=True))
    for axes, entry in zip(grid.flat, images, strict=False):
        axes.imshow(entry.image)
        title = entry.title(names[entry.predicted], names.get(entry.label))
        axes.set_title(title, color=entry.color, font=font, fontsize=9, parse_math=False)
    figure.suptitle(note, fontsize=10)
    return figure


def _wrap(name: str, end: str = '') -> list[str]:
    """Lines of an image's width; characters of East Asia are twice as wide as others."""
    is_wide = any(unicodedata.east_asian_width(char) in 'WF' for char in name)
    line = _LINE // 2 if is_wide else _LINE
    return textwrap.wrap(shorten(name, 2 * line - 2) + end, line)


def draw_confusion(counts: np.ndarray, names: Sequence[str], rows: str, columns: str) -> Figure:
    """Draw a confusion matrix: colours are fractions of a row, numbers are counts. Its size grows with the classes.

    More than `MAX_NAMED` classes have no room for their names: ticks are their indices, and the most frequent
    confusions are listed next to the matrix.

    Args:
        counts: (K, K), a row for each true class.
        names: of the classes.
        rows: label of the rows.
        columns: label of the columns.
    """
    names, face = fit_font([shorten(name, MAX_NAME) for name in names])
    fractions = counts / counts.sum(axis=1, keepdims=True).clip(1)
    if len(names) > MAX_NAMED:
        figure = Figure(figsize=(21, 13), layout='constrained')
        axes, text = figure.subplots(1, 2, width_ratios=(13, 7))
        # A small fraction stays visible: by the norm, and as no pixel is a mean of cells
        axes.imshow(fractions, cmap='Blues', norm=PowerNorm(0.4, 0, 1), interpolation='nearest')
        axes.set_xlabel(f'{columns}, by index of the class')
        axes.set_ylabel(f'{rows}, by index of the class')
        text.axis('off')
        lines = [f'{names[i]} → {names[j]}: {n} of {total}' for i, j, n, total in confusions(counts)[:MAX_CONFUSIONS]]
        head = f'Most frequent confusions: {rows} → {columns}'
        text.text(0, 1, '\n'.join([head, '', *lines]), va='top', font=face, fontsize=11, parse_math=False)
        return figure
    count, font = len(names), 9 if len(names) <= _MAX_LARGE else 7
    edges = 2 if count > _MAX_LARGE else 1  # of the axes that names stand on
    labels = max(map(_width, names)) * 0.62 * 9 / 72 + 0.5  # inches; a character is about 0.62 of its font's size wide
    size = max(_CELL * count, 2) + edges * labels
    figure = Figure(figsize=(size, size), layout='constrained')
    axes = figure.subplots()
    norm = PowerNorm(0.5, 0, 1)  # a small fraction stays visible
    axes.imshow(fractions, cmap='Blues', norm=norm, interpolation='nearest')
    axes.set(xlabel=columns, ylabel=rows)
    axes.set_xticks(range(count), names, rotation=90, font=face, fontsize=9, parse_math=False)
    axes.set_yticks(range(count), names, font=face, fontsize=9, parse_math=False)
    # Names on both sides of a large matrix, as its rows are too long to follow
    axes.tick_params(length=0, labeltop=edges == 2, labelright=edges == 2)
    between = np.arange(count - 1) + 0.5
    for draw_lines in (axes.hlines, axes.vlines):
        draw_lines(between, -0.5, count - 0.5, color='gainsboro', linewidth=0.5)
    for i, j in np.argwhere(counts).tolist():
        color = 'white' if norm(fractions[i, j]) > 0.55 else 'black'
        text = axes.text(j, i, str(counts[i, j]), ha='center', va='center', color=color, fontsize=font)
        text.set_in_layout(False)  # thousands of them take seconds to lay out
    return figure


def _width(text: str) -> int:
    """Characters of a text; those of East Asia are twice as wide as others."""
    return sum(2 if unicodedata.east_asian_width(char) in 'WF' else 1 for char in text)


def confusions(counts: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Pairs of different classes in a confusion matrix (K, K), the most frequent first.

    Returns:
        Index of the true and of the predicted class, number of such images, and number of images of the true class.
    """
    wrong = counts - np.diag(np.diag(counts))
    i, j = wrong.nonzero()
    order = np.argsort(-wrong[i, j], kind='stable')
    totals = counts.sum(axis=1)
    return [(int(a), int(b), int(counts[a, b]), int(totals[a])) for a, b in zip(i[order], j[order], strict=True)]
