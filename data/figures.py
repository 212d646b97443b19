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
MAX_CONFUSIONS = 40  # listed beside the matrix of more classes
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
        note: above them.
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
    """Draw a confusion matrix: colours are fractions of a row, numbers are counts where there is room for them.

    More than `MAX_NAMED` classes have no room for their names: ticks are their indices, and the most frequent
    confusions are listed beside the matrix.

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
    size = min(max(0.32 * len(names) + 2, 4), 24)
    figure = Figure(figsize=(size + 1, size), layout='constrained')
    axes = figure.subplots()
    axes.imshow(fractions, cmap='Blues', vmin=0, vmax=1)
    axes.set(xlabel=columns, ylabel=rows)
    font = max(min(9, 500 / len(names)), 3)
    axes.set_xticks(range(len(names)), names, rotation=90, font=face, fontsize=font, parse_math=False)
    axes.set_yticks(range(len(names)), names, font=face, fontsize=font, parse_math=False)
    if len(names) <= 40:
        for (i, j), count in np.ndenumerate(counts):
            if count:
                color = 'white' if fractions[i, j] > 0.5 else 'black'
                axes.text(j, i, str(count), ha='center', va='center', color=color, fontsize=font)
    return figure


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
