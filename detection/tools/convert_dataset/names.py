"""Names of written files: whatever names the data hold, none leaves its folder, and none is given twice."""

import re
from pathlib import PurePosixPath

from data.samples import same_letters


class UniqueNames:
    """Relative paths for the files of one folder, close to the names that the data give them.

    Names that differ only in case, or in how Unicode composes them, count as equal, since they are for some file
    systems.

    Attributes:
        renamed: names that were taken already, and those given instead.
    """

    def __init__(self):
        self.renamed: list[tuple[str, str]] = []
        self._files: set[str] = set()
        self._folders: set[str] = set()

    def add(self, name: str) -> str:
        """Choose the relative path of another file.

        Args:
            name: from the data; it may be absolute, hold `..`, or have a drive and backslashes as on Windows.
        """
        whole = PurePosixPath(relative_name(name))
        path, number = whole, 1
        while not self._is_free(path):
            number += 1
            path = whole.with_name(f'{whole.stem}_{number}{whole.suffix}')
            if self._folder_is_file(path):  # no name in that folder is free
                path = PurePosixPath('_'.join(path.parts))
        if path != whole:
            self.renamed.append((str(whole), str(path)))
        self._files.add(_key(path))
        self._folders.update(map(_key, path.parents))
        return str(path)

    def _is_free(self, path: PurePosixPath) -> bool:
        key = _key(path)
        return key not in self._files and key not in self._folders and not self._folder_is_file(path)

    def _folder_is_file(self, path: PurePosixPath) -> bool:
        return any(_key(parent) in self._files for parent in path.parents)


def relative_name(name: str) -> str:
    """A name as a relative path that stays in its folder: without drive, root, `.` and `..`."""
    parts = name.replace('\\', '/').split('/')
    kept = [x for x in parts if x not in ('', '.', '..') and not re.fullmatch('[A-Za-z]:', x)]
    return '/'.join(kept) or 'image'


def _key(path: PurePosixPath) -> str:
    return same_letters(str(path)).casefold()
