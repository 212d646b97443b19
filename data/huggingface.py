"""The format of Hugging Face datasets that `save_to_disk` has written; it needs `pip install datasets`."""

from pathlib import Path
from typing import Any

import numpy as np

from data.images import DataError, read_file
from data.packed_lists import NameList
from data.samples import Samples

# What Hugging Face's datasets call the split for evaluation.
_SPLITS = {'train': ('train',), 'val': ('validation', 'val', 'valid', 'test')}


class HuggingFaceDataset(Samples):
    """The rows of a split of a `DatasetDict` on disk: its one image column, and its one column of class labels.

    Args:
        folder: that `save_to_disk` has written.
        split: `train` or `val`, which may be called validation, valid or test there.

    Raises:
        DataError: `datasets` is not installed, or the folder is not such a dataset.
    """

    def __init__(self, folder: Path, split: str):
        self.rows, self.where = _open(folder, split), f'{folder} ({split})'
        if self.rows is None:
            raise DataError(f'{folder} has no split {" or ".join(_SPLITS[split])}')
        self._image, self._label = _find_columns(self.rows.features, self.where)
        self.classes, self.notes = list(self.rows.features[self._label].names), []
        labels = self.rows.data.column(self._label).fill_null(-1)
        self.targets = np.asarray(labels, dtype=np.int32)
        if not ((self.targets >= 0) & (self.targets < len(self.classes))).all():
            raise DataError(f'{self.where} has rows without a class: leave them out')
        images = self.rows.data.column(self._image)
        paths = (path for chunk in images.chunks for path in chunk.field('path').to_pylist())
        self.names = NameList.of(f'{i}/{path or ""}' for i, path in enumerate(paths))

    @staticmethod
    def find_classes(folder: Path, split: str) -> list[str]:
        """Names of the classes; empty if there is no such split."""
        rows = _open(folder, split)
        return [] if rows is None else list(rows.features[_find_columns(rows.features, str(folder))[1]].names)

    def read(self, index: int) -> bytes:
        """The image, or the file that its row names."""
        row = self.rows.data.column(self._image)[index].as_py()
        if row is None:
            raise DataError(f'image {self.describe(index)} is missing: leave the row out')
        return row['bytes'] if row['bytes'] is not None else read_file(row['path'])

    def describe(self, index: int) -> str:
        """The row."""
        return f'{self.names[index]} in {self.where}'


def _open(folder: Path, split: str) -> Any:
    """The split's `datasets.Dataset`; None if there is none."""
    try:
        import datasets
    except ImportError as error:
        raise DataError('DATA.DATASET huggingface needs the package datasets: pip install datasets') from error
    if not (folder / 'dataset_dict.json').exists():
        raise DataError(f'{folder} has no dataset_dict.json: give the folder that DatasetDict.save_to_disk has written')
    name = next((name for name in _SPLITS[split] if (folder / name).is_dir()), None)
    try:
        return None if name is None else datasets.load_from_disk(str(folder / name))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        text = ' '.join(str(error).split())
        raise DataError(f'{folder / name} cannot be read ({text}): save it again') from error


def _find_columns(features: Any, where: str) -> tuple[str, str]:
    """Names of the columns of images and of class labels."""
    found = []
    for kind in ('Image', 'ClassLabel'):
        names = [name for name, feature in features.items() if type(feature).__name__ == kind]
        if len(names) != 1:
            raise DataError(f'{where} has {len(names)} columns of type {kind}, not one: keep one of {list(features)}')
        found += names
    return found[0], found[1]
