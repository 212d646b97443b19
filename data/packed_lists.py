"""Lists whose items lie one after the other in an array: small, and shared by processes."""

import pickle
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Self, TypeVar

import numpy as np

from data.sharing import Shareable

Item = TypeVar('Item')


class PackedList(Shareable, Sequence[Item]):
    """A list whose items are pickled: as objects, they would take several times the memory, in each process.

    Args:
        content: (bytes,) uint8, all items, one after the other.
        ends: (items,) int64, where each of them ends.
    """

    def __init__(self, content: np.ndarray, ends: np.ndarray):
        self.content, self.ends = content, ends

    @classmethod
    def of(cls, items: Iterable[Item]) -> Self:
        """Pack items."""
        content, ends = bytearray(), array('q')
        for item in items:
            content += cls.encode(item)
            ends.append(len(content))
        return cls(np.frombuffer(content, np.uint8), np.frombuffer(ends, np.int64))

    @staticmethod
    def encode(item: Item) -> bytes:
        """An item as bytes."""
        return pickle.dumps(item)

    @staticmethod
    def decode(content: bytes) -> Item:
        """The item of some bytes."""
        return pickle.loads(content)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Item:
        index = range(len(self))[index]
        start = self.ends[index - 1] if index else 0
        return self.decode(self.content[start : self.ends[index]].tobytes())

    def __iter__(self) -> Iterator[Item]:
        start = 0
        for first in range(0, len(self), 1000):  # ten times as fast as one by one
            ends = self.ends[first : first + 1000].tolist()
            content, offset = self.content[start : ends[-1]].tobytes(), start
            for end in ends:
                yield self.decode(content[start - offset : end - offset])
                start = end


class NameList(PackedList[str]):
    """A packed list of strings, such as names of files, which need not be Unicode."""

    @staticmethod
    def encode(item: str) -> bytes:
        """A string in UTF-8."""
        return item.encode(encoding='utf-8', errors='surrogateescape')

    @staticmethod
    def decode(content: bytes) -> str:
        """The string of some UTF-8."""
        return content.decode(encoding='utf-8', errors='surrogateescape')
