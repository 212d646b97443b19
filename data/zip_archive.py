"""The format of Swin's zip mode: `train.zip` with `train_map.txt`, whose lines are `path<TAB>class index`.

Python's zipfile reads the archive's directory, into an object of a kilobyte for each file. Five numbers of each file
are kept, in arrays that processes share. A sample is read with `pread` at its offset, so processes can share the file.
"""

import hashlib
import io
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

from data.images import DataError, check_image_bytes, open_regular, read_error
from data.packed_lists import NameList
from data.samples import Samples, leads_out, same_letters

# What precedes each file in the archive (PKWARE's APPNOTE.TXT, 4.3.7): signature, struct of the header
_LOCAL = b'PK\x03\x04', struct.Struct('<4s5H3L2H')

_ENCRYPTED, _UTF8 = 1, 1 << 11  # bits of a file's flags

_MACOS = re.compile(r'(^|/)(__MACOSX/|\._|\.DS_Store$)')  # names of files that macOS adds

_MAX_LINE = 1 << 16  # characters that are read of a line of a map


class ZipArchive(Samples):
    """The samples of `folder/<split>.zip` listed in `folder/<split>_map.txt`, in the map's order.

    Classes are named after the folders in the archive where each holds one class. Without them, as in Swin's val.zip,
    they have the names of the other split's, else numbers. Names may be in UTF-8 or another code page, with slashes or
    backslashes, in the archive and in the map; what macOS adds to archives is left out.

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
            if not os.path.isfile(path):
                problem = 'is not a file' if os.path.exists(path) else 'does not exist'
                raise DataError(f'{path} {problem}: a zip dataset has <split>.zip and <split>_map.txt')
        targets = array('i')
        self.names = NameList.of(_keep_targets(map_path, targets))
        self.targets = np.frombuffer(targets, np.int32)
        self.classes = self.find_classes(folder, split)
        self.notes = []
        try:
            entries, keys, positions = _read_directory(self.path)
            self._entries = entries[positions[self._find(keys)]]
            _check_overlaps(entries)
        except DataError:
            raise
        except Exception as error:  # zipfile raises errors of many types for damaged directories
            raise read_error(str(self.path), error, 'it is no complete zip archive') from error
        self._file = None

    def _find(self, keys: np.ndarray) -> np.ndarray:
        """Position of each sample among the keys of the archive's names."""
        wanted = np.frombuffer(array('Q', map(_key, self.names)), np.uint64)
        if not len(keys):
            raise DataError(f'{self.path} is empty: make the archive again')
        order = np.argsort(keys, kind='stable')
        found = order[np.searchsorted(keys, wanted, sorter=order).clip(max=len(keys) - 1)]
        if (missing := np.flatnonzero(keys[found] != wanted)).size:
            raise DataError(
                f'{self.path} has no {self.names[missing[0]]}, one of {missing.size} in the map: '
                f'give the map that was made with the archive'
            )
        return found

    @staticmethod
    def find_classes(folder: Path, split: str) -> list[str]:
        """Names of the classes; empty if the split has no map."""
        path, other = (folder / f'{name}_map.txt' for name in (split, 'val' if split == 'train' else 'train'))
        if not os.path.isfile(path):
            return []
        count, classes = _read_classes(path, path.stat().st_mtime_ns)
        if classes is None and os.path.isfile(other):
            _, classes = _read_classes(other, other.stat().st_mtime_ns)
        return list(classes) if classes and len(classes) == count else list(map(str, range(count)))

    def read(self, index: int) -> bytes:
        """The file, decompressed where it is compressed."""
        offset, compressed, size, checksum, method = map(int, self._entries[index])
        try:
            check_image_bytes(max(compressed, size))
            if self._file is None:
                self._file = open_regular(self.path)
            file = self._file.fileno()
            signature, *_, name, extra = _LOCAL[1].unpack(os.pread(file, _LOCAL[1].size, offset))
            data = os.pread(file, compressed, offset + _LOCAL[1].size + name + extra)
            if signature != _LOCAL[0] or len(data) < compressed:
                raise ValueError('the archive is cut short')
            if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f'compression method {method} is not supported')
            if method == zipfile.ZIP_DEFLATED:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)  # no more, even if there is more
            if len(data) != size:
                raise ValueError('its size differs')
            if zlib.crc32(data) != checksum:
                raise ValueError('its checksum differs')
            return data
        except (OSError, ValueError, struct.error, zlib.error) as error:
            raise read_error(f'image {self.describe(index)}', error, 'make the archive again') from error

    def describe(self, index: int) -> str:
        """The archive and the sample's name."""
        return f'{self.names[index]} in {self.path}'

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {'_file': None}


