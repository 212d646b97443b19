"""One split of a dataset, in any format: its classes and, by index, the samples' names, targets and encoded images."""

from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

_ENCODING = {'encoding': 'utf-8', 'errors': 'surrogateescape'}  # names of files need not be Unicode


class NameList(Sequence[str]):
    """Strings in two arrays, which forked processes share: a list of objects costs them several times its size each.

    Args:
        text: (bytes,) uint8, all strings, one after the other.
        ends: (strings,) int64, where each of them ends.
    """

    def __init__(self, text: np.ndarray, ends: np.ndarray):
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, names: Iterable[str]) -> 'NameList':
        """Pack strings."""
        text, ends = bytearray(), array('q')
        for name in names:
            text += name.encode(**_ENCODING)
            ends.append(len(text))
        return cls(np.frombuffer(text, np.uint8), np.frombuffer(ends, np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        start = self.ends[index - 1] if index else 0
        return self.text[start : self.ends[index]].tobytes().decode(**_ENCODING)

    def __iter__(self) -> Iterator[str]:
        start = 0
        for first in range(0, len(self), 1000):  # ten times as fast as one by one
            ends = self.ends[first : first + 1000].tolist()
            text, offset = self.text[start : ends[-1]].tobytes(), start
            for end in ends:
                yield text[start - offset : end - offset].decode(**_ENCODING)
                start = end


class Samples(ABC):
    """A split of a dataset.

    Attributes:
        classes: names of the classes.
        targets: class index of each sample, (N,) int32.
        names: of the samples: `class/path/within/it.suffix` where the format knows it.
        notes: lines for the log, such as what was left out.
        where: the split, for errors.
    """

    classes: list[str]
    targets: np.ndarray
    names: NameList
    notes: list[str]
    where: str

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

    @abstractmethod
    def describe(self, index: int) -> str:
        """Where the sample is, for errors."""

    def sample_names(self) -> Iterator[str]:
        """The names, in order, without suffixes: equal in all formats that hold the same samples."""
        return (without_suffix(name) for name in self.names)

    def empty_classes(self) -> list[str]:
        """What is wrong, in words, with each class that has no samples."""
        present = set(np.unique(self.targets).tolist())
        empty = (name for number, name in enumerate(self.classes) if number not in present)
        return [f'class {self.where}/{name} holds no images: add some or remove it' for name in empty]


def without_suffix(name: str) -> str:
    """A sample's name without the suffix of its file."""
    folder, slash, file = name.rpartition('/')
    stem, dot, _ = file.rpartition('.')
    return folder + slash + (stem if dot and stem else file)
