"""The format of a tree of class folders."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.images import CONVERT, DataError, describe_kinds, is_hidden, is_image_file, kind_of, read_error, read_file
from data.packed_lists import NameList
from data.samples import Samples, same_letters


class ClassFolders(Samples):
    """The images below `root/<class>/`, in folders and linked folders; classes are the sorted folder names.

    Hidden files and folders are ignored. Names of classes are written with composed letters (NFC), whatever the file
    system has: copies from a Mac have decomposed ones.

    Args:
        folder: of the dataset.
        split: `train` or `val`: the folder of class folders.

    Attributes:
        other_kinds: numbers of files that are no images, by suffix, of each class that has some.

    Raises:
        DataError: there is no such folder, or it has no class folders.
    """

    def __init__(self, folder: Path, split: str):
        self.root = folder / split
        self.where = str(self.root)
        folders = _class_folders(self.root)
        self.classes = list(folders)
        if not os.path.isdir(self.root):
            raise DataError(
                f'data folder {self.root} does not exist: '
                f'give --data-path the folder that holds train/<class>/ and val/<class>/'
            )
        if not self.classes:
            raise DataError(
                f'data folder {self.root} has no class folders: put the images of each class in a separate folder'
            )
        counts, self.other_kinds = [], {}

        def find_names() -> Iterator[str]:
            for label, name in folders.items():
                names, others = _find_images(self.root, name)
                counts.append(len(names))
                if others:
                    self.other_kinds[label] = others
                yield from names

        self.names = NameList.of(find_names())
        self.targets = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        self.notes = []
        if self.other_kinds:
            kinds = sum(self.other_kinds.values(), Counter())
            self.notes = [f'{kinds.total()} file(s) of other kinds in {self.root} left out ({describe_kinds(kinds)})']

    @staticmethod
    def find_classes(folder: Path, split: str) -> list[str]:
        """Sorted names of the class folders, hidden ones ignored; empty if there are none."""
        return list(_class_folders(folder / split))

    def describe_empty(self, name: str) -> str:
        """What is wrong with a class folder without images, and what it holds instead."""
        if name not in self.other_kinds:
            return super().describe_empty(name)
        kinds = self.other_kinds[name]
        return (
            f'class {self.where}/{name} holds no images, but {kinds.total()} file(s) of other kinds '
            f'({describe_kinds(kinds)}): {CONVERT}, or remove the class'
        )

    def read(self, index: int) -> bytes:
        """The file."""
        return read_file(self.describe(index))

    def describe(self, index: int) -> str:
        """The file's path."""
        return str(self.root / self.names[index])


def _class_folders(root: Path) -> dict[str, str]:
    """Names of the folders by class, sorted by class.

    Raises:
        DataError: the folder cannot be listed, or two folders have the name of one class.
    """
    if not os.path.isdir(root):
        return {}
    try:
        names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not is_hidden(entry.name))
    except OSError as error:
        raise read_error(f'data folder {root}', error, 'make it readable') from error
    folders = {}
    for name in names:
        label = same_letters(name)
        if label in folders:
            raise DataError(
                f'{root} has two folders for class {label}, whose names differ in how their letters are composed '
                f'({folders[label]!a}, {name!a}): move the images of one into the other'
            )
        folders[label] = name
    return dict(sorted(folders.items()))


def _find_images(root: Path, name: str) -> tuple[list[str], Counter[str]]:
    """Names of the images in a class folder and its folders, relative to `root`; numbers of other files by suffix.

    A link to a folder that contains the link is not followed.

    Raises:
        DataError: a folder cannot be listed.
    """
    found, others = [], Counter()

    def fail(error: OSError) -> None:
        raise read_error(f'data folder {error.filename}', error, 'make it readable, or remove it') from error

    for parent, folders, files in os.walk(root / name, onerror=fail, followlinks=True):
        folders[:] = [x for x in folders if not is_hidden(x) and not _leads_back(os.path.join(parent, x))]
        prefix = parent[len(str(root)) + 1 :].replace(os.sep, '/')
        for file in files:
            if is_image_file(file):
                found.append((prefix, file))
            elif not is_hidden(file):
                others[kind_of(file)] += 1
    return [f'{prefix}/{file}' for prefix, file in sorted(found) if not is_hidden(file)], others


def _leads_back(path: str) -> bool:
    """Whether a path is a link to a folder that contains it."""
    if not os.path.islink(path):
        return False
    parent, target = Path(os.path.realpath(os.path.dirname(path))), Path(os.path.realpath(path))
    return target == parent or target in parent.parents
