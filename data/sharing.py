"""Share the arrays of an object among the processes of a node: they are in memory once, and all processes map them."""

import mmap
import os
import pickle
import sys
from collections.abc import Sequence
from typing import Any, Self

from data.images import DataError

# Arrays start at multiples of this many bytes, as NumPy's own do.
_ALIGNMENT = 64


class Shareable:
    """Base class of an object that can be shared with other processes: the lists of a dataset.

    `share` moves the object's NumPy arrays into a file that exists in memory only, has no name, and is gone with the
    last process that has it open. From then on, pickling the object gives a reference to that file, whatever the size
    of the arrays. A process that unpickles it maps the arrays, read-only, and holds its own copy of all else. So what
    grows with the number of samples belongs into arrays.

    A reference can be used by processes of the same node while the object that was pickled exists.
    """

    _shared: '_SharedFile | None' = None

    def share(self) -> Self:
        """Move the arrays into shared memory; what pickling leaves out stays as it is. Linux only: no-op elsewhere.

        Raises:
            DataError: there is too little memory.
        """
        if self._shared is None and (descriptor := _create_file()) is not None:
            file = _SharedFile.write(self, descriptor)
            vars(self).update(vars(file.load()), _shared=file)
        return self

    def __reduce_ex__(self, protocol: int) -> Any:
        return super().__reduce_ex__(protocol) if self._shared is None else (_attach, self._shared.reference())


def _attach(path: str, parts: Sequence[slice]) -> Shareable:
    """Open an object that another process has shared, and map its arrays.

    If that process has been interrupted meanwhile, this one ends too; a starting worker does so without a traceback.
    """
    try:
        file = _SharedFile(os.open(path, os.O_RDONLY), parts)
    except FileNotFoundError:
        sys.exit(f'error: the process that shares {path} has ended')
    value = file.load()
    value._shared = file
    return value


def _create_file() -> int | None:
    """A descriptor of a new file in memory; None where the system has or allows none."""
    try:
        return os.memfd_create('samples') if hasattr(os, 'memfd_create') else None
    except OSError:
        return None


class _SharedFile:
    """A file in memory with a pickled object and its arrays.

    Args:
        descriptor: of the open file; closed with this object.
        parts: where the pickled object and each array are.
    """

    def __init__(self, descriptor: int, parts: Sequence[slice]):
        self.descriptor, self.parts = descriptor, parts

    def __del__(self) -> None:
        os.close(self.descriptor)

    @classmethod
    def write(cls, value: Any, descriptor: int) -> '_SharedFile':
        """Pickle an object into a new file; its arrays are written as they are."""
        arrays: list[pickle.PickleBuffer] = []
        file, parts, position = cls(descriptor, ()), [], 0
        pickled = pickle.dumps(value, protocol=5, buffer_callback=arrays.append)
        try:
            with open(file.descriptor, 'wb', closefd=False) as output:
                for content in (pickled, *(array.raw() for array in arrays)):
                    output.seek(position)
                    output.write(content)
                    parts.append(slice(position, position + len(content)))
                    position += -(-len(content) // _ALIGNMENT) * _ALIGNMENT
        except OSError as error:
            raise DataError(
                f'the list of samples takes {position >> 20} MB of memory or more and cannot be shared '
                f'({error.strerror}): make room'
            ) from error
        file.parts = parts
        return file

    def load(self) -> Any:
        """The object, with its arrays mapped."""
        memory = memoryview(mmap.mmap(self.descriptor, 0, access=mmap.ACCESS_READ))
        pickled, *arrays = (memory[part] for part in self.parts)
        return pickle.loads(pickled, buffers=arrays)

    def reference(self) -> tuple[str, Sequence[slice]]:
        """Path at which the processes of this node find the file while this process lives, and its parts."""
        return f'/proc/{os.getpid()}/fd/{self.descriptor}', self.parts
