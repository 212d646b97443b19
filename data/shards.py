"""The format of indexed tar shards: plain WebDataset tars, and a table of offsets that makes a sample one read.

A split is a folder of `shard_00000.tar`, `shard_00001.tar` and so on. They have the image of sample `i` as
`<i>.<suffix>` and its class index as `<i>.cls`, which any reader of WebDataset understands. The folder has an index:

- `index.json`: names of the classes; first sample, number of bytes and SHA-256 of each shard; SHA-256 of both tables;
- `samples.npy`: for each sample, offset and number of bytes of the image in its shard, class, end of its name;
- `names.npy`: the names of the samples, one after the other, in UTF-8.
"""

import hashlib
import os
from abc import abstractmethod
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.images import MAX_IMAGE_BYTES, DataError, check_image_bytes, open_regular, read_error
from data.packed_lists import NameList
from data.samples import Samples, leads_out, same_letters
from text_files import read_json

INDEX, SAMPLES, NAMES = 'index.json', 'samples.npy', 'names.npy'
FORMAT = 1
KEYS = 'classes', 'fingerprint', 'samples', 'shards', 'tables'  # of index.json

# Shards that a process keeps open: a dataset may have more of them than a process may open files, often 1024.
MAX_OPEN = 64

_MAX_INDEX_BYTES = 32 << 20  # of index.json, which has 150 bytes for each shard of 10,000 images

SAMPLE = np.dtype([('offset', '<i8'), ('bytes', '<i8'), ('target', '<i4'), ('name_end', '<i8')])


class TarSamples(Samples):
    """Samples that are members of tars, each read at its offset.

    Attributes:
        remedy: what to do about an image that cannot be read, for errors.
    """

    remedy: str
    _starts: np.ndarray  # index of the first sample of each tar, (tars,)
    _offsets: np.ndarray  # of each image in its tar, and its number of bytes, (N,)
    _sizes: np.ndarray
    _files: OrderedDict[str, BinaryIO]

    @abstractmethod
    def tar_path(self, number: int) -> Path:
        """The path of a tar by its number."""

    def shard(self, index: int) -> Path:
        """The tar that holds a sample."""
        return self.tar_path(int(np.searchsorted(self._starts, index, side='right')) - 1)

    def read(self, index: int) -> bytes:
        """Read the image with one `pread` at its offset; the shard's file position, which processes share, stays."""
        path = str(self.shard(index))
        offset, size = int(self._offsets[index]), int(self._sizes[index])
        try:
            check_image_bytes(size)
            data = os.pread(self._open(path).fileno(), size, offset)
        except (OSError, ValueError) as error:
            raise read_error(f'image {self.describe(index)}', error, self.remedy) from error
        if len(data) < size:
            raise DataError(f'image {self.describe(index)} is cut short ({len(data)} of {size} bytes): {self.remedy}')
        return data

    def _open(self, path: str) -> BinaryIO:
        """A shard's file, which stays open until `MAX_OPEN` others have been read."""
        if path not in self._files:
            if len(self._files) >= MAX_OPEN:
                self._files.popitem(last=False)[1].close()
            self._files[path] = open_regular(path)
        self._files.move_to_end(path)
        return self._files[path]

    def describe(self, index: int) -> str:
        """The shard and the sample's name."""
        return f'{self.names[index]} in {self.shard(index)}'

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {'_files': OrderedDict()}


class Shards(TarSamples):
    """The samples of `folder/split/`, written by `tools.pack_dataset`.

    Args:
        folder: of the dataset.
        split: `train` or `val`.

    Raises:
        DataError: there is no index, or one that cannot be read.
    """

    def __init__(self, folder: Path, split: str):
        self.root = folder / split
        self.where, self.remedy = str(self.root), _remedy(self.root)
        index = read_index(self.root)
        if index is None:
            raise DataError(f'{self.root} has no {INDEX}: make shards with python -m tools.pack_dataset')
        self.classes, self.notes = index['classes'], []
        self._starts = np.array([shard['first_sample'] for shard in index['shards']], np.int64)
        table, text = (_load_table(self.root / name, index['tables']) for name in (SAMPLES, NAMES))
        if problem := _find_problem(index, table, text):
            raise DataError(f'{self.root / SAMPLES} cannot be read ({problem}): {_remedy(self.root)}')
        self._offsets, self._sizes = np.ascontiguousarray(table['offset']), np.ascontiguousarray(table['bytes'])
        self.targets = np.ascontiguousarray(table['target'])
        self.names = NameList(np.asarray(text), np.ascontiguousarray(table['name_end']))
        if odd := odd_name(self.names):
            raise DataError(f'{self.root / NAMES} names {odd!r}, which leads out of its folder: {_remedy(self.root)}')
        self._files: OrderedDict[str, BinaryIO] = OrderedDict()

    @staticmethod
    def find_classes(folder: Path, split: str) -> list[str]:
        """Names of the classes; empty if the split has no index."""
        index = read_index(folder / split)
        return index['classes'] if index else []

    def tar_path(self, number: int) -> Path:
        """The path of a shard."""
        return self.root / shard_name(number)


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f'shard_{number:05d}.tar'


