import os

import numpy as np
import pytest
import torch

from config import load_config
from tests.helpers.images import write_images
from tests.helpers.paths import TINY

os.environ['NO_ALBUMENTATIONS_UPDATE'] = '1'  # otherwise, importing albumentations asks PyPI for its latest version


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


@pytest.fixture
def image_tree(tmp_path):
    """A folder with `train/` and `val/` of three classes of 8 and 4 images."""
    return write_images(tmp_path / 'images')
