"""The format of Hugging Face datasets that `save_to_disk` has written; it needs `pip install datasets`."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from data.images import DataError, check_image_bytes, open_regular, read_error, read_file
from data.packed_lists import NameList
from data.samples import SPLIT_NAMES, Samples, same_letters


class HuggingFaceDataset(Samples):
    """The rows of a split of a `DatasetDict` on disk: its one image column, and its one column of class labels.

    A row without an image's bytes names its file; only files in the dataset's folder are read.

    Args:
        folder: a folder written by `save_to_disk`.
        split: `train` or `val`, which may be called validation, valid or test there.

    Raises:
        DataError: `datasets` is not installed, or the folder is not such a dataset.
    """

    def __init__(self, folder: Path, split: str):
        self.folder, self.where = folder, f'{folder} ({split})'
        self.rows = _open(folder, split)
        if self.rows is None:
            raise DataError(f'{folder} has no split {" or ".join(SPLIT_NAMES[split])}')
        self._image, self._label = find_columns(self.rows.features, self.where)
        self.classes, self.notes = class_names(self.rows.features, self._label), []
        try:
            labels = self.rows.data.column(self._label).fill_null(-1)
            self.targets = np.asarray(labels, dtype=np.int32)
            images = self.rows.data.column(self._image)
            paths = (path for chunk in images.chunks for path in chunk.field('path').to_pylist())
            self.names = NameList.of(f'{i}/{path or ""}' for i, path in enumerate(paths))
        except Exception as error:  # pyarrow raises errors of many types for columns of other types
            raise read_error(self.where, error, 'save it again') from error
        if not ((self.targets >= 0) & (self.targets < len(self.classes))).all():
            raise DataError(f'{self.where} has rows without a class: leave them out')

    @staticmethod
    def find_classes(folder: Path, split: str) -> list[str]:
        """Names of the classes; empty if there is no such split."""
        rows = _open(folder, split)
        return [] if rows is None else class_names(rows.features, find_columns(rows.features, str(folder))[1])

    def read(self, index: int) -> bytes:
        """The image, or the file in the dataset's folder that its row names."""
        row = self.rows.data.column(self._image)[index]
        if not row.is_valid or not (row['bytes'].is_valid or row['path'].is_valid):
            raise DataError(f'image {self.describe(index)} is missing: leave the row out')
        if not row['bytes'].is_valid:
            return read_file(self._inside(index, row['path'].as_py()))
        try:
            content = row['bytes'].as_buffer()
            check_image_bytes(content.size)
            return content.to_pybytes()
        except (ValueError, AttributeError) as error:
            raise read_error(f'image {self.describe(index)}', error, 'leave the row out') from error

    def _inside(self, index: int, name: str) -> Path:
        """The path that a row names. It must be in the dataset's folder, since the dataset may be untrusted."""
        folder = self.folder.resolve()
        try:
            path = (folder / name).resolve()
        except (OSError, ValueError, RuntimeError) as error:  # such as a loop of links
            raise read_error(f'image {self.describe(index)}', error, 'leave the row out') from error
        if not path.is_relative_to(folder):
            raise DataError(
                f'image {self.describe(index)} is a file outside the folder of the dataset, which is not read: save '
                f'the dataset again with the images in its rows, as recent versions of datasets do'
            )
        return path

    def describe(self, index: int) -> str:
        """The row."""
        return f'{self.names[index]} in {self.where}'


def _open(folder: Path, split: str) -> Any:
    """The split's `datasets.Dataset`; None if there is none."""
    try:
        import datasets
    except ImportError as error:
        raise DataError('DATA.DATASET huggingface needs the package datasets: pip install datasets') from error
    if not os.path.isfile(folder / 'dataset_dict.json'):
        raise DataError(f'{folder} has no dataset_dict.json: give the folder that DatasetDict.save_to_disk has written')
    name = next((name for name in SPLIT_NAMES[split] if os.path.isdir(folder / name)), None)
    if name is None:
        return None
    try:
        _check_parts(folder / name)
        return datasets.load_from_disk(str(folder / name))
    except Exception as error:  # datasets and pyarrow raise errors of many types for damaged files
        raise read_error(str(folder / name), error, 'save it again') from error


def _check_parts(folder: Path) -> None:
    """Check that the files of a split are regular files in its folder: others would be read wherever they are.

    Raises:
        ValueError: they are not.
        OSError, KeyError, TypeError, RecursionError: the list of files cannot be read.
    """
    with open_regular(folder / 'state.json') as file:
        state = json.load(file)
    names = ['state.json', 'dataset_info.json', *(part['filename'] for part in state['_data_files'])]
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f'{name} is not a file in its folder')


def class_names(features: Any, label: str) -> list[str]:
    """Names of the classes of a split's column of labels."""
    names = features[label].names
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise DataError(f'the column {label} has no names of classes: save the dataset again with them')
    return [same_letters(name) for name in names]


def find_columns(features: Any, where: str) -> tuple[str, str]:
    """Names of the columns of images and of class labels."""
    found = []
    for kind in ('Image', 'ClassLabel'):
        names = [name for name, feature in features.items() if type(feature).__name__ == kind]
        if len(names) != 1:
            raise DataError(f'{where} has {len(names)} columns of type {kind}, not one: keep one of {list(features)}')
        found += names
    return found[0], found[1]
