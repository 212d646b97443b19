"""Images for tests: trees of class folders, noise, damaged files."""

from pathlib import Path

import cv2
import numpy as np
from PIL import ExifTags, Image


def write_images(root: Path, classes: int = 3, train: int = 8, val: int = 4, size: int = 32) -> Path:
    """A tree of class folders, whose images of a class share a colour; numbers are per class."""
    rng = np.random.default_rng(0)
    for split, count in (('train', train), ('val', val)):
        for label in range(classes):
            folder = root / split / f'class_{label}'
            folder.mkdir(parents=True)
            for i in range(count):
                image = rng.integers(0, 100, (size, size, 3), dtype=np.uint8)
                image[..., label % 3] += 150
                cv2.imwrite(str(folder / f'{i}.png'), image)
    return root


def noise(width: int = 400, height: int = 300) -> Image.Image:
    """A PIL image of noise."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def damage(path: Path, damage_type: str) -> None:
    """Write a file that is 'truncated', 'garbage' or 'empty' in place of an image."""
    if damage_type == 'truncated':
        noise().save(path, 'JPEG')
        path.write_bytes(path.read_bytes()[:5000])
    else:
        path.write_bytes({'garbage': b'not an image' * 50, 'empty': b''}[damage_type])


def set_orientation(path: Path, orientation: int) -> None:
    """Write an EXIF orientation into an image; its pixels stay."""
    with Image.open(path) as file:
        image, exif = file.copy(), Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(path, **({'tiffinfo': dict(exif)} if path.suffix == '.tif' else {'exif': exif}))
