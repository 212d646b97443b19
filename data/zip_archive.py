"""The format of Swin's zip mode: `train.zip` with `train_map.txt`, whose lines are `path<TAB>class index`.

Python's zipfile reads the archive's directory, into an object of a kilobyte for each file. Four numbers of each are
kept, in arrays that processes share. A sample is read at its offset, which leaves the archive's other readers alone.
"""

import hashlib
import os
import re
import struct
import zipfile
import zlib
from array import array
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data.images import DataError
from data.packed_lists import NameList
from data.samples import Samples

# What precedes each file in the archive (PKWARE's APPNOTE.TXT, 4.3.7): signature, struct of the header
_LOCAL = b'PK\x03\x04', struct.Struct('<4s5H3L2H')


class ZipArchive(Samples):
    """The samples of `folder/<split>.zip` listed in `folder/<split>_map.txt`, in the map's order.

    Classes are named after the folders in the archive where each holds one class. Without them, as in Swin's val.zip,
    they have the names of the other split's, else numbers.

    Args:
        folder: of the dataset.
        split: `train` or `val`.

    Raises:
        DataError: a file is missing or cannot be read, or the map names a file that the archive does not hold.
    """

    def __init__(self, folder: Path, split: str):
        self.path, map_path = folder / f'{split}.zip', folder / f'{split}_map.txt'
        self.where = str(self.path)
        for path in (self.path, map_path):
            if not path.exists():
                raise DataError(f'{path} does not exist: a zip dataset has <split>.zip and <split>_map.txt')
        self.notes = []
        targets = array('i')
        self.names = NameList.of(_keep_targets(map_path, targets))
        self.targets = np.frombuffer(targets, np.int32)
        self.classes = self.find_classes(folder, split)
        try:
            entries, keys = _read_directory(self.path)
        except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
            raise DataError(f'{self.path} cannot be read ({error}): it is no complete zip archive') from error
        self._entries = entries[self._find(keys)]
        self._file = None

    def _find(self, keys: np.ndarray) -> np.ndarray:
        """Position of each sample in the archive's directory."""
        wanted = np.frombuffer(array('Q', map(_key, self.names)), np.uint64)
        if not len(keys):
            raise DataError(f'{self.path} is empty: make the archive again')
        order = np.argsort(keys)
        positions = order[np.searchsorted(keys, wanted, sorter=order).clip(max=len(keys) - 1)]
        if (missing := np.flatnonzero(keys[positions] != wanted)).size:
            raise DataError(
                f'{self.path} has no {self.names[missing[0]]}, one of {missing.size} in the map: '
                f'give the map that was made with the archive'
            )
        return positions

    @staticmethod
    def find_classes(folder: Path, split: str) -> list[str]:
        """Names of the classes; empty if the split has no map."""
        path, other = (folder / f'{name}_map.txt' for name in (split, 'val' if split == 'train' else 'train'))
        if not path.exists():
            return []
        count, classes = _read_classes(path, path.stat().st_mtime_ns)
        if classes is None and other.exists():
            _, classes = _read_classes(other, other.stat().st_mtime_ns)
        return list(classes) if classes and len(classes) == count else list(map(str, range(count)))

    def read(self, index: int) -> bytes:
        """The file, decompressed where it is compressed."""
        offset, size, checksum, method = map(int, self._entries[index])
        try:
            if self._file is None:
                self._file = open(self.path, 'rb', buffering=0)  # noqa: SIM115
            file = self._file.fileno()
            signature, *_, name, extra = _LOCAL[1].unpack(os.pread(file, _LOCAL[1].size, offset))
            data = os.pread(file, size, offset + _LOCAL[1].size + name + extra)
            if signature != _LOCAL[0] or len(data) < size:
                raise ValueError('the archive is cut short')
            if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f'compression method {method} is not supported')
            data = zlib.decompress(data, -zlib.MAX_WBITS) if method == zipfile.ZIP_DEFLATED else data
            if zlib.crc32(data) != checksum:
                raise ValueError('its checksum differs')
            return data
        except (OSError, ValueError, struct.error, zlib.error) as error:
            raise DataError(f'image {self.describe(index)} cannot be read ({error}): make the archive again') from error

    def describe(self, index: int) -> str:
        """The archive and the sample's name."""
        return f'{self.names[index]} in {self.path}'

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {'_file': None}


def _keep_targets(path: Path, targets: array) -> Iterator[str]:
    """Names in a map; their class indices are added to `targets`."""
    with path.open(encoding='utf-8', errors='surrogateescape') as lines:
        for number, line in enumerate(lines, start=1):
            name, tab, label = line.rstrip('\r\n').rpartition('\t')
            if not (tab and re.fullmatch('[0-9]{1,6}', label.strip())):
                raise DataError(f'line {number} of {path} is not `path<TAB>class index`: {line.strip()[:80]!r}')
            targets.append(int(label))
            yield name.lstrip('/')
    if not targets:
        raise DataError(f'{path} is empty: give the map that was made with the archive')


@lru_cache(maxsize=4)
def _read_classes(path: Path, modified: int) -> tuple[int, list[str] | None]:
    """Number of classes in a map, and the folder of each in the archive; None unless each has one of its own."""
    targets, folders = array('i'), {}
    for name in _keep_targets(path, targets):
        folder, slash, _ = name.partition('/')
        folders.setdefault(targets[-1], set()).add(folder if slash else '')
    count = max(folders) + 1
    distinct = set().union(*folders.values())
    if '' not in distinct and len(distinct) == len(folders) == count == sum(map(len, folders.values())):
        return count, [folders[target].pop() for target in range(count)]
    return count, None


def _key(name: str) -> int:
    """A hash of a name that is the same in all processes."""
    digest = hashlib.blake2b(name.encode(errors='surrogateescape'), digest_size=8).digest()
    return int.from_bytes(digest, 'little')


def _read_directory(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Offset, compressed bytes, CRC-32 and method of each file (N, 4) int64, and its name's `_key` (N,) uint64."""
    with zipfile.ZipFile(path) as archive:
        files = archive.infolist()
    entries = [(file.header_offset, file.compress_size, file.CRC, file.compress_type) for file in files]
    keys = [_key(file.filename) for file in files]
    return np.array(entries, np.int64).reshape(-1, 4), np.array(keys, np.uint64)
