"""The format of existing WebDataset tars: `<key>.jpg` with the class in `<key>.cls` or `<key>.json`.

When a split is opened, the headers of its tars are read once, by Python's tarfile, and give a table of offsets. So a
sample is one read, in any order.
"""

import json
import os
import re
import tarfile
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from data.images import IMAGE_SUFFIXES, DataError, open_regular, read_error
from data.packed_lists import NameList
from data.samples import SPLIT_NAMES, LabelList, same_letters
from data.shards import INDEX, TarSamples, odd_name

# Optional file with the name of each class index on a line
CLASS_NAMES = 'classnames.txt'

# Entries of a sample's JSON that may have its class, as index or name
LABELS = ('label', 'cls')

_KEY = re.compile(r'((?:.*/)?[^./]+)\.([^/]*)')  # of WebDataset: up to the first dot of a member's file name

_IMAGES = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)

_MAX_HEADER_BYTES = 1 << 20  # of a member's name and other headers, and of its label


class WebDataset(TarSamples):
    """The samples of `folder/<split>/*.tar` or `folder/*<split>*.tar`, in the order of their names.

    Labels are class indices, which `classnames.txt` may name, or names of classes, which are numbered in their order.
    The classes of both splits are those of `train`, if there is one.

    Args:
        folder: of the dataset.
        split: `train` or `val`, which may be called validation, valid or test.

    Raises:
        DataError: there are no tars, or one cannot be read or has a sample without an image or a class.
    """

    def __init__(self, folder: Path, split: str):
        self.paths = find_tars(folder, split)
        if not self.paths:
            raise DataError(
                f'{folder} has no tars of {split}: name them {split}/*.tar or *-{split}-*.tar, uncompressed'
            )
        self.where, self.remedy = f'{folder} ({split})', 'download or write that tar again'
        members = _read_tars(self.paths)
        self._starts, self._offsets, self._sizes, self.names = members[:4]
        self.classes, self.notes = self.find_classes(folder, split), []
        names = map(str, range(len(self.classes))) if members.are_indices else self.classes
        numbers = {name: number for number, name in enumerate(names)}
        if missing := [label for label in members.labels if label not in numbers]:
            raise DataError(
                f'{self.where} has images of class {missing[0][:50]!r}, which is none of the {len(self.classes)} '
                f'classes of train or {CLASS_NAMES}: add it there, or leave the images out'
            )
        self.targets = np.array([numbers[label] for label in members.labels], np.int32)[members.positions]
        self._files: OrderedDict[str, BinaryIO] = OrderedDict()

    @staticmethod
    def find_classes(folder: Path, split: str) -> list[str]:
        """Names of the classes; empty if there is no such split."""
        if not find_tars(folder, split):
            return []
        if os.path.isfile(folder / CLASS_NAMES):
            return _read_class_names(folder / CLASS_NAMES)
        members = _read_tars(find_tars(folder, 'train') or find_tars(folder, split))
        return list(map(str, range(int(members.labels[-1]) + 1))) if members.are_indices else list(members.labels)

    def tar_path(self, number: int) -> Path:
        """The path of a tar."""
        return Path(self.paths[number])


class Members(NamedTuple):
    """The samples of some tars.

    Attributes:
        starts: index of the first sample of each tar, (tars,).
        offsets, sizes: of the images, in bytes, (N,).
        names: of the images.
        labels: distinct labels, in order.
        positions: of each sample's label among them, (N,).
        are_indices: whether the labels are class indices.
    """

    starts: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    names: NameList
    labels: list[str]
    positions: np.ndarray
    are_indices: bool


class Member(NamedTuple):
    """An image of a tar: its name, its offset and size in bytes, and its label."""

    name: str
    offset: int
    size: int
    label: str


def find_tars(folder: Path, split: str) -> tuple[str, ...]:
    """Find the tars of a split, by the first of the split's names that a folder or file names have.

    Raises:
        DataError: the tars are from an interrupted packing, or a folder cannot be listed.
    """
    for name in SPLIT_NAMES[split]:
        root = folder / name
        if os.path.isfile(root / '.lock') and not os.path.isfile(root / INDEX):
            raise DataError(f'{root} holds an unfinished packing: complete it with python -m tools.pack_dataset')
        word = re.compile(rf'(?:[^.].*[^a-z]|[^a-z.])?{name}(?:[^a-z].*)?\.tar', re.IGNORECASE)
        if found := _list_files(root, re.compile(r'[^.].*\.tar', re.IGNORECASE)) or _list_files(folder, word):
            return tuple(found)
    return ()


def _list_files(folder: Path, pattern: re.Pattern) -> list[str]:
    """Sorted paths of the files in a folder whose names match; none if there is no such folder.

    Raises:
        DataError: it cannot be listed.
    """
    try:
        names = os.listdir(folder) if os.path.isdir(folder) else []
    except OSError as error:
        raise read_error(f'data folder {folder}', error, 'make it readable') from error
    return sorted(str(folder / name) for name in names if pattern.fullmatch(name) and os.path.isfile(folder / name))


def _read_tars(paths: tuple[str, ...]) -> Members:
    """Read the members of tars; they are cached until a tar changes.

    Raises:
        DataError: a tar cannot be read, or a sample in it has no image or no class.
    """
    states = map(os.stat, paths)
    return _read_versions(paths, tuple((state.st_mtime_ns, state.st_size) for state in states))


