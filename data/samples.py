"""One split of a dataset, in any format: its classes and, by index, the samples' names, targets and encoded images."""

import unicodedata
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.packed_lists import NameList
from data.sharing import Shareable

# Names that the splits may have in other projects' formats, where `val` has many
SPLIT_NAMES = {'train': ('train',), 'val': ('validation', 'val', 'valid', 'test')}


class Samples(Shareable, ABC):
    """A split of a dataset. What a format keeps for each sample belongs into arrays: see `Shareable`.

    Attributes:
        classes: names of the classes.
        targets: class index of each sample, (N,) int32.
        names: of the samples: `class/path/within/it.suffix` where the format knows it.
        notes: lines for the log, such as what was left out.
        where: the split, for errors.
        is_multi_label: whether an image may have several classes, or none: see `labels`.
    """

    classes: list[str]
    targets: np.ndarray
    names: NameList
    notes: list[str]
    where: str
    is_multi_label = False

    def __len__(self) -> int:
        return len(self.targets)

    @staticmethod
    @abstractmethod
    def find_classes(folder: Path, split: str) -> list[str]:
        """Names of the classes of `train` or `val` in a dataset's folder; empty if it has no such split."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The sample's encoded image.

        Raises:
            DataError: it cannot be read.
        """

    def load(self, index: int) -> tuple[bytes, int | list[int]]:
        """The sample's encoded image, and the index of its class or, where `is_multi_label`, those of its classes.

        Raises:
            DataError: it cannot be read.
        """
        return self.read(index), self.labels(index) if self.is_multi_label else int(self.targets[index])

    def labels(self, index: int) -> list[int]:
        """Class indices of a sample: one, or any number where `is_multi_label`; `targets` has the first, or -1."""
        return [int(self.targets[index])]

    @abstractmethod
    def describe(self, index: int) -> str:
        """Where the sample is, for errors."""

    def sample_names(self) -> Iterator[str]:
        """The names, in order, without suffixes: equal in all formats that hold the same samples."""
        return (same_letters(without_suffix(name)) for name in self.names)

    def empty_classes(self) -> list[str]:
        """What is wrong, in words, with each class that has no samples."""
        present = set(np.unique(self.targets).tolist())
        empty = (name for number, name in enumerate(self.classes) if number not in present)
        return [self.describe_empty(name) for name in empty]

    def describe_empty(self, name: str) -> str:
        """What is wrong, in words, with a class without samples."""
        return f'class {self.where}/{name} holds no images: add some or remove it'


class LabelList:
    """Collects the class labels of samples, and numbers the distinct labels at the end."""

    def __init__(self) -> None:
        self._positions: dict[str, int] = {}
        self._numbers = array('i')

    def append(self, label: str) -> None:
        """Add the label of the next sample."""
        self._numbers.append(self._positions.setdefault(label, len(self._positions)))

    def __len__(self) -> int:
        return len(self._numbers)

    def number(self) -> tuple[list[str], np.ndarray]:
        """Number the distinct labels: in the order of letters or, where all are numbers, of the numbers.

        Returns:
            The distinct labels, in order; and the index of each sample's label among them, (N,) int32.
        """
        labels = list(self._positions)
        is_numeric = all(label.isascii() and label.isdigit() for label in labels)
        ordered = sorted(labels, key=lambda label: (len(label), label) if is_numeric else label)
        ranks = {label: rank for rank, label in enumerate(ordered)}
        return ordered, np.array([ranks[label] for label in labels], np.int32)[np.frombuffer(self._numbers, np.int32)]


def same_letters(name: str) -> str:
    """Normalise a name to composed letters (Unicode's NFC), so that equal names compare equal.

    A letter such as é is one character on Linux and Windows; in copies from a Mac, it may be an e and an accent.
    """
    return name if name.isascii() else unicodedata.normalize('NFC', name)


def leads_out(name: str) -> bool:
    """Whether a name leads out of the folder it is relative to, by `..` among its folders."""
    return '..' in name and '..' in name.split('/')


def without_suffix(name: str) -> str:
    """A sample's name without the suffix of its file."""
    folder, slash, file = name.rpartition('/')
    stem, dot, _ = file.rpartition('.')
    return folder + slash + (stem if dot and stem else file)