def _keep_targets(path: Path, targets: array) -> Iterator[str]:
    """Names in a map; their class indices are added to `targets`. What macOS adds to archives is left out.

    Raises:
        DataError: the map cannot be read, is empty, or a line is not `path<TAB>class index`.
    """
    try:
        with open_regular(path) as file, io.TextIOWrapper(file, 'utf-8-sig', 'surrogateescape') as lines:
            for number, line in enumerate(iter(lambda: lines.readline(_MAX_LINE), ''), start=1):
                name, tab, label = line.rstrip('\r\n').rpartition('\t')
                name = _clean(name)
                if not (tab and name and re.fullmatch('[0-9]{1,6}', label.strip(), re.ASCII)):
                    raise DataError(f'line {number} of {path} is not `path<TAB>class index`: {line.strip()[:80]!a}')
                if leads_out(name):
                    raise DataError(f'line {number} of {path} names {name[:80]!r}, which leads out of the archive')
                if not _MACOS.search(name):
                    targets.append(int(label))
                    yield name
    except OSError as error:
        raise read_error(str(path), error, 'give the map that was made with the archive') from error
    if not targets:
        raise DataError(f'{path} is empty: give the map that was made with the archive')


def _clean(name: str) -> str:
    """A name as it is compared: with slashes, composed letters, and from the archive's root."""
    return same_letters(name.replace('\\', '/').removeprefix('./').lstrip('/'))


@lru_cache(maxsize=4)
def _read_classes(path: Path, modified: int) -> tuple[int, list[str] | None]:
    """Number of classes in a map, and the folder of each in the archive; None unless each class has its own folder."""
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


def _read_directory(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offset, compressed and plain bytes, CRC-32 and method of each file, and the names by which it is found.

    Returns:
        The files (N, 5) int64; the `_key` of each name (M,) uint64; and the file of each name (M,) int64.
    """
    with open_regular(path) as source, zipfile.ZipFile(source) as archive:
        files = [file for file in archive.infolist() if not file.is_dir()]
    if any(file.flag_bits & _ENCRYPTED for file in files):
        raise ValueError('it is encrypted')
    entries = [(x.header_offset, x.compress_size, x.file_size, x.CRC, x.compress_type) for x in files]
    keys, positions = array('Q'), array('q')
    for position, file in enumerate(files):
        for name in _possible_names(file):
            keys.append(_key(_clean(name)))
            positions.append(position)
    return (
        np.array(entries, np.int64).reshape(-1, 5),
        np.frombuffer(keys, np.uint64),
        np.frombuffer(positions, np.int64),
    )


def _possible_names(file: zipfile.ZipInfo) -> Iterator[str]:
    """The name of a file in an archive; without the UTF-8 flag, also the name decoded as UTF-8.

    zipfile reads such names in code page 437; macOS and others write UTF-8 and do not say so.
    """
    yield file.filename
    if not (file.filename.isascii() or file.flag_bits & _UTF8):
        yield file.filename.encode('cp437').decode(errors='surrogateescape')


def _check_overlaps(entries: np.ndarray) -> None:
    """Check that no two files of an archive share bytes, as in a zip bomb.

    Raises:
        ValueError: files overlap.
    """
    entries = entries[np.argsort(entries[:, 0], kind='stable')]
    if (entries[:, :2] < 0).any() or (entries[:-1, :2].sum(1) + _LOCAL[1].size > entries[1:, 0]).any():
        raise ValueError('its files overlap')
