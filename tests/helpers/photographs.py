"""Class folders of real photographs: pieces of the two that come with scikit-learn."""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images


def write_photographs(folder: Path, count: int) -> Path:
    """Write `count` pieces of each photograph, 96 to 200 pixels wide, to `china/` and `flower/`; always the same."""
    rng = np.random.default_rng(0)
    for name, photograph in zip(('china', 'flower'), load_sample_images().images, strict=True):
        (folder / name).mkdir(parents=True)
        image = Image.fromarray(photograph)
        for i in range(count):
            size = int(rng.integers(96, 200))
            left, top = (int(rng.integers(0, side - size)) for side in image.size)
            image.crop((left, top, left + size, top + size)).save(folder / name / f'{i:02d}.jpg')
    return folder
