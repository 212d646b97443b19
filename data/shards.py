"""The format of indexed tar shards: plain WebDataset tars, and a table of offsets that makes a sample one read.

A split is a folder of `shard_00000.tar`, `shard_00001.tar` and so on. Of sample `i` they hold the image as
`<i>.<suffix>` and its class index as `<i>.cls`, which any reader of WebDataset understands. The index beside them is

- `index.json`: names of the classes; per shard, its first sample, number of bytes and SHA-256; SHA-256 of the others:
- `samples.npy`: per sample, offset and number of bytes of the image in its shard, class, end of its name;
- `names.npy`: the names, one after the other, in UTF-8.
"""

import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.images import DataError
from data.packed_lists import NameList
from data.samples import Samples
from utils import read_json

INDEX, SAMPLES, NAMES = 'index.json', 'samples.npy', 'names.npy'
FORMAT = 1
KEYS = 'classes', 'fingerprint', 'samples', 'shards', 'tables'  # of index.json

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
        self.where = str(self.root)
        index = read_index(self.root)
        if index is None:
            raise DataError(f'{self.root} has no {INDEX}: make shards with python -m tools.pack_dataset')
        self.classes, self.notes = index['classes'], []
        self._starts = np.array([shard['first_sample'] for shard in index['shards']])
        table, text = (_load_table(self.root / name, index['tables']) for name in (SAMPLES, NAMES))
        self._offsets, self._sizes = np.ascontiguousarray(table['offset']), np.ascontiguousarray(table['bytes'])
        self.targets = np.ascontiguousarray(table['target'])
        self.names = NameList(np.asarray(text), np.ascontiguousarray(table['name_end']))
        self._files: dict[str, BinaryIO] = {}

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
        offset, size = int(self._offsets[index]), int(self._sizes[index])
        try:
            if path not in self._files:
                self._files[path] = open(path, 'rb', buffering=0)  # noqa: SIM115
            data = os.pread(self._files[path].fileno(), size, offset)
        except OSError as error:
            raise DataError(
                f'image {self.describe(index)} cannot be read ({error.strerror}): {_remedy(self.root)}'
            ) from error
        if len(data) < size:
            raise DataError(
                f'image {self.describe(index)} is cut short ({len(data)} of {size} bytes): {_remedy(self.root)}'
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
    index = read_json(path, str(path), DataError, _remedy(root))
    try:
        if index['format'] != FORMAT:
            raise ValueError(f'format {index["format"]}, not {FORMAT}')
        return {key: index[key] for key in KEYS}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f'{path} cannot be read ({error}): {_remedy(root)}') from error


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def _load_table(path: Path, checksums: dict[str, str]) -> np.ndarray:
    try:
        if sha256_of(path) != checksums.get(path.name):
            raise ValueError('it has changed since it was written')
        return np.load(path, mmap_mode='r')
    except (OSError, ValueError) as error:
        raise DataError(f'{path} cannot be read ({error}): {_remedy(path.parent)}') from error


def _remedy(root: Path) -> str:
    return f'remove {root} and pack it again with python -m tools.pack_dataset'
