"""Find objects on pictures with a trained detector, print them and draw them.

    python -m tools.predict_detection --cfg detection/configs/digits.yaml --resume <checkpoint> --output DIR <images>

An image argument is a file or a folder; drawn images have the names, and in the folder the places, of the given ones.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from checkpoint import load_checkpoint, load_weights
from data.image_folder import DataError, load_image
from detection.config import load_config
from detection.draw import draw_detections
from detection.models import build_detector
from launcher import choose_device
from tools.arguments import pictures_parser
from tools.predict import find_images, some_of
from utils import mistakes_in_one_line


@torch.inference_mode()
def detect(
    model: nn.Module, images: list[Path], device: torch.device
) -> Iterator[tuple[Path, Tensor, dict[str, Tensor]]]:
    """Each image's file, pixels (3, H, W) in 0 to 1, and detections, with the likeliest first.

    Args:
        model: the detector, with its weights, on the device.
        images: files.
        device: where to compute.
    """
    model.eval()
    for path in images:
        image = pil_to_tensor(load_image(path, upright=True)).to(device).float() / 255
        [found] = model([image])
        yield path, image, found


def drawn_paths(places: list[Path], output: Path) -> dict[Path, Path]:
    """Where to draw each of the images among files and below folders.

    Raises:
        DataError: there are none, or drawing would overwrite one of them or another drawing.
    """
    paths = {}
    for place in places:
        if place.resolve() in (output.resolve(), *output.resolve().parents):
            raise DataError(f'--output {output} is in {place}, with the images: write another')
        for image in find_images([place]):
            paths[image] = output / (image.relative_to(place) if place.is_dir() else image.name)
    images = {image.resolve() for image in paths}
    for drawn in paths.values():
        if drawn.resolve() in images:
            raise DataError(f'{drawn} would be overwritten: write another --output')
    if len(set(paths.values())) < len(paths):
        raise DataError('several images have the same name: give the folder that they are all in, or fewer of them')
    return paths


def main() -> None:
    """Read the command line, print a line an object and draw the images."""
    parser = pictures_parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add('--output', type=Path, required=True, metavar='DIR', help='folder to draw the images into')
    add('--score', type=float, metavar='S', help='lowest score that is told and drawn (SHOW_SCORE)')
    args = parser.parse_intermixed_args()
    with mistakes_in_one_line():
        config = load_config(args.cfg, args.opts)
        least = config.SHOW_SCORE if args.score is None else args.score
        device = choose_device(config.DEVICE, None, config.LOCAL_RANK)
        model = build_detector(config).to(device)
        checkpoint = load_checkpoint(args.resume)
        load_weights(model, checkpoint, args.resume)
        names = checkpoint.get('classes') or [str(label) for label in range(1, config.MODEL.NUM_CLASSES + 1)]
        paths = drawn_paths(args.images, args.output)
        for path, image, found in detect(model, some_of(sorted(paths), args.limit), device):
            for box, label, score in zip(*(found[key].tolist() for key in ('boxes', 'labels', 'scores')), strict=True):
                if score >= least:
                    print(f'{path}\t{names[label - 1]}\t{score:.3f}\t{" ".join(f"{x:.1f}" for x in box)}')
            try:
                paths[path].parent.mkdir(parents=True, exist_ok=True)
                draw_detections(image, found, names, least).save(paths[path])
            except (OSError, ValueError) as error:
                sys.exit(f'error: {paths[path]}: {error}')
    print(args.output)


if __name__ == '__main__':
    main()