def read_index(root: Path) -> dict[str, Any] | None:
    """Read a split's index.json; None if there is none.

    Raises:
        DataError: it cannot be read.
    """
    path = root / INDEX
    if not os.path.isfile(path):
        return None
    if path.stat().st_size > _MAX_INDEX_BYTES:
        raise DataError(f'{path} cannot be read (it is larger than {_MAX_INDEX_BYTES >> 20} MB): {_remedy(root)}')
    index = read_json(path, str(path), DataError, _remedy(root))
    try:
        if index['format'] != FORMAT:
            raise ValueError(f'format {index["format"]}, not {FORMAT}')
        index = {key: index[key] for key in KEYS}
        _check_index(index)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f'{path} cannot be read ({error}): {_remedy(root)}') from error
    return index | {'classes': [same_letters(name) for name in index['classes']]}


def _check_index(index: dict[str, Any]) -> None:
    """Check the types and the order of what an index holds.

    Raises:
        ValueError, KeyError, TypeError: something is wrong.
    """
    shards, tables = index['shards'], index['tables']
    if not (isinstance(index['classes'], list) and isinstance(shards, list) and isinstance(tables, dict)):
        raise TypeError('classes and shards must be lists, and tables a mapping')
    numbers = [index['samples'], *(shard[key] for shard in shards for key in ('first_sample', 'bytes'))]
    texts = [index['fingerprint'], *index['classes'], *tables.values(), *(shard['sha256'] for shard in shards)]
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise TypeError('a number is not an integer, or is out of range')
    if not all(isinstance(text, str) for text in texts):
        raise TypeError('a name or checksum is not a text')
    starts = [shard['first_sample'] for shard in shards]
    if starts != sorted(set(starts)) or starts[:1] != [0] or starts[-1] >= index['samples']:
        raise ValueError('the first samples of the shards do not increase from 0')


def _find_problem(index: dict[str, Any], table: np.ndarray, text: np.ndarray) -> str | None:
    """What is wrong with the tables of an index, in words."""
    if table.dtype != SAMPLE or table.shape != (index['samples'],):
        return f'it is not a table of {index["samples"]} samples'
    if text.dtype != np.uint8 or text.ndim != 1:
        return f'{NAMES} is not a text'
    starts = np.array([shard['first_sample'] for shard in index['shards']])
    ends = np.repeat([shard['bytes'] for shard in index['shards']], np.diff(starts, append=index['samples']))
    offsets, sizes = table['offset'], table['bytes']
    if not ((offsets >= 0) & (sizes >= 0) & (sizes <= MAX_IMAGE_BYTES) & (offsets <= ends - sizes)).all():
        return f'an image lies outside its shard, or is larger than {MAX_IMAGE_BYTES:,} bytes'
    if not ((table['target'] >= 0) & (table['target'] < len(index['classes']))).all():
        return f'a class index is not one of {len(index["classes"])}'
    name_ends = table['name_end']
    if name_ends[0] < 0 or (np.diff(name_ends) < 0).any() or name_ends[-1] != len(text):
        return f'its names are not those of {NAMES}'
    return None


def odd_name(names: NameList) -> str | None:
    """A name that leads out of its folder, or None."""
    if b'..' not in names.content.tobytes():
        return None
    return next((name for name in names if leads_out(name)), None)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        OSError: it cannot be read, or is not a regular file.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def _load_table(path: Path, checksums: dict[str, str]) -> np.ndarray:
    try:
        if sha256_of(path) != checksums.get(path.name):
            raise ValueError('it has changed since it was written')
        return np.lib.format.open_memmap(path, mode='r')
    except Exception as error:  # NumPy raises errors of many types for damaged headers
        raise read_error(str(path), error, _remedy(path.parent)) from error


def _remedy(root: Path) -> str:
    return f'remove {root} and pack it again with python -m tools.pack_dataset'
