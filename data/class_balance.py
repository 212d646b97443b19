"""Class weights of a loss and probabilities of images, from the sizes of the classes in the training data."""

import numpy as np
import torch
from torch import Tensor
from yacs.config import CfgNode

from data.dataset import ImageDataset
from data.images import DataError

# Limit of `torch.multinomial`
_MAX_DRAWS = 2**24


def class_weights(config: CfgNode, dataset: ImageDataset) -> Tensor | None:
    """Weights of the classes for `TRAIN.CLASS_WEIGHTS`, (classes,) float32; None for `none`.

    `balanced` is scikit-learn's: images / (classes * images of the class). `sqrt` is its square root, scaled. In both,
    the mean weight of a training image is 1, so that the loss keeps its scale.

    Raises:
        DataError: the class of each image is not known, or a class has no images.
    """
    kind = config.TRAIN.CLASS_WEIGHTS
    if kind == 'none':
        return None
    from sklearn.utils.class_weight import compute_class_weight  # takes a second to import

    targets = known_targets(dataset, f'TRAIN.CLASS_WEIGHTS {kind}')
    counts = np.bincount(targets, minlength=len(dataset.classes))
    if not counts.all():
        raise DataError(
            f'class {dataset.classes[counts.argmin()]} of {dataset.samples.where} has no images, so it gets no weight: '
            f'add some, or write TRAIN.CLASS_WEIGHTS none'
        )
    weights = compute_class_weight('balanced', classes=np.arange(len(counts)), y=targets)
    if kind == 'sqrt':
        weights = weights**0.5
        weights *= len(targets) / (counts @ weights)
    return torch.from_numpy(weights).float()


def draw_weights(config: CfgNode, dataset: ImageDataset) -> Tensor | None:
    """Weights of the images for the draws of `DATA.SAMPLING`, (images,) float64; None for `uniform`.

    With `balanced`, all classes are drawn equally often; with `sqrt`, in proportion to the square root of their sizes.

    Raises:
        DataError: the class of each image is not known, or there are too many images.
    """
    kind = config.DATA.SAMPLING
    if kind == 'uniform':
        return None
    if len(dataset) > _MAX_DRAWS:
        raise DataError(
            f'DATA.SAMPLING {kind} draws from at most {_MAX_DRAWS:,} images, and {dataset.samples.where} has '
            f'{len(dataset):,}: write DATA.SAMPLING uniform'
        )
    targets = known_targets(dataset, f'DATA.SAMPLING {kind}')
    sizes = torch.from_numpy(np.bincount(targets)[targets]).double()  # number of images in each image's class
    return 1 / sizes if kind == 'balanced' else 1 / sizes.sqrt()


def known_targets(dataset: ImageDataset, setting: str) -> np.ndarray:
    """Class index of each image, (images,).

    Raises:
        DataError: the dataset only knows the class of an image after reading it.
    """
    targets = dataset.samples.targets
    if targets is None:
        raise DataError(
            f'{setting} needs the class of each image, and {dataset.samples.where} has no attribute `targets`: give '
            f'the dataset one, with a class index for each sample'
        )
    return targets
