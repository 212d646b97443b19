"""Datasets that users write in Python: any map-style `torch.utils.data.Dataset` of images and class indices."""

import operator
from collections import ChainMap
from collections.abc import Callable, Mapping
from typing import Any, Self

import numpy as np
from torch.utils.data import Dataset
from yacs.config import CfgNode

from data.formats import FORMATS
from data.huggingface import class_names, find_columns
from data.images import AnyImage, DataError, PartError, kind_of_value, read_error
from data.packed_lists import NameList
from data.samples import same_letters
from data.sharing import Shareable
from extensions import Registry
from utils import first_line

# Values of DATA.DATASET that modules of users add: called with the config and `train` or `val`, each gives a dataset
DATASETS = Registry('dataset')

# All values of DATA.DATASET
DATASET_NAMES = ChainMap(DATASETS, FORMATS)


def register_dataset(name: str) -> Callable[[Callable], Callable]:
    """Make a dataset available as `DATA.DATASET name`.

    The decorated class or function is called with the config and `train` or `val`, and gives a dataset: `len(dataset)`
    samples, of which `dataset[i]` is an image and the index of its class or, with `DATA.MULTI_LABEL`, what
    `data.multi_label.multi_hot` takes. The image is a PIL image, an array of uint8, (H, W, 3) or (H, W), or the content
    of an image file. A `datasets.Dataset` of Hugging Face with one column of images and one of class labels is one,
    too. The dataset may have three attributes:

    - `classes`: names of the classes. Otherwise, they are numbers.
    - `names`: a name for each sample. Checkpoints record a hash of them, so that no run resumes on other data.
    - `targets`: the class index of each sample, which `DATA.SAMPLING` and `TRAIN.CLASS_WEIGHTS` need.

    Raises:
        ValueError: the name belongs to another dataset, or to a format.
    """
    if name in FORMATS:
        raise ValueError(f'DATA.DATASET {name} is a format of the project: write another name')
    return DATASETS.register(name)


class PythonDataset(Shareable):
    """Adapter of a user's dataset to the interface of `data.samples.Samples`, for `ImageDataset`.

    Args:
        dataset: see `register_dataset`.
        where: what messages call the split.
        num_classes: number of classes, where the dataset does not name them.
        multi_label: whether a sample may have several classes.

    Raises:
        PartError: it has no length, no samples, or not as many names as samples.
    """

    def __init__(self, dataset: Dataset, where: str, num_classes: int, multi_label: bool = False):
        self.dataset, self.where, self.is_multi_label = dataset, where, multi_label
        if isinstance(dataset, Mapping):
            raise PartError(f'{where} is {kind_of_value(dataset)} of splits: return the dataset of one split')
        try:
            self.count = len(dataset)
        except (TypeError, NotImplementedError) as error:
            raise PartError(f'{where} has no length: give a dataset with __len__ and __getitem__') from error
        if self.count == 0:
            raise PartError(f'{where} is empty: give a dataset with samples')
        classes, names = _list(dataset, 'classes', where), _list(dataset, 'names', where)
        self._columns = ()
        if type(dataset).__module__.startswith('datasets.'):  # of Hugging Face: a sample is a row, by column
            self._columns = find_columns(dataset.features, where)
            classes = classes or class_names(dataset.features, self._columns[1])
        self.classes = [same_letters(str(name)) for name in (range(num_classes) if classes is None else classes)]
        self.notes = []
        if names is None:
            self.notes = [f'{where} has no attribute `names`: checkpoints record only the number of its images']
        elif len(names) != self.count:
            raise PartError(f'{where} has {self.count} samples and {len(names)} names: give a name for each')
        self.names = None if names is None else NameList.of(map(str, names))

    @classmethod
    def of_config(cls, config: CfgNode, split: str) -> Self:
        """Open `train` or `val` of the dataset that `DATA.DATASET` names.

        Raises:
            PartError: see `PythonDataset`.
            DataError: a file of the dataset cannot be opened.
        """
        name = config.DATA.DATASET
        where = f'{name} ({split})'
        try:
            dataset = DATASETS[name](config, split)
        except OSError as error:
            raise DataError(f'dataset {where} cannot be opened: {first_line(error)}: give its --data-path') from error
        return cls(dataset, where, config.MODEL.NUM_CLASSES, config.DATA.MULTI_LABEL)

    def __len__(self) -> int:
        return self.count

    @property
    def targets(self) -> np.ndarray | None:
        """Class index of each sample, (N,), from the attribute `targets` of the dataset; None if it has none.

        Raises:
            PartError: they are not class indices, or not as many as samples.
        """
        targets = _list(self.dataset, 'targets', self.where)
        if targets is None:
            return None
        try:
            indices = np.array([operator.index(target) for target in targets], dtype=np.int64)
        except (TypeError, ValueError) as error:
            raise PartError(f'`targets` of {self.where} are not class indices: give one for each sample') from error
        if len(indices) != self.count or not ((indices >= 0) & (indices < len(self.classes))).all():
            raise PartError(
                f'`targets` of {self.where} are not {self.count} class indices from 0 to {len(self.classes) - 1}: give '
                f'one for each sample'
            )
        return indices

    def load(self, index: int) -> tuple[AnyImage, Any]:
        """The image of a sample, and the index of its class; with several labels, whatever the dataset returns.

        Raises:
            DataError: the image cannot be read.
            PartError: the dataset returns something else.
        """
        try:
            sample = self.dataset[index]
        except OSError as error:
            raise read_error(f'image {self.describe(index)}', error, 'replace or remove it') from error
        if self._columns and isinstance(sample, Mapping):
            sample = tuple(sample[name] for name in self._columns)
        if not isinstance(sample, tuple | list) or len(sample) != 2:
            raise PartError(f'{self.describe(index)} is {kind_of_value(sample)}: return (image, class index)')
        image, label = sample
        if self.is_multi_label:
            return image, label  # `ImageDataset` reads it
        try:
            target = operator.index(label)
        except (TypeError, ValueError) as error:
            raise PartError(
                f'the class of {self.describe(index)} is {kind_of_value(label)}: return its index, or write '
                f'DATA.MULTI_LABEL True for several classes'
            ) from error
        if not 0 <= target < len(self.classes):
            raise PartError(
                f'the class of {self.describe(index)} is {target}: return an index from 0 to {len(self.classes) - 1}'
            )
        return image, target

    def describe(self, index: int) -> str:
        """What messages call a sample."""
        return f'{index if self.names is None else self.names[index]} of {self.where}'

    def sample_names(self) -> Any:
        """The names, in order; numbers where the dataset has none."""
        return map(str, range(self.count)) if self.names is None else map(same_letters, self.names)

    def share(self) -> Self:
        """Move the arrays of the dataset into shared memory, unless the dataset cannot be pickled.

        A dataset that cannot be pickled works in this process only; with DataLoader workers, `data.workers` reports it.

        Raises:
            DataError: there is too little memory.
        """
        try:
            return super().share()
        except DataError:
            raise
        except Exception:  # pickling raises errors of many types
            return self


def _list(dataset: Dataset, attribute: str, where: str) -> list[Any] | None:
    """An attribute of a dataset as a list; None if the dataset does not have it.

    Raises:
        PartError: it is no list.
    """
    value = getattr(dataset, attribute, None)
    try:
        return None if value is None else list(value)
    except TypeError as error:
        raise PartError(f'`{attribute}` of {where} is {kind_of_value(value)}: give a list') from error
