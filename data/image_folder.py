"""The format of a tree of class folders."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import is_image_file, make_dataset

from data.images import DataError, read_file
from data.packed_lists import NameList
from data.samples import Samples


class ClassFolders(Samples):
    """The images below `root/<class>/`, in folders and linked folders; classes are the sorted folder names.

    Hidden files and folders are ignored.

    Args:
        folder: of the dataset.
        split: `train` or `val`: the folder of class folders.

    Raises:
        DataError: there is no such folder, or it has no class folders.
    """

    def __init__(self, folder: Path, split: str):
        self.root = folder / split
        self.where = str(self.root)
        self.classes = self.find_classes(folder, split)
        if not self.root.is_dir():
            raise DataError(
                f'data folder {self.root} does not exist: '
                f'give --data-path the folder that holds train/<class>/ and val/<class>/'
            )
        if not self.classes:
            raise DataError(
                f'data folder {self.root} has no class folders: put the images of each class in a folder of its own'
            )
        self._other_suffixes = Counter()
        counts = []

        def find_names() -> Iterator[str]:
            for label in self.classes:
                names = self._find_images(label)
                counts.append(len(names))
                yield from names

        self.names = NameList.of(find_names())
        self.targets = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        self.notes = []
        if self._other_suffixes:
            suffixes = ', '.join(suffix for suffix, _ in self._other_suffixes.most_common(5))
            self.notes = [f'{self._other_suffixes.total()} file(s) of other kinds in {self.root} left out ({suffixes})']

    @staticmethod
    def find_classes(folder: Path, split: str) -> list[str]:
        """Sorted names of the class folders, hidden ones ignored; empty if there are none."""
        root = folder / split
        if not root.is_dir():
            return []
        return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith('.'))

    def _find_images(self, label: str) -> list[str]:
        found = make_dataset(str(self.root), {label: 0}, is_valid_file=self._is_sample, allow_empty=True)
        start = len(str(self.root)) + 1
        return [path[start:].replace(os.sep, '/') for path, _ in found]

    def _is_sample(self, path: str) -> bool:
        if f'{os.sep}.' in path[len(str(self.root)) :]:
            return False
        if is_image_file(path):
            return True
        self._other_suffixes[os.path.splitext(path)[1].lower() or 'no suffix'] += 1
        return False

    def read(self, index: int) -> bytes:
        """The file."""
        return read_file(self.describe(index))

    def describe(self, index: int) -> str:
        """The file's path."""
        return str(self.root / self.names[index])
