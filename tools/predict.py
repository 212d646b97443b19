"""Classify images with a trained network, print the guesses and draw them on one sheet.

    python -m tools.predict --cfg configs/msg_digits_p2_win7_56.yaml --resume <checkpoint> --output sheet.png <images>

An image argument is a file or a folder; in a tree of class folders, an image's folder is taken for its class.
"""

import random
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import nn
from torchvision.datasets.folder import is_image_file
from yacs.config import CfgNode

from checkpoint import load_checkpoint, load_weights
from config import load_config
from data.build import build_transform, image_mode
from data.image_folder import DataError, load_image
from launcher import choose_device
from models import build_model
from tools.arguments import pictures_parser
from utils import mistakes_in_one_line


class Guess(NamedTuple):
    """An image, the most likely class with its probability, and the class its folder says, if any."""

    path: Path
    name: str
    probability: float
    truth: str | None


def find_images(places: list[Path]) -> list[Path]:
    """The images among files and below folders.

    Raises:
        DataError: there are none, or a place does not exist.
    """
    images = []
    for place in places:
        if not place.exists():
            raise DataError(f'{place} does not exist: give image files or folders')
        images += sorted(filter(lambda path: is_image_file(path.name), place.rglob('*'))) if place.is_dir() else [place]
    if not images:
        raise DataError(f'no images in {", ".join(map(str, places))}')
    return images


def some_of(images: list[Path], limit: int | None) -> list[Path]:
    """So many of the images, chosen at random but always the same; None takes all."""
    return images if limit is None or limit >= len(images) else sorted(random.Random(0).sample(images, limit))


@torch.inference_mode()
def predict(
    config: CfgNode,
    model: nn.Module,
    classes: list[str],
    images: list[Path],
    device: torch.device,
    batch_size: int = 64,
) -> list[Guess]:
    """Classify images, prepared as for evaluation.

    Args:
        config: of the network.
        model: the network, with its weights, on the device.
        classes: names of the network's classes.
        images: files.
        device: where to compute.
        batch_size: images at a time.
    """
    transform, mode = build_transform(config, is_train=False), image_mode(config)
    model.eval()
    guesses = []
    for start in range(0, len(images), batch_size):
        paths = images[start : start + batch_size]
        batch = torch.stack([transform(load_image(path, mode, upright=True)) for path in paths]).to(device)
        probabilities, labels = model(batch).softmax(dim=1).max(dim=1)
        for path, probability, label in zip(paths, probabilities.tolist(), labels.tolist(), strict=True):
            truth = path.parent.name if path.parent.name in classes else None
            guesses.append(Guess(path, classes[label], probability, truth))
    return guesses


def draw_sheet(guesses: list[Guess], output: Path, columns: int = 8) -> None:
    """Draw images with their guesses: green where the folder's class agrees, red where not, black without one."""
    rows = -(-len(guesses) // columns)
    figure = Figure(figsize=(1.4 * columns, 1.7 * rows), layout='constrained')
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis('off')
    for axes, guess in zip(grid.flat, guesses, strict=False):
        axes.imshow(load_image(guess.path, upright=True))
        wrong = guess.truth not in (None, guess.name)
        axes.set_title(
            f'{guess.name} ({guess.probability:.0%})' + (f'\nis {guess.truth}' if wrong else ''),
            color='black' if guess.truth is None else 'firebrick' if wrong else 'darkgreen',
            fontsize=9,
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=100)


def main() -> None:
    """Read the command line, print a line an image and draw the sheet."""
    parser = pictures_parser(__doc__.splitlines()[0])
    parser.add_argument('--output', type=Path, metavar='FILE', help='sheet of the images and guesses to draw')
    args = parser.parse_intermixed_args()
    with mistakes_in_one_line():
        config = load_config(args.cfg, args.opts)
        device = choose_device(config.DEVICE, None, config.LOCAL_RANK)
        model = build_model(config).to(device)
        checkpoint = load_checkpoint(args.resume)
        load_weights(model, checkpoint, args.resume)
        images = some_of(find_images(args.images), args.limit)
        classes = checkpoint.get('classes') or [str(label) for label in range(config.MODEL.NUM_CLASSES)]
        guesses = predict(config, model, classes, images, device)
    for guess in guesses:
        print(f'{guess.path}\t{guess.name}\t{guess.probability:.3f}')
    judged = [guess for guess in guesses if guess.truth is not None]
    if judged:
        print(f'{sum(guess.name == guess.truth for guess in judged)} of {len(judged)} right')
    if args.output:
        try:
            draw_sheet(guesses, args.output)
        except (OSError, ValueError) as error:  # a folder that is a file, a format that is none
            sys.exit(f'error: {args.output}: {error}')
        print(args.output)


if __name__ == '__main__':
    main()
