"""Write photographs with handwritten digits pasted on them, in COCO's format, with exact boxes and masks.

    python -m detection.tools.make_digits_coco --output output/digits_coco
    python -m detection.tools.make_digits_coco --output output/digits_large --size 256 192 --digit-size 48 112

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
from utils import OutputError, UserError, exit_on_user_error, home_path, positive_int, printable

SIZE = 128, 96  # width and height of an image, in pixels; half of the images are turned
DIGIT_SIZE = 24, 56  # smallest and largest size of a digit, in pixels
DIGITS = 2, 4  # fewest and most per image
MIN_DIGIT_SIZE = 8  # the size of scikit-learn's digits


def make_digits_coco(
    output: Path,
    train: int = 800,
    val: int = 200,
    size: tuple[int, int] = SIZE,
    digit_size: tuple[int, int] = DIGIT_SIZE,
) -> dict[str, int]:
    """Write `train/`, `val/` and `annotations/instances_<split>.json`; always the same for the same arguments.

    Args:
        output: folder.
        train: number of training images.
        val: number of evaluation images.
        size: width and height of an image, in pixels; about half of the images have them exchanged.
        digit_size: smallest and largest size of a digit, in pixels.

    Returns:
        Digits written, by split.

    Raises:
        UserError: digits do not fit into the images, or images into the halves of the photographs.
    """
    digits, photos = load_split_digits(), load_sample_images().images
    half = photos[0].shape[1] // 2
    check_sizes(size, digit_size, limit=min(half, photos[0].shape[0]))
    backgrounds = {'train': [photo[:, :half] for photo in photos], 'val': [photo[:, half:] for photo in photos]}
    written = {}
    (output / 'annotations').mkdir(parents=True, exist_ok=True)
    for number, (split, count) in enumerate((('train', train), ('val', val))):
        rng = np.random.default_rng(number)
        (output / split).mkdir(exist_ok=True)
        images, annotations = [], []
        for image_id in range(1, count + 1):
            name = f'{image_id:06d}.jpg'
            canvas = cut_background(rng, backgrounds[split], size)
            images.append({'id': image_id, 'file_name': name, 'width': canvas.shape[1], 'height': canvas.shape[0]})
            occupied = np.zeros(canvas.shape[:2], dtype=bool)
            for index in rng.choice(digits.splits[split], rng.integers(DIGITS[0], DIGITS[1] + 1), replace=False):
                mask = paste(rng, canvas, digits.images[index], occupied, digit_size)
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


def check_sizes(size: tuple[int, int], digit_size: tuple[int, int], limit: int) -> None:
    """Check that digits fit into the images, and images into the photographs.

    Args:
        size: width and height of an image, in pixels.
        digit_size: smallest and largest size of a digit, in pixels.
        limit: largest width or height of an image, in pixels.

    Raises:
        UserError: they do not.
    """
    if max(size) > limit:
        raise UserError(f'an image of {size[0]} x {size[1]} pixels does not fit the photographs: write at most {limit}')
    low, high = digit_size
    if not MIN_DIGIT_SIZE <= low <= high <= min(size):
        raise UserError(
            f'digits of {low} to {high} pixels do not fit: write the smallest size and the largest size, '
            f'from {MIN_DIGIT_SIZE} to {min(size)} (the shorter side of an image)'
        )


def cut_background(rng: np.random.Generator, photos: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """A part of a photograph (H, W, 3), somewhat darker, perhaps mirrored; H and W may be exchanged."""
    photo, (width, height) = photos[rng.integers(len(photos))], (size, size[::-1])[rng.integers(2)]
    top, left = rng.integers(photo.shape[0] - height + 1), rng.integers(photo.shape[1] - width + 1)
    part = photo[top : top + height, left : left + width]
    return (part[:, :: rng.choice((-1, 1))] * rng.uniform(0.3, 0.7)).astype(np.uint8)


def paste(
    rng: np.random.Generator,
    canvas: np.ndarray,
    digit: np.ndarray,
    occupied: np.ndarray,
    digit_size: tuple[int, int] = DIGIT_SIZE,
    tries: int = 20,
) -> np.ndarray | None:
    """Paint a digit in a bright colour where there is none.

    Args:
        rng: draws size, position and colour.
        canvas: (H, W, 3); painted on.
        digit: (8, 8), 0 to 16.
        occupied: (H, W), where digits are; updated.
        digit_size: smallest and largest size, in pixels.
        tries: positions to try.

    Returns:
        Its mask (H, W): the pixels it covers by half or more. None if no position was free.
    """
    height, width = occupied.shape
    for _ in range(tries):
        size = int(rng.integers(digit_size[0], digit_size[1] + 1))
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
    parser = argparse.ArgumentParser('python -m detection.tools.make_digits_coco', description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('--output', type=home_path, required=True, metavar='DIR', help='folder to write')
    add('--train', type=int, default=800, metavar='N', help='training images (800)')
    add('--val', type=int, default=200, metavar='N', help='evaluation images (200)')
    pair = {'type': positive_int, 'nargs': 2}
    add('--size', **pair, default=SIZE, metavar=('WIDTH', 'HEIGHT'), help='size of the images, in pixels (128 96)')
    add(
        '--digit-size', **pair, default=DIGIT_SIZE, metavar=('MIN', 'MAX'), help='size of the digits, in pixels (24 56)'
    )
    args = parser.parse_args()
    with exit_on_user_error():
        try:
            written = make_digits_coco(args.output, args.train, args.val, tuple(args.size), tuple(args.digit_size))
        except OSError as error:
            raise OutputError(str(error)) from error
        counts = f'{written["train"]} digits to train on and {written["val"]} to evaluate with'
        print(printable(f'{args.output}: {counts}'))


if __name__ == '__main__':
    main()
