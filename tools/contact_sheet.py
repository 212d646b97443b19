"""A contact sheet: small images with their predicted classes."""

from collections.abc import Iterable, Iterator, Sequence

from matplotlib.figure import Figure

from data.figures import SheetImage, draw_sheet, thumbnail
from data.images import choose_images, load_image
from tools.prediction_formats import Prediction

MAX_IMAGES = 96


class ContactSheet:
    """Draws the images of predictions: at most `MAX_IMAGES`, chosen at random but always the same.

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
        """Yield the predictions unchanged, and keep those whose images are drawn."""
        for number, prediction in enumerate(predictions):
            if number in self.chosen and not prediction.error:
                self.predictions.append(prediction)
            yield prediction

    def draw(self, columns: int = 8) -> Figure:
        """The sheet: titles are green where right, red where wrong, black where the right class is unknown.

        Raises:
            DataError: an image can no longer be read.
        """
        shown = []
        for prediction in self.predictions:
            image = thumbnail(load_image(prediction.path, upright=self.upright))
            label = None if prediction.label is None else self.class_names[prediction.label]
            predicted, probability = self.class_names[prediction.indices[0]], prediction.probabilities[0]
            shown.append(SheetImage(image, predicted, probability, label, bool(prediction.is_unknown)))
        return draw_sheet(shown, self.note, columns)
