"""The dataset of both pipelines: decodes and transforms samples of any format, and replaces unreadable images."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.images import AnyImage, DataError
from data.multi_label import multi_hot
from data.python_dataset import PythonDataset
from data.samples import Samples

# Target of an image that an evaluation leaves out
IGNORED = -1

# `Sample.erasing` without rectangles to fill
NO_ERASING = torch.zeros((0, 5), dtype=torch.int64)

# Maximum number of consecutive unreadable images; more are an error
_MAX_REPLACED = 100


class Sample(NamedTuple):
    """A sample or, with a leading dimension B, a batch.

    Attributes:
        image: (C, H, W) float32, normalised, of the published pipeline; (H, W, C) uint8 of the fast one.
        target: class index or, with several labels, 1 for each class of the image and 0 for the others, (classes,)
            float32; `IGNORED` for an image that is left out of an evaluation.
        erasing: rectangles that random erasing fills on the device, (boxes, 5) int64: top, left, height, width, seed.
        skipped: index of the unreadable image that this sample replaces, or -1.
    """

    image: Tensor
    target: Tensor | int
    erasing: Tensor
    skipped: Tensor | int


class ImageDataset(Dataset):
    """Images and targets by sample index.

    Args:
        samples: the split.
        transform: from an image, encoded or decoded, and its name to image and erasing of a `Sample`.
        on_error: what to give for a bad image: 'stop' raises its error; 'replace' gives the next good sample, and
            'ignore' too, but with the target `IGNORED`.
        multi_label: whether an image may have several classes, so that its target is a vector.
    """

    def __init__(
        self,
        samples: Samples | PythonDataset,
        transform: Callable[[AnyImage, str], tuple[Tensor, Tensor]],
        on_error: str = 'stop',
        multi_label: bool = False,
    ):
        self.samples, self.transform, self.on_error = samples, transform, on_error
        self.multi_label = multi_label
        self.classes, self.notes = samples.classes, samples.notes
        self.sample_names = samples.sample_names

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        """The sample of an index.

        Raises:
            DataError: the image is bad and is not to be replaced, or too many after it are bad too.
        """
        tries = min(_MAX_REPLACED, len(self))
        for distance in range(tries):
            try:
                sample = self.load((index + distance) % len(self))
            except DataError:
                if self.on_error == 'stop':
                    raise
            else:
                if distance == 0:
                    return sample
                ignored = torch.full_like(sample.target, IGNORED) if self.multi_label else IGNORED
                return sample._replace(target=sample.target if self.on_error == 'replace' else ignored, skipped=index)
        raise DataError(
            f'none of the {tries} images from {self.samples.describe(index)} on can be read: '
            f'list them with python -m tools.check_dataset'
        )

    def load(self, index: int) -> Sample:
        """The sample of an index, transformed.

        Raises:
            DataError: the image is bad.
        """
        image, target = self.samples.load(index)
        name = self.samples.describe(index)
        if self.multi_label:
            target = multi_hot(target, len(self.classes), name)
        image, erasing = self.transform(image, name)
        return Sample(image, target, erasing, skipped=-1)
