"""Classify images with a trained network, print the predictions and draw them on one sheet.

    python -m tools.predict --resume <checkpoint> --output sheet.png <images>

IMAGES are files or folders; in a tree of class folders, an image's folder is taken for its class.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from PIL import Image

from config import TREE
from data.images import ReadableImages, choose_images, find_images, load_image, report_other_files
from data.transforms import build_transform, image_mode
from engine.inference import Predictor, load_predictor, prediction_parser
from engine.trainer import chunked
from models import build_model
from utils import exit_on_user_error


class Prediction(NamedTuple):
    """An image, its most likely class with its probability, and the class its folder names, if any."""

    path: Path
    name: str
    probability: float
    label: str | None


@torch.inference_mode()
def predict(predictor: Predictor, images: Iterable[tuple[Path, Image.Image]], batch_size: int = 64) -> list[Prediction]:
    """Classify images, prepared as in evaluation.

    Args:
        predictor: the network.
        images: files with their images, in the network's mode.
        batch_size: images at a time.
    """
    config, model, class_names, device = predictor
    transform = build_transform(config, is_train=False)
    predictions = []
    for samples in chunked(((path, transform(image)) for path, image in images), batch_size):
        paths, inputs = zip(*samples, strict=True)
        probabilities, labels = model(torch.stack(inputs).to(device)).softmax(dim=1).max(dim=1)
        for path, probability, index in zip(paths, probabilities.tolist(), labels.tolist(), strict=True):
            label = path.parent.name if path.parent.name in class_names else None
            predictions.append(Prediction(path, class_names[index], probability, label))
    return predictions


def draw_sheet(predictions: list[Prediction], output: Path, columns: int = 8) -> None:
    """Draw images with their predictions: green where right, red where wrong, black without a label."""
    rows = -(-len(predictions) // columns)
    figure = Figure(figsize=(1.4 * columns, 1.7 * rows), layout='constrained')
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis('off')
    for axes, prediction in zip(grid.flat, predictions, strict=False):
        axes.imshow(load_image(prediction.path, upright=True))
        is_wrong = prediction.label not in (None, prediction.name)
        axes.set_title(
            f'{prediction.name} ({prediction.probability:.0%})' + (f'\nis {prediction.label}' if is_wrong else ''),
            color='black' if prediction.label is None else 'firebrick' if is_wrong else 'darkgreen',
            fontsize=9,
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=100)


def main() -> None:
    """Read the command line, print one line per image and draw the sheet."""
    parser = prediction_parser(__doc__.splitlines()[0])
    parser.add_argument('--output', type=Path, metavar='FILE', help='sheet of images and predictions to draw')
    args = parser.parse_intermixed_args()
    with exit_on_user_error():
        predictor = load_predictor(args, TREE, build_model, first_label=0)
        paths = choose_images(find_images(args.images), args.limit)
        report_other_files(args.images)
        images = ReadableImages(paths, image_mode(predictor.config))
        predictions = predict(predictor, images)
    for prediction in predictions:
        print(f'{prediction.path}\t{prediction.name}\t{prediction.probability:.3f}')
    labelled = [prediction for prediction in predictions if prediction.label is not None]
    if labelled:
        print(f'{sum(x.name == x.label for x in labelled)} of {len(labelled)} right')
    if args.output and predictions:
        try:
            draw_sheet(predictions, args.output)
        except (OSError, ValueError) as error:  # a file for a folder, an unknown format
            sys.exit(f'error: {args.output}: {error}')
        print(args.output)
    with exit_on_user_error():
        images.check()


if __name__ == '__main__':
    main()
