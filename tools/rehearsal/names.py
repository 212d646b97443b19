"""Write a folder with as many training images as ImageNet, without its size: hard links to a few tiny images.

    python -m tools.rehearsal.names --output output/rehearsal/imagenet

The folder has 1,281,167 names in `train/` and 1,000 in `val/`, in 1,000 classes. It takes 100 MB of directories.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
import os
from pathlib import Path

import cv2
import numpy as np

from utils import exit_on_user_error, home_path, positive_int, report_write_errors

# Files that are linked; ext4 allows 65,000 names of one file
FILES = 100


def write_names(output: Path, images: int, classes: int, size: int) -> None:
    """Write `train/<class>/<number>.jpg` and one validation image per class.

    Args:
        output: a new folder.
        images: training images.
        classes: number of classes.
        size: pixels of both sides of an image.

    Raises:
        OutputError: it cannot be written.
    """
    rng = np.random.default_rng(0)
    with report_write_errors(output):
        sources = write_files(output / 'files', (size, size), rng)
        folders = {}
        for split in ('train', 'val'):
            for label in range(classes):
                folders[split, label] = output / split / f'n{label:08d}'
                folders[split, label].mkdir(parents=True)
        for label in range(classes):
            os.link(sources[label % FILES], folders['val', label] / 'image.jpg')
        for number in range(images):
            label = number % classes
            os.link(sources[rng.integers(FILES)], f'{folders["train", label]}/image_{number:08d}.jpg')


def write_files(folder: Path, size: tuple[int, int], rng: np.random.Generator) -> list[Path]:
    """Write the files to link to: JPEGs of random colours.

    Args:
        folder: a new folder.
        size: width and height in pixels.
        rng: source of the colours.
    """
    folder.mkdir(parents=True)
    paths = [folder / f'{number}.jpg' for number in range(FILES)]
    for path in paths:
        colours = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        picture = cv2.resize(colours, size, interpolation=cv2.INTER_CUBIC)
        path.write_bytes(cv2.imencode('.jpg', picture)[1].tobytes())
    return paths


def main() -> None:
    """Read the command line and write the folder."""
    parser = argparse.ArgumentParser('python -m tools.rehearsal.names', description=__doc__.splitlines()[0])
    parser.add_argument('--output', type=home_path, required=True, metavar='DIR', help='a new folder')
    parser.add_argument('--images', type=positive_int, default=1_281_167, metavar='N', help='training images (1281167)')
    parser.add_argument('--classes', type=positive_int, default=1000, metavar='N', help='number of classes (1000)')
    parser.add_argument('--size', type=positive_int, default=64, metavar='N', help='pixels of both sides (64)')
    args = parser.parse_args()
    write_names(args.output, args.images, args.classes, args.size)


if __name__ == '__main__':
    with exit_on_user_error():
        main()
