"""Repeat factors of images: how often an epoch has each of them, so that rare categories are seen more often."""

import numpy as np
import torch
from torch import Tensor

from detection.data.coco import CocoDataset


def repeat_factors(dataset: CocoDataset, threshold: float) -> Tensor:
    """Repeat factor of each image, (images,) float64, at least 1; those of LVIS (Gupta et al., 2019).

    A category in a fraction f of the images has the factor max(1, sqrt(threshold / f)). The factor of an image is the
    largest one of the categories in it.

    Args:
        dataset: the training images.
        threshold: fraction of the images below which a category is repeated, in (0, 1].
    """
    images, labels = np.unique(dataset.labels_of_images(), axis=0).T  # a category counts once in an image
    counts = np.bincount(labels)  # images of each category
    of_labels = np.sqrt(threshold * len(dataset) / counts.clip(min=1))
    factors = np.ones(len(dataset))
    np.maximum.at(factors, images, of_labels[labels])
    return torch.from_numpy(factors)


def describe_repeats(factors: Tensor, samples: int) -> str:
    """Describe the effect of repeat factors on an epoch of this many samples, for the log."""
    repeated = int((factors > 1).sum())
    return (
        f'an epoch has {samples} samples of {len(factors)} images: {repeated} images are repeated, '
        f'at most {factors.max():.1f} times on average (DATA.REPEAT_FACTOR)'
    )