@lru_cache(maxsize=2)
def _read_versions(paths: tuple[str, ...], versions: tuple[tuple[int, int], ...]) -> Members:
    starts, offsets, sizes, labels = array('q'), array('q'), array('q'), LabelList()

    def find_names() -> Iterator[str]:
        for path in paths:
            starts.append(len(offsets))
            try:
                for member in _find_images(path):
                    offsets.append(member.offset)
                    sizes.append(member.size)
                    labels.append(same_letters(member.label))
                    yield member.name
            except DataError:
                raise
            except Exception as error:  # tarfile raises errors of many types for damaged files
                raise read_error(path, error, 'download or write it again') from error

    names = NameList.of(find_names())
    if not names:
        raise DataError(f'{paths[0]} has no images, nor has a tar after it: give tars of <key>.jpg and <key>.cls')
    if odd := odd_name(names):
        raise DataError(f'{os.path.dirname(paths[0])} has a tar with {odd!r}, which leads out of its folder')
    numbered, positions = labels.number()
    are_indices = all(re.fullmatch('[0-9]{1,6}', label, re.ASCII) for label in numbered)
    arrays = (np.frombuffer(values, np.int64) for values in (starts, offsets, sizes))
    return Members(*arrays, names, numbered, positions, are_indices)


def _find_images(path: str) -> Iterator[Member]:
    """The images of a tar; of a sample with several, the one whose suffix is first in `IMAGE_SUFFIXES`.

    Raises:
        DataError: a sample has no image or no class.
        Exception: the tar is damaged.
    """
    with open_regular(path) as file:
        key, parts = '', {}
        for member in _list_members(file):
            if not (found := _KEY.fullmatch(member.name)):
                continue
            if found[1] != key:
                if parts:
                    yield _to_image(file, key, parts, path)
                key, parts = found[1], {}
            if found[2].lower() in parts:
                raise ValueError(f'{member.name[:200]!a} is in it twice')
            parts[found[2].lower()] = member
        if parts:
            yield _to_image(file, key, parts, path)


def _list_members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The regular files of a tar.

    Raises:
        ValueError: it is damaged; where tarfile only stops, too.
    """
    size, end = os.fstat(file.fileno()).st_size, 0
    with tarfile.open(fileobj=_SmallReads(file), mode='r:') as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # which would grow
            is_file = member.isreg() and not member.issparse()
            if member.size < 0 or tar.offset <= end or (is_file and member.offset_data + member.size > size):
                raise ValueError(f'it is cut short or damaged at {member.name[:200]!a}')
            end = tar.offset
            if is_file:
                yield member
        if os.pread(file.fileno(), tarfile.BLOCKSIZE, end).strip(b'\0'):
            raise ValueError(f'it is damaged {end:,} bytes after its start')


class _SmallReads:
    """File wrapper that refuses large reads: a damaged header may ask for gigabytes."""

    def __init__(self, file: BinaryIO):
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        """Read some bytes.

        Raises:
            ValueError: they are too many.
        """
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise ValueError(f'a header of {size:,} bytes')
        return self.file.read(size)


def _to_image(file: BinaryIO, key: str, parts: dict[str, tarfile.TarInfo], path: str) -> Member:
    """The image of a sample, with its label.

    Args:
        file: the open tar.
        key: of the sample.
        parts: its members by suffix.
        path: of the tar.

    Raises:
        DataError: it has no image or no class.
    """
    image = next((parts[suffix] for suffix in _IMAGES if suffix in parts), None)
    source = parts.get('cls') or parts.get('json')
    try:
        if image is None:
            raise ValueError('no image: write it as <key>.jpg or <key>.png')
        if source is None or source.size > _MAX_HEADER_BYTES:
            raise ValueError('no class: write its index as <key>.cls')
        label = os.pread(file.fileno(), source.size, source.offset_data).decode()
        if source is not parts.get('cls'):
            entries = json.loads(label)
            label = next((entries[entry] for entry in LABELS if entry in entries), None)
            if type(label) not in (int, str):
                raise ValueError('no class in its .json: write {"label": <class index>}')
        label = str(label).strip()
        if not label or label.startswith('-'):
            raise ValueError(f'the class {label[:50]!r}: leave it out, or write its index')
    except (ValueError, TypeError, RecursionError) as error:
        found = ', '.join(f'.{suffix}' for suffix in list(parts)[:10])
        reason = str(error) if type(error) is ValueError else 'no class in UTF-8 or JSON: write its index as <key>.cls'
        raise DataError(f'sample {key[:200]!a} of {path} ({found[:200]!a}) has {reason}') from error
    return Member(image.name, image.offset_data, image.size, label)


def _read_class_names(path: Path) -> list[str]:
    """The names of classes, one on each line; where several have the same one, with their indices.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with open_regular(path) as file:
            names = [same_letters(line.strip()) for line in file.read(_MAX_HEADER_BYTES << 4).decode().splitlines()]
    except (OSError, ValueError) as error:
        raise read_error(path, error, 'write the name of each class on a line, in UTF-8') from error
    names = names[: max((i + 1 for i, name in enumerate(names) if name), default=0)]
    counts = Counter(names)  # ImageNet has two classes that some lists call sunglasses
    return [name if name and counts[name] == 1 else f'{name} ({i})'.strip() for i, name in enumerate(names)]
