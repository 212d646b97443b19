"""Write scikit-learn's 1,797 real handwritten digits as a tree of class folders.

    python -m tools.make_digits --output output/digits

The data are part of scikit-learn (the test set of the UCI "Optical Recognition of Handwritten Digits" set), so
nothing is downloaded.
"""

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SIZE = 56  # pixels


def make_digits(output: Path) -> dict[str, int]:
    """Write `train/<digit>/<index>.png` and `val/<digit>/<index>.png`, grey, 56 x 56 pixels.

    The split is stratified, 80/20, and always the same; `index` is the digit's number in scikit-learn's set.

    Returns:
        Images written, by split.
    """
    digits = load_digits()
    splits = split_digits(digits.target)
    for split, indices in splits.items():
        for index in indices:
            folder = output / split / str(digits.target[index])
            folder.mkdir(parents=True, exist_ok=True)
            image = (digits.images[index] * (255 / 16)).astype(np.uint8)  # 8 x 8, stored as 0 to 16
            image = cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
            if not cv2.imwrite(str(folder / f'{index:04d}.png'), image):
                raise OSError(f'cannot write {folder / f"{index:04d}.png"}')
    return {split: len(indices) for split, indices in splits.items()}


def split_digits(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Numbers of the digits of `train` and `val`."""
    train, val = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    return {'train': train, 'val': val}


def main() -> None:
    """Read the command line and write the data."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--output', type=Path, required=True, metavar='DIR', help='folder to write train/ and val/ in')
    args = parser.parse_args()
    try:
        written = make_digits(args.output)
    except OSError as error:
        sys.exit(f'error: {error}')
    print(f'{args.output}: {written["train"]} training and {written["val"]} validation digits')


if __name__ == '__main__':
    main()
