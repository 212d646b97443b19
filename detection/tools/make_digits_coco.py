"""Write photographs with handwritten digits pasted on them, in COCO's format, with exact boxes and masks.

    python -m detection.tools.make_digits_coco --output output/digits_coco

Digits and photographs are part of scikit-learn, so nothing is downloaded. Training and evaluation images
have different digits, on different halves of the photographs.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask
from sklearn.datasets import load_sample_images

from data.digits import load_split_digits
from utils import OutputError, exit_on_user_error, home_path, printable

SIZES = ((128, 96), (96, 128))  # width and height, in pixels
DIGIT_SIZES = 24, 56  # smallest and largest size of a digit, in pixels
DIGITS = 2, 4  # fewest and most per image


def make_digits_coco(output: Path, train: int = 800, val: int = 200) -> dict[str, int]:
    """Write `train/`, `val/` and `annotations/instances_<split>.json`; always the same.

    Args:
        output: folder.
        train: number of training images.
        val: number of evaluation images.

    Returns:
        Digits written, by split.
    """
    digits, photos = load_split_digits(), load_sample_images().images
    half = photos[0].shape[1] // 2
    backgrounds = {'train': [photo[:, :half] for photo in photos], 'val': [photo[:, half:] for photo in photos]}
    written = {}
    (output / 'annotations').mkdir(parents=True, exist_ok=True)
    for number, (split, count) in enumerate((('train', train), ('val', val))):
        rng = np.random.default_rng(number)
        (output / split).mkdir(exist_ok=True)
        images, annotations = [], []
        for image_id in range(1, count + 1):
            name = f'{image_id:06d}.jpg'
            canvas = cut_background(rng, backgrounds[split])
            images.append({'id': image_id, 'file_name': name, 'width': canvas.shape[1], 'height': canvas.shape[0]})
            occupied = np.zeros(canvas.shape[:2], dtype=bool)
            for index in rng.choice(digits.splits[split], rng.integers(DIGITS[0], DIGITS[1] + 1), replace=False):
                mask = paste(rng, canvas, digits.images[index], occupied)
                if mask is not None:
                    entry = {'image_id': image_id, 'category_id': int(digits.labels[index]) + 1, 'iscrowd': 0}
                    annotations.append({'id': len(annotations) + 1} | entry | describe(mask))
            if not cv2.imwrite(str(output / split / name), canvas[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95]):
                raise OSError(f'cannot write {output / split / name}')
        categories = [{'id': digit + 1, 'name': str(digit)} for digit in range(10)]
        tree = {'images': images, 'annotations': annotations, 'categories': categories}
        (output / 'annotations' / f'instances_{split}.json').write_text(json.dumps(tree), encoding='utf-8')
        written[split] = len(annotations)
    return written


def cut_background(rng: np.random.Generator, photos: list[np.ndarray]) -> np.ndarray:
    """A part of a photograph (H, W, 3), somewhat darker, perhaps mirrored."""
    photo, (width, height) = photos[rng.integers(len(photos))], SIZES[rng.integers(len(SIZES))]
    top, left = rng.integers(photo.shape[0] - height + 1), rng.integers(photo.shape[1] - width + 1)
    part = photo[top : top + height, left : left + width]
    return (part[:, :: rng.choice((-1, 1))] * rng.uniform(0.3, 0.7)).astype(np.uint8)


def paste(
    rng: np.random.Generator, canvas: np.ndarray, digit: np.ndarray, occupied: np.ndarray, tries: int = 20
) -> np.ndarray | None:
    """Paint a digit in a bright colour where there is none.

    Args:
        rng: draws size, position and colour.
        canvas: (H, W, 3); painted on.
        digit: (8, 8), 0 to 16.
        occupied: (H, W), where digits are; updated.
        tries: positions to try.

    Returns:
        Its mask (H, W): the pixels it covers by half or more. None if no position was free.
    """
    height, width = occupied.shape
    for _ in range(tries):
        size = int(rng.integers(DIGIT_SIZES[0], DIGIT_SIZES[1] + 1))
        top, left = rng.integers(height - size + 1), rng.integers(width - size + 1)
        area = slice(top, top + size), slice(left, left + size)
        if occupied[area].any():
            continue
        cover = cv2.resize(digit / 16, (size, size), interpolation=cv2.INTER_CUBIC).clip(0, 1)
        canvas[area] = canvas[area] * (1 - cover[..., None]) + rng.uniform(190, 255, 3) * cover[..., None]
        occupied[area] = True
        mask = np.zeros_like(occupied)
        mask[area] = cover >= 0.5
        return mask
    return None


def describe(mask: np.ndarray) -> dict[str, Any]:
    """Box, area and run lengths of a mask (H, W), in COCO's annotation format."""
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {
        'bbox': coco_mask.toBbox(rle).tolist(),
        'area': int(mask.sum()),
        'segmentation': {'size': rle['size'], 'counts': rle['counts'].decode()},
    }


def main() -> None:
    """Read the command line and write the data."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('--output', type=home_path, required=True, metavar='DIR', help='folder to write')
    add('--train', type=int, default=800, metavar='N', help='training images')
    add('--val', type=int, default=200, metavar='N', help='evaluation images')
    args = parser.parse_args()
    with exit_on_user_error():
        try:
            written = make_digits_coco(args.output, args.train, args.val)
        except OSError as error:
            raise OutputError(str(error)) from error
        counts = f'{written["train"]} digits to train on and {written["val"]} to evaluate with'
        print(printable(f'{args.output}: {counts}'))


if __name__ == '__main__':
    main()
