"""The format of a table: a CSV or Parquet file lists images anywhere below the dataset's folder, with their classes."""

import csv
import io
import os
from array import array
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.images import (
    IMAGE_SUFFIXES,
    DataError,
    describe_kinds,
    existing_path,
    kind_of_value,
    open_regular,
    read_error,
    read_file,
)
from data.packed_lists import NameList
from data.samples import LabelList, Samples, leads_out, same_letters

# Names of the columns, in small letters; of `labels`, a value has any number of classes with | between them
COLUMNS = {
    'path': ('path', 'file_name', 'filename', 'image'),
    'label': ('label', 'class', 'target'),
    'labels': ('labels',),
    'split': ('split',),
}

# Values of the column `split`; rows with another one, such as test, are left out
SPLITS = {'train': ('train', 'training'), 'val': ('val', 'valid', 'validation')}

_MAX_LINE = 1 << 16  # characters that are read of a line

_BATCH = 10_000  # rows of Parquet that are read at a time


class Table(Samples):
    """The images listed in `<split>.csv` or `<split>.parquet`, or in the rows of a split in `labels.csv` or `.parquet`.

    Classes are the sorted labels; without a column of labels, they are the folders that the images are in. Paths are
    relative to the dataset's folder or to the split's in it. Names of samples leave the split's folder out, so that
    they are those of class folders.

    Args:
        folder: of the dataset.
        split: `train` or `val`.

    Raises:
        DataError: there is no table, it cannot be read, or the images that it lists do not exist.
    """

    def __init__(self, folder: Path, split: str):
        path = find_table(folder, split)
        if path is None:
            raise DataError(
                f'{folder} has no table of {split} images: write {split}.csv or {split}.parquet with the columns path '
                f'and label, or labels.csv with the column split too'
            )
        rows = _read_rows(path, folder, split)
        if not rows.names:
            raise DataError(f'{path} has no rows of {split}: add some, such as with {split} in the column split')
        self.folder, self.split_folder, self.where = folder, folder / split, str(path)
        self.classes, indices = _classes_of_both_splits(rows, folder, split)
        self.notes, self.names = list(rows.notes), rows.names
        self._labels, self._label_ends = indices[rows.labels], rows.label_ends
        self.is_multi_label = rows.label_ends is not None
        self.targets = self._labels
        if self.is_multi_label:
            starts = np.concatenate(([0], rows.label_ends[:-1]))
            first = self._labels[starts.clip(max=len(rows.labels) - 1)]
            self.targets = np.where(starts < rows.label_ends, first, -1).astype(np.int32)
        self._in_split = rows.in_split
        if not self._finds_images():
            self._in_split = np.ones_like(rows.in_split)
            if not self._finds_images():
                self._in_split = rows.in_split
                raise self._wrong_paths()

    def _finds_images(self) -> bool:
        """Whether at least one of the first, middle and last images exists."""
        return any(os.path.exists(self._path(index)) for index in (0, len(self) // 2, len(self) - 1))

    def _wrong_paths(self) -> DataError:
        """The error for images that do not exist; it says where the first one may be."""
        name, first = self.names[0], self._path(0)
        below = sorted(x for x in self.folder.iterdir() if x.is_dir())[:100]
        endings = [name + suffix for suffix in ('', *IMAGE_SUFFIXES)]
        for path in (folder / ending for folder in (self.folder, *below) for ending in endings):
            if os.path.exists(path):
                right = str(path.relative_to(self.folder))
                return DataError(f'{self.where} names {name!r}, but the image is {right!r}: write all paths like that')
        return DataError(f'{self.where} names {name!r}, but {first} does not exist: write paths relative to the folder')

    @staticmethod
    def find_classes(folder: Path, split: str) -> list[str]:
        """Sorted names of the classes; empty if the split has no rows."""
        path = find_table(folder, split)
        return [] if path is None else _classes_of_both_splits(_read_rows(path, folder, split), folder, split)[0]

    def labels(self, index: int) -> list[int]:
        """Class indices of a sample; see `Samples.labels`."""
        if self._label_ends is None:
            return super().labels(index)
        start = self._label_ends[index - 1] if index else 0
        return self._labels[start : self._label_ends[index]].tolist()

    def empty_classes(self) -> list[str]:
        """None: each class is the label of a sample."""
        return []

    def read(self, index: int) -> bytes:
        """The file."""
        return read_file(self._path(index))

    def _path(self, index: int) -> Path:
        return existing_path(self.split_folder if self._in_split[index] else self.folder, self.names[index])

    def describe(self, index: int) -> str:
        """The file's path."""
        return str(self._path(index))


class Rows(NamedTuple):
    """The rows of a split.

    Attributes:
        names: of the samples, without the split's folder.
        in_split: whether the path of each sample starts in the split's folder, (N,) bool.
        classes: distinct labels, in order.
        labels: class indices of all samples, one after the other.
        label_ends: end of each sample's labels in `labels`, (N,) int64; None if each sample has one label.
        notes: lines for the log.
    """

    names: NameList
    in_split: np.ndarray
    classes: list[str]
    labels: np.ndarray
    label_ends: np.ndarray | None
    notes: list[str]


def find_table(folder: Path, split: str) -> Path | None:
    """The file that lists a split: `<split>.csv`, `<split>.parquet`, `labels.csv` or `labels.parquet`."""
    paths = (folder / f'{name}{suffix}' for name in (split, 'labels') for suffix in ('.csv', '.parquet'))
    return next(filter(os.path.isfile, paths), None)


def _read_rows(path: Path, folder: Path, split: str) -> Rows:
    """Read the rows of a split; they are cached until the file changes.

    Raises:
        DataError: it cannot be read, or a row has no image or no class.
    """
    state = os.stat(path)
    return _read_version(path, folder, split, (state.st_mtime_ns, state.st_size))


@lru_cache(maxsize=2)
def _read_version(path: Path, folder: Path, split: str, version: tuple[int, int]) -> Rows:
    labels, ends, in_split, others = LabelList(), array('q'), bytearray(), Counter()
    read = _read_parquet if path.suffix == '.parquet' else _read_csv
    prefix, absolute = f'{split}/', f'{os.path.abspath(folder)}/'.replace('//', '/')

    def find_names() -> Iterator[str]:
        for place, row in rows:
            values = dict(zip(columns, row, strict=True))
            if 'split' in values and (value := _text(values['split'], place).lower()) not in SPLITS[split]:
                if not any(value in names for names in SPLITS.values()):
                    others[value or 'empty'] += 1
                continue
            name = _text(values['path'], place).replace('\\', '/').removeprefix(absolute).removeprefix('./')
            if not name:
                raise DataError(f'{place} names no image: write its path')
            if leads_out(name) or os.path.isabs(name) or name[1:3] == ':/':
                raise DataError(f'{place} names {name[:200]!r}, outside {folder}: write paths relative to that folder')
            in_split.append(name.startswith(prefix))
            name = same_letters(name.removeprefix(prefix))
            for label in _labels_of(values, name, place):
                labels.append(same_letters(label))
            if 'labels' in values:
                ends.append(len(labels))
            yield name

    try:
        rows = read(path)
        _, columns = next(rows)
        names = NameList.of(find_names())
    except DataError:
        raise
    except Exception as error:  # csv, pyarrow and codecs raise errors of many types for damaged files
        raise read_error(str(path), error, 'write it again') from error
    classes, numbers = labels.number()
    if names and not classes:
        raise DataError(f'{path} has no label in any row of {split}: write some in the column labels')
    if len(classes) == 1 and not {'label', 'labels'} & {*columns}:
        raise DataError(
            f'{path} has no column label, and all its images are in the folder {classes[0]!r}: add the column'
        )
    notes = [f'{others.total()} row(s) of other splits in {path} left out ({describe_kinds(others)})'] if others else []
    label_ends = np.frombuffer(ends, np.int64) if ends else None
    return Rows(names, np.frombuffer(in_split, np.bool_), classes, numbers, label_ends, notes)


def _classes_of_both_splits(rows: Rows, folder: Path, split: str) -> tuple[list[str], np.ndarray]:
    """Names of the classes, and the index of each class of a split's rows among them.

    With several labels per image, they are the labels of both splits: one of them may lack a rare class.
    """
    other = 'val' if split == 'train' else 'train'
    path = None if rows.label_ends is None else find_table(folder, other)
    labels = LabelList()
    for label in [*rows.classes, *(() if path is None else _read_rows(path, folder, other).classes)]:
        labels.append(label)
    classes, numbers = labels.number()
    return classes, numbers[: len(rows.classes)]


def _labels_of(values: dict[str, Any], name: str, place: str) -> list[str]:
    """The labels of a row.

    Raises:
        DataError: it has none, and needs one.
    """
    if 'labels' in values:
        return list(dict.fromkeys(filter(None, (x.strip() for x in _text(values['labels'], place).split('|')))))
    if 'label' in values:
        if label := _text(values['label'], place):
            return [label]
        raise DataError(f'{place} has no label: write one, or remove the row')
    if label := name.rpartition('/')[0].rpartition('/')[2]:
        return [label]
    raise DataError(f'{place} has neither a label nor a folder that names its class: add the column label')


def _text(value: Any, place: str) -> str:
    """A value as text: of a text or a whole number; '' where there is none.

    Raises:
        DataError: it is something else.
    """
    if value is None or (isinstance(value, float) and value != value):
        return ''
    if not isinstance(value, str | int):
        raise DataError(f'{place} has {kind_of_value(value)}: write texts or whole numbers')
    return str(value).strip()


def _find_columns(names: list[str], path: Path) -> dict[str, int]:
    """Position of each of `COLUMNS` that a table has.

    Raises:
        DataError: there is no column of paths, or two have the same meaning.
    """
    lowered = [str(name).strip().lower() for name in names]
    found = {key: [i for i, name in enumerate(lowered) if name in aliases] for key, aliases in COLUMNS.items()}
    shown = ', '.join(ascii(str(name)[:40])[1:-1] for name in names[:20])
    if len(found['path']) != 1 or len(found['label'] + found['labels']) > 1 or len(found['split']) > 1:
        raise DataError(
            f'{path} has the columns {shown}: rename that of the image files to path, and that of classes to label'
        )
    if path.stem == 'labels' and not found['split']:
        raise DataError(f'{path} has the columns {shown}: add the column split, with train or val in each row')
    return {key: positions[0] for key, positions in found.items() if positions}


def _read_csv(path: Path) -> Iterator[tuple[str, list[str]]]:
    """The names of the columns that matter, and then their values in each row, each with its place for errors."""
    with open_regular(path) as file, io.TextIOWrapper(file, 'utf-8-sig', 'surrogateescape', newline='') as text:
        header = text.readline(_MAX_LINE)
        delimiter = max(',;\t', key=header.count)  # the first of them where there is none
        text.seek(0)
        rows = csv.reader(iter(lambda: text.readline(_MAX_LINE), ''), delimiter=delimiter, strict=True)
        names = next(rows, [])
        columns = _find_columns(names, path)
        yield str(path), list(columns)
        for row in rows:
            if row:
                place = f'line {rows.line_num} of {path}'
                if len(row) != len(names):
                    raise DataError(
                        f'{place} has {len(row)} columns, not {len(names)}: put texts with {delimiter!r} in "'
                    )
                yield place, [row[position] for position in columns.values()]


def _read_parquet(path: Path) -> Iterator[tuple[str, list[Any]]]:
    """See `_read_csv`."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(f'{path} needs the package pyarrow: pip install pyarrow, or write a .csv file') from error
    number = 0
    with open_regular(path) as file:
        table = ParquetFile(file)
        names = table.schema_arrow.names
        columns = _find_columns(names, path)
        yield str(path), list(columns)
        chosen = [names[position] for position in columns.values()]
        for batch in table.iter_batches(_BATCH, columns=chosen):
            for row in zip(*(batch.column(name).to_pylist() for name in chosen), strict=True):
                number += 1
                yield f'row {number} of {path}', list(row)
