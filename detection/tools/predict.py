"""Find objects in images with a trained detector, print them and draw them.

    python -m detection.tools.predict --resume <checkpoint> --output DIR <images>

IMAGES are files, folders, quoted patterns, or - for a list of them on standard input; drawn images have their names,
and their paths within the folders.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from data.images import DataError, choose_images, decode_image, find_images, report_other_files
from data.inference import InferenceLoader, print_above_bar
from detection.config import TREE
from detection.draw import draw_detections
from detection.models import build_detector
from detection.models.masks import BoxMasks
from engine.inference import Predictor, load_predictor, prediction_parser
from utils import exit_on_user_error

EPILOG = """
example:
  python -m detection.tools.predict --resume ckpt_best.pth --output drawn photos

exit code: 0 done, 1 an error, 2 a wrong command line, 3 done but for images that cannot be read
"""


def decode(data: bytes, name: str) -> Tensor:
    """Pixels (3, H, W) of an encoded image, uint8."""
    return pil_to_tensor(decode_image(data, name))


@torch.inference_mode()
def detect(
    predictor: Predictor, images: InferenceLoader
) -> Iterator[tuple[Path, Tensor, dict[str, Tensor | BoxMasks]]]:
    """Each image's file, pixels (3, H, W) in [0, 1], and detections, highest scores first.

    Args:
        predictor: the detector.
        images: loads one image at a time, with `decode`.
    """
    for batch in images:
        if batch.images is not None:
            image = batch.images[0].to(predictor.device).float() / 255
            [detections] = predictor.model.detect([image])
            yield images.paths[batch.indices[0]], image, detections


def output_paths(paths: list[Path], output: Path) -> dict[Path, Path]:
    """Where to draw each of the images among files and below folders.

    Raises:
        DataError: there are no images, or drawing would overwrite one of them or another drawing.
    """
    drawings = {}
    for path in paths:
        if path.resolve() in (output.resolve(), *output.resolve().parents):
            raise DataError(f'--output {output} is in {path}, with the images: write another')
        for image in find_images([path]):
            drawings[image] = output / (image.relative_to(path) if path.is_dir() else image.name)
    images = {image.resolve() for image in drawings}
    for drawing in drawings.values():
        if drawing.resolve() in images:
            raise DataError(f'{drawing} would be overwritten: write another --output')
    if len(set(drawings.values())) < len(drawings):
        raise DataError('several images have the same name: give the folder that holds them all, or fewer of them')
    return drawings


def main() -> None:
    """Read the command line, print one line per object and draw the images."""
    parser = prediction_parser(__doc__.splitlines()[0], EPILOG)
    add = parser.add_argument
    add('--output', type=Path, required=True, metavar='DIR', help='folder to draw the images into')
    add('--score', type=float, metavar='S', help='minimum score of what is printed and drawn (SHOW_SCORE)')
    args = parser.parse_intermixed_args()
    with exit_on_user_error():
        predictor = load_predictor(args, TREE, build_detector, first_label=1)
        min_score = predictor.config.SHOW_SCORE if args.score is None else args.score
        drawings = output_paths(args.images, args.output)
        report_other_files(args.images)
        paths = choose_images(sorted(drawings), args.limit)
        images = InferenceLoader(predictor.config, paths, decode, workers=args.workers)
        for path, image, detections in detect(predictor, images):
            columns = (detections[key].tolist() for key in ('boxes', 'labels', 'scores'))
            for box, label, score in zip(*columns, strict=True):
                if score >= min_score:
                    corners = ' '.join(f'{x:.1f}' for x in box)
                    print_above_bar(f'{path}\t{predictor.class_names[label - 1]}\t{score:.3f}\t{corners}')
            try:
                drawings[path].parent.mkdir(parents=True, exist_ok=True)
                draw_detections(image, detections, predictor.class_names, min_score).save(drawings[path])
            except (OSError, ValueError) as error:
                sys.exit(f'error: {drawings[path]}: {error}')
    print(args.output)
    images.exit_if_unreadable()


if __name__ == '__main__':
    main()
