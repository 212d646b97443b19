"""Images to measure loading on: of a dataset, of any folder, or cut from scikit-learn's photographs."""

import os
import random
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from sklearn.datasets import load_sample_images

from data.formats import FORMATS, find_format
from data.images import DataError, choose_images, find_images, read_file
from data.packed_lists import NameList
from data.samples import Samples


class FileSamples(Samples):
    """Image files of one class.

    Args:
        paths: the files.
    """

    def __init__(self, paths: Sequence[Path]):
        self.names, self.targets = NameList.of(map(str, paths)), np.zeros(len(paths), np.int32)
        self.classes, self.notes = ['image'], []

    @staticmethod
    def find_classes(folder: Path, split: str) -> list[str]:
        """The one class."""
        return ['image']

    def read(self, index: int) -> bytes:
        """The file."""
        return read_file(self.names[index])

    def describe(self, index: int) -> str:
        """The file's path."""
        return self.names[index]


class ChosenSamples(Samples):
    """Some samples of a split.

    Args:
        samples: the split.
        indices: of those to keep.
    """

    def __init__(self, samples: Samples, indices: Sequence[int]):
        self.samples, self.indices = samples, indices
        self.names, self.targets = NameList.of(samples.names[i] for i in indices), samples.targets[list(indices)]
        self.classes, self.notes = samples.classes, samples.notes

    @staticmethod
    def find_classes(folder: Path, split: str) -> list[str]:
        """None: the samples need not come from a folder."""
        return []

    def read(self, index: int) -> bytes:
        """The sample's encoded image."""
        return self.samples.read(self.indices[index])

    def describe(self, index: int) -> str:
        """Where the split has it."""
        return self.samples.describe(self.indices[index])


def find_samples(data_path: Path | None, images: int, folder: Path) -> Samples:
    """Samples to time: those of the training split, the images below a folder, or JPEGs made in `folder`."""
    if data_path is None:
        return FileSamples(make_jpegs(folder, images))
    name = find_format(data_path)
    if not os.path.isdir(data_path):
        raise DataError(f'{data_path} does not exist: give a folder of images, or of a dataset')
    if name == 'imagenet':
        return FileSamples(choose_images(find_images([data_path]), images))
    split = next((split for split in ('train', 'val') if FORMATS[name].find_classes(data_path, split)), None)
    if split is None:
        raise DataError(f'{data_path} holds neither train nor val of the format {name}')
    samples = FORMATS[name](data_path, split)
    return ChosenSamples(samples, random.Random(0).sample(range(len(samples)), min(images, len(samples))))


def make_jpegs(folder: Path, images: int) -> list[Path]:
    """Write JPEGs of 500 x 375 pixels, cut from scikit-learn's photographs at several scales, always the same ones."""
    photographs, rng, paths = load_sample_images().images, np.random.default_rng(0), []
    for number in range(images):
        photograph = photographs[number % len(photographs)]
        height = int(rng.integers(300, photograph.shape[0]))
        width = height * 4 // 3
        top, left = (int(rng.integers(0, x - y + 1)) for x, y in zip(photograph.shape, (height, width), strict=False))
        crop = cv2.resize(photograph[top : top + height, left : left + width], (500, 375), interpolation=cv2.INTER_AREA)
        paths.append(folder / f'{number:04d}.jpg')
        paths[-1].write_bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(crop), quality=90))
    return paths
