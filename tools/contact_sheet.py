"""A contact sheet: small images with their predicted classes."""

import textwrap
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence

from matplotlib.figure import Figure

from data.drawn_text import fit_font, shorten
from data.images import choose_images, load_image
from tools.prediction_formats import Prediction

MAX_IMAGES = 96
_LINE = 18  # characters that are as wide as an image
_THUMBNAIL = 256  # pixels: twice those of an image on the sheet


class ContactSheet:
    """Collects predictions on their way, and draws their images: at most `MAX_IMAGES`, a random but fixed choice.

    Args:
        count: number of predictions.
        class_names: of the network.
        upright: turn images as their EXIF orientation says, where the network reads them so.
    """

    def __init__(self, count: int, class_names: Sequence[str], upright: bool = True):
        self.class_names, self.upright = class_names, upright
        self.chosen = set(choose_images(range(count), MAX_IMAGES))
        self.note = f'{MAX_IMAGES} of {count:,} images, a random choice' if count > MAX_IMAGES else ''
        self.predictions: list[Prediction] = []

    def collect(self, predictions: Iterable[Prediction]) -> Iterator[Prediction]:
        """The predictions as they are."""
        for number, prediction in enumerate(predictions):
            if number in self.chosen and not prediction.error:
                self.predictions.append(prediction)
            yield prediction

    def draw(self, columns: int = 8) -> Figure:
        """The sheet: titles are green where right, red where wrong, black where the right class is unknown.

        Raises:
            DataError: an image can no longer be read.
        """
        rows = max(-(-len(self.predictions) // columns), 1)
        figure = Figure(figsize=(1.4 * columns, 1.7 * rows + (0.3 if self.note else 0)), layout='constrained')
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.axis('off')
        shown = {i for x in self.predictions for i in (x.indices[0], x.label) if i is not None}
        names, font = fit_font([self.class_names[index] for index in shown])
        names = dict(zip(shown, names, strict=True))
        for axes, prediction in zip(grid.flat, self.predictions, strict=False):
            image = load_image(prediction.path, upright=self.upright)
            image.thumbnail((_THUMBNAIL, _THUMBNAIL))
            axes.imshow(image)
            color = 'darkgreen' if prediction.label == prediction.indices[0] else 'firebrick'
            color = 'black' if prediction.label is None else color
            axes.set_title(_title(prediction, names), color=color, font=font, fontsize=9, parse_math=False)
        figure.suptitle(self.note, fontsize=10)
        return figure


def _title(prediction: Prediction, names: Mapping[int, str]) -> str:
    """The predicted class, and the right one where it differs; `names` of both by their indices."""
    index, probability = prediction.indices[0], prediction.probabilities[0]
    lines = _wrap(names[index], f' ({probability:.0%})')
    if prediction.label not in (None, index):
        lines += _wrap(f'is {names[prediction.label]}')
    return '\n'.join(lines)


def _wrap(name: str, end: str = '') -> list[str]:
    """Lines of an image's width; characters of East Asia are twice as wide as others."""
    is_wide = any(unicodedata.east_asian_width(char) in 'WF' for char in name)
    line = _LINE // 2 if is_wide else _LINE
    return textwrap.wrap(shorten(name, 2 * line - 2) + end, line)
