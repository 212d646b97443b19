"""The format of indexed tar shards: plain WebDataset tars, and a table of offsets that makes a sample one read.

A split is a folder of `shard_00000.tar`, `shard_00001.tar` and so on. Of sample `i` they hold the image as
`<i>.<suffix>` and its class index as `<i>.cls`, which any reader of WebDataset understands. The index beside them is

- `index.json`: names of the classes and, per shard, its first sample, number of bytes and SHA-256;
- `samples.npy`: per sample, offset and number of bytes of the image in its shard, class, end of its name;
- `names.npy`: the names, one after the other, in UTF-8.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from data.images import DataError
from data.samples import NameList, Samples

INDEX, SAMPLES, NAMES = 'index.json', 'samples.npy', 'names.npy'
FORMAT = 1

SAMPLE = np.dtype([('offset', '<i8'), ('bytes', '<i8'), ('target', '<i4'), ('name_end', '<i8')])


class Shards(Samples):
    """The samples of `folder/split/`, written by `tools.pack_dataset`.

    Args:
        folder: of the dataset.
        split: `train` or `val`.

    Raises:
        DataError: there is no index, or one that cannot be read.
    """

    def __init__(self, folder: Path, split: str):
        self.root = folder / split
        index = read_index(self.root)
        if index is None:
            raise DataError(f'{self.root} has no {INDEX}: make shards with python -m tools.pack_dataset')
        self.classes, self.notes = index['classes'], []
        self._starts = np.array([shard['first_sample'] for shard in index['shards']])
        try:
            self._table = np.load(self.root / SAMPLES, mmap_mode='r')
            text = np.load(self.root / NAMES, mmap_mode='r')
        except (OSError, ValueError) as error:
            raise DataError(f'the index of {self.root} cannot be read ({error}): pack the shards again') from error
        if len(self._table) != index['samples'] or self._table.dtype != SAMPLE:
            raise DataError(f'{self.root / SAMPLES} does not belong to {INDEX}: pack the shards again')
        self.targets, self.names = self._table['target'], NameList(text, self._table['name_end'])
        self.check_classes(self.root)
        self._files: dict[str, int] = {}

    @staticmethod
    def find_classes(folder: Path, split: str) -> list[str]:
        """Names of the classes; empty if the split has no index."""
        index = read_index(folder / split)
        return index['classes'] if index else []

    def shard(self, index: int) -> Path:
        """The tar that holds a sample."""
        return self.root / shard_name(int(np.searchsorted(self._starts, index, side='right')) - 1)

    def read(self, index: int) -> bytes:
        """The image, by one read at its offset, which leaves the shard's other readers alone."""
        path = str(self.shard(index))
        entry = self._table[index]
        try:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDONLY)
            data = os.pread(self._files[path], int(entry['bytes']), int(entry['offset']))
        except OSError as error:
            raise DataError(
                f'image {self.describe(index)} cannot be read ({error.strerror}): pack the shards again'
            ) from error
        if len(data) < entry['bytes']:
            raise DataError(
                f'image {self.describe(index)} is cut short ({len(data)} of {entry["bytes"]} bytes): '
                f'pack the shards again'
            )
        return data

    def describe(self, index: int) -> str:
        """The shard and the sample's name."""
        return f'{self.names[index]} in {self.shard(index)}'

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {'_files': {}}


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f'shard_{number:05d}.tar'


def read_index(root: Path) -> dict[str, Any] | None:
    """Read a split's index.json; None if there is none.

    Raises:
        DataError: it cannot be read.
    """
    path = root / INDEX
    if not path.exists():
        return None
    try:
        index = json.loads(path.read_text())
        if index['format'] != FORMAT:
            raise DataError(f'{path} has format {index["format"]}, not {FORMAT}: pack the shards again')
        return index
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f'{path} cannot be read ({error}): pack the shards again') from error
