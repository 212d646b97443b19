import contextlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from config import load_config

ROOT = Path(__file__).parent.parent
TINY = ROOT / 'tests' / 'fixtures' / 'tiny.yaml'


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def tiny_config(tmp_path):
    """A function of options that gives the config of a network with a few thousand parameters on 28-pixel images."""

    def load(**options):
        opts = ['OUTPUT', str(tmp_path / 'output')]
        for key, value in options.items():
            opts += [key.replace('__', '.'), value]
        return load_config(TINY, opts)

    return load


def write_images(root: Path, classes: int = 3, train: int = 8, val: int = 4, side: int = 32) -> Path:
    """A tree of class folders, whose images of a class share a colour; numbers are per class."""
    rng = np.random.default_rng(0)
    for split, count in (('train', train), ('val', val)):
        for label in range(classes):
            folder = root / split / f'class_{label}'
            folder.mkdir(parents=True)
            for i in range(count):
                image = rng.integers(0, 100, (side, side, 3), dtype=np.uint8)
                image[..., label % 3] += 150
                cv2.imwrite(str(folder / f'{i}.png'), image)
    return root


@pytest.fixture
def image_tree(tmp_path):
    return write_images(tmp_path / 'images')


@contextlib.contextmanager
def one_thread():
    """Sums in one order, for runs that must agree to the last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
