"""Write a dataset with as many images and objects as COCO, without its size: hard links to a few images.

    python -m tools.benchmark.coco_names --output output/coco_names

`annotations/instances_train2017.json` has 118,000 images of 640 x 480 pixels and 860,000 polygons of 22 points in 80
classes, 430 MB; `instances_val2017.json` has 5,000 images and 36,000 polygons. For `tools.benchmark.coco_start`.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tools.output_files import write_text
from tools.rehearsal.names import write_files
from utils import exit_on_user_error, home_path, positive_int, report_write_errors

WIDTH, HEIGHT = 640, 480
CLASSES = 80
POINTS = 22  # of a polygon
OBJECTS_PER_IMAGE = 860 / 118


def write_coco_names(output: Path, images: int, val_images: int) -> None:
    """Write two annotation files and the images that they name.

    Args:
        output: a new folder.
        images: training images.
        val_images: validation images.

    Raises:
        OutputError: it cannot be written.
    """
    rng = np.random.default_rng(0)
    with report_write_errors(output):
        sources = write_files(output / 'files', (WIDTH, HEIGHT), rng)
        (output / 'annotations').mkdir()
        for split, count in (('train2017', images), ('val2017', val_images)):
            (output / split).mkdir()
            for number in range(count):
                os.link(sources[number % len(sources)], f'{output}/{split}/{number:012d}.jpg')
            write_text(output / 'annotations' / f'instances_{split}.json', annotation_text(count, rng))


def annotation_text(images: int, rng: np.random.Generator) -> Iterator[str]:
    """Parts of the text of an annotation file.

    Args:
        images: number of images.
        rng: source of the objects.
    """
    records = [{'id': x, 'file_name': f'{x:012d}.jpg', 'width': WIDTH, 'height': HEIGHT} for x in range(images)]
    classes = [{'id': x + 1, 'name': f'class {x + 1}', 'supercategory': 'none'} for x in range(CLASSES)]
    yield json.dumps({'images': records, 'categories': classes}).removesuffix('}') + ', "annotations": ['
    for number in range(round(images * OBJECTS_PER_IMAGE)):
        annotation = {'id': number, 'image_id': int(rng.integers(images)), **random_object(rng)}
        yield (', ' if number else '') + json.dumps(annotation)
    yield ']}'


def random_object(rng: np.random.Generator) -> dict[str, Any]:
    """An ellipse of a random class: its polygon, box and area, in pixels."""
    size = rng.uniform(10, 200, 2)
    corner = rng.uniform(0, 1, 2) * ((WIDTH, HEIGHT) - size)
    angles = np.linspace(0, 2 * np.pi, POINTS, endpoint=False)
    polygon = corner + size / 2 * (1 + np.stack((np.cos(angles), np.sin(angles)), axis=1))
    return {
        'category_id': int(rng.integers(CLASSES)) + 1,
        'bbox': np.concatenate((corner, size)).round(2).tolist(),
        'segmentation': [polygon.round(2).ravel().tolist()],
        'area': round(float(np.pi / 4 * size.prod()), 2),
        'iscrowd': 0,
    }


def main() -> None:
    """Read the command line and write the dataset."""
    parser = argparse.ArgumentParser('python -m tools.benchmark.coco_names', description=__doc__.splitlines()[0])
    parser.add_argument('--output', type=home_path, required=True, metavar='DIR', help='a new folder')
    parser.add_argument('--images', type=positive_int, default=118_000, metavar='N', help='training images (118000)')
    parser.add_argument('--val-images', type=positive_int, default=5000, metavar='N', help='validation images (5000)')
    args = parser.parse_args()
    write_coco_names(args.output, args.images, args.val_images)


if __name__ == '__main__':
    with exit_on_user_error():
        main()
