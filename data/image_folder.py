"""The format of a tree of class folders."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import is_image_file

from data.images import DataError, load_image


def list_classes(root: Path) -> list[str]:
    """Sorted names of the class folders in a folder, hidden ones ignored; empty if there is no such folder."""
    if not root.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith('.'))


class ClassFolders(ImageFolder):
    """The images below `root/<class>/`, in folders and linked folders; classes are the sorted folder names.

    Hidden files and folders are ignored.

    Args:
        root: folder of class folders.
        transform: from a PIL image to what the loader collates.
        mode: PIL mode of the images: RGB, or L for one grey channel.

    Attributes:
        notes: lines for the log, such as the number of files of other kinds, which are left out.

    Raises:
        DataError: there is no such folder, it has no class folders, or a class has no images.
    """

    def __init__(self, root: Path, transform: Callable, mode: str = 'RGB'):
        self._other_suffixes = Counter()
        loader = partial(load_image, mode=mode)
        super().__init__(str(root), transform, loader=loader, is_valid_file=self._is_sample, allow_empty=True)
        counts = Counter(self.targets)
        for name, index in self.class_to_idx.items():
            if not counts[index]:
                raise DataError(f'class folder {root / name} holds no images: add some or remove it')
        self.notes = []
        if self._other_suffixes:
            suffixes = ', '.join(suffix for suffix, _ in self._other_suffixes.most_common(5))
            self.notes = [f'{self._other_suffixes.total()} file(s) of other kinds in {root} left out ({suffixes})']

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """The classes and their numbers."""
        if not os.path.isdir(directory):
            raise DataError(
                f'data folder {directory} does not exist: '
                f'give --data-path the folder that holds train/<class>/ and val/<class>/'
            )
        classes = list_classes(Path(directory))
        if not classes:
            raise DataError(
                f'data folder {directory} has no class folders: put the images of each class in a folder of its own'
            )
        return classes, {name: index for index, name in enumerate(classes)}

    def _is_sample(self, path: str) -> bool:
        if f'{os.sep}.' in path[len(self.root) :]:
            return False
        if is_image_file(path):
            return True
        self._other_suffixes[os.path.splitext(path)[1].lower() or 'no suffix'] += 1
        return False

    def sample_names(self) -> Iterator[str]:
        """Names of the samples, in order: `class/path/within/it` without suffix, the same below any root."""
        start = len(self.root) + 1
        for path, _ in self.samples:
            yield os.path.splitext(path[start:])[0].replace(os.sep, '/')
