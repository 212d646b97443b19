"""Write scikit-learn's 1,797 real handwritten digits as a tree of class folders.

    python -m tools.make_digits --output output/digits

The digits are part of scikit-learn, so nothing is downloaded.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
from pathlib import Path

import cv2
import numpy as np

from data.digits import load_split_digits
from utils import OutputError, exit_on_user_error, home_path, printable

SIZE = 56  # pixels


def make_digits(output: Path) -> dict[str, int]:
    """Write `train/<digit>/<index>.png` and `val/<digit>/<index>.png`, grey, 56 x 56 pixels.

    The split is stratified, 80/20, and always the same; `index` is the digit's number in scikit-learn's set.

    Returns:
        Images written, by split.
    """
    digits = load_split_digits()
    for split, indices in digits.splits.items():
        for index in indices:
            folder = output / split / str(digits.labels[index])
            folder.mkdir(parents=True, exist_ok=True)
            image = (digits.images[index] * (255 / 16)).astype(np.uint8)  # 8 x 8, stored as 0 to 16
            image = cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
            if not cv2.imwrite(str(folder / f'{index:04d}.png'), image):
                raise OSError(f'cannot write {folder / f"{index:04d}.png"}')
    return {split: len(indices) for split, indices in digits.splits.items()}


def main() -> None:
    """Read the command line and write the data."""
    parser = argparse.ArgumentParser('python -m tools.make_digits', description=__doc__.splitlines()[0])
    parser.add_argument(
        '--output', type=home_path, required=True, metavar='DIR', help='folder to write train/ and val/ in'
    )
    args = parser.parse_args()
    with exit_on_user_error():
        try:
            written = make_digits(args.output)
        except OSError as error:
            raise OutputError(str(error)) from error
        counts = f'{written["train"]} training and {written["val"]} validation digits'
        print(printable(f'{args.output}: {counts}'))


if __name__ == '__main__':
    main()
