"""A contact sheet: small images with their predicted classes."""

import textwrap
from collections.abc import Iterable, Iterator, Sequence

from matplotlib.figure import Figure

from data.images import choose_images, load_image
from tools.prediction_formats import Prediction

MAX_IMAGES = 96
_LINE = 22  # characters that are as wide as an image
_THUMBNAIL = 256  # pixels: twice those of an image on the sheet


class ContactSheet:
    """Collects predictions on their way, and draws their images: at most `MAX_IMAGES`, a random but fixed choice.

    Args:
        count: number of predictions.
        class_names: of the network.
    """

    def __init__(self, count: int, class_names: Sequence[str]):
        self.class_names = class_names
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
        for axes, prediction in zip(grid.flat, self.predictions, strict=False):
            image = load_image(prediction.path, upright=True)
            image.thumbnail((_THUMBNAIL, _THUMBNAIL))
            axes.imshow(image)
            color = 'darkgreen' if prediction.label == prediction.indices[0] else 'firebrick'
            color = 'black' if prediction.label is None else color
            axes.set_title(self._title(prediction), color=color, fontsize=9, parse_math=False)
        figure.suptitle(self.note, fontsize=10)
        return figure

    def _title(self, prediction: Prediction) -> str:
        name, index, probability = next(prediction.top(self.class_names))
        lines = textwrap.wrap(f'{_shorten(name)} ({probability:.0%})', _LINE)
        if prediction.label not in (None, index):
            lines += textwrap.wrap(f'is {_shorten(self.class_names[prediction.label])}', _LINE)
        return '\n'.join(lines)


def _shorten(name: str) -> str:
    return name if len(name) < 2 * _LINE else f'{name[: 2 * _LINE - 5]}…'
