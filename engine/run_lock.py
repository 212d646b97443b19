"""One writer per run folder: a lock that the system drops when its holder dies, or a lease where there are no locks."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import platform
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from utils import UserError, atomic_write, host_id, is_running, printable, remove_dead_temporaries

# Seconds between the heartbeats of a holder, and seconds without one after which a holder without locks counts as dead.
HEARTBEAT = 5.0
EXPIRY = 30.0

# Seconds after which a process without locks checks whether another process has taken the lease at the same time.
SETTLE = 1.0

# Errors of `lockf` on file systems without POSIX locks.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}

# Entries of `run.lock`, which describe its holder.
_HOLDER = {'host': str, 'host_id': str, 'pid': int, 'since': str, 'token': str, 'is_lease': bool}


class RunLockError(UserError):
    """A run folder that another process writes to."""


class RunLock:
    """The right to write to a run's folder; rank 0 holds it for as long as the run trains.

    `run.lock` names the holder, which touches it every few seconds. The holder also has a POSIX lock (`lockf`) on it.
    Processes that it starts do not inherit that, as they would a `flock`, so it ends with the training process, however
    that dies. Where the file system has no locks, the file is a lease: its holder is dead if this host has no such
    process any more, or after 30 s without a heartbeat.

    Temporary files of dead processes are removed before the file is written: they may have filled the disk.

    A process that holds the lock must not open `run.lock` again: closing any of its descriptors would drop the lock.

    Args:
        folder: the run's folder, which exists when the lock is taken.
        logger: says who holds the lock.
    """

    def __init__(self, folder: Path, logger: logging.Logger):
        self.folder, self.logger = folder, logger
        self.path = folder / 'run.lock'
        self._descriptor: int | None = None  # of the locked file
        self._holder: dict[str, Any] | None = None  # in the file, while it is held
        self._released = threading.Event()
        self._mutex = threading.Lock()  # against the thread of the heartbeats

    def acquire(self, wait: float, is_stopped: Callable[[], bool] = lambda: False) -> bool:
        """Take the lock, waiting for a holder that may be about to end.

        Args:
            wait: seconds to wait.
            is_stopped: whether to give up.

        Returns:
            False if it gave up.

        Raises:
            RunLockError: another process holds it.
        """
        end, last_holder = time.monotonic() + wait, None
        while not self._try():
            holder = f'{self.folder} is being written to by {_name(_read(self.path))}'
            if holder != last_holder:
                self.logger.warning(f'{holder}: waiting up to {wait:.0f} s for it to end')
                last_holder = holder
            if is_stopped():
                return False
            if time.monotonic() >= end:
                raise RunLockError(f'{holder}: stop that run, or write another --tag')
            time.sleep(0.2)
        self._released = threading.Event()
        threading.Thread(target=self._beat, args=(self._released,), daemon=True).start()
        return True

    def release(self) -> None:
        """Give the lock up, if it is held."""
        self._released.set()
        with self._mutex:
            if self._holder is not None and self._is_ours():
                self.path.unlink(missing_ok=True)
            self._holder = None
            self._close()

    def check(self) -> None:
        """Make sure that the lock, if it was taken, is still this process's; a file that was removed is written again.

        Raises:
            RunLockError: another process has taken the folder over.
        """
        with self._mutex:
            if self._holder is None or self._is_ours():
                return
            if not self.path.exists():
                self.logger.warning(f'{self.path} was removed while this run writes to its folder: it is written again')
                self._close()
                if self._try():
                    return
        raise RunLockError(f'another process has taken {self.folder} over: this run writes nothing more to it')

    def is_held_by_another(self) -> bool:
        """Whether another process writes to the folder. A process that holds the lock would lose it by asking."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError:
            return False
        try:
            os.lockf(descriptor, os.F_TEST, 0)
        except OSError as error:
            return error.errno not in _NO_LOCKS or self._is_beating(descriptor)
        else:
            return self._is_leased(descriptor)
        finally:
            os.close(descriptor)

    def _try(self) -> bool:
        """Take the lock if it is free."""
        holder = {
            'host': platform.node(),
            'host_id': host_id(),
            'pid': os.getpid(),
            'since': time.strftime('%Y-%m-%d %H:%M:%S'),
            'token': uuid.uuid4().hex,
        }
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return self._try_lease(descriptor, holder)
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        if not _is_file(self.path, descriptor) or self._is_leased(descriptor):
            os.close(descriptor)
            return False
        remove_dead_temporaries(self.folder)  # they may have filled the disk
        self._descriptor, self._holder = descriptor, holder | {'is_lease': False}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(self._holder).encode(), 0)
        return True

    def _try_lease(self, descriptor: int, holder: dict[str, Any]) -> bool:
        """Take the lease if it is free, without a lock on the file.

        Two processes may find it free at once; the last to write it has it.
        """
        try:
            if self._is_beating(descriptor):
                return False
        finally:
            os.close(descriptor)
        remove_dead_temporaries(self.folder)
        holder |= {'is_lease': True}
        atomic_write(self.path, lambda file: file.write(json.dumps(holder).encode()))
        time.sleep(SETTLE)
        if _read(self.path) != holder:
            return False
        self._holder = holder
        return True

    def _is_leased(self, descriptor: int) -> bool:
        """Whether a process that has no locks holds the file."""
        holder = _parse(os.pread(descriptor, 10_000, 0))
        return holder.get('is_lease', False) and self._is_beating(descriptor)

    def _is_beating(self, descriptor: int) -> bool:
        """Whether the process that the file names is alive, by its heartbeats and the file system's own clock."""
        status, holder = os.fstat(descriptor), _parse(os.pread(descriptor, 10_000, 0))
        if status.st_size == 0:
            return False  # created by the caller
        if _is_dead(holder):
            return False
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                now = os.fstat(file.fileno()).st_mtime
        except OSError:  # a folder that cannot be written to
            now = time.time()
        return abs(now - status.st_mtime) < EXPIRY  # a date in the future is no heartbeat either

    def _is_ours(self) -> bool:
        if not self._holder['is_lease']:
            return self._descriptor is not None and _is_file(self.path, self._descriptor)
        holder = _read(self.path)
        return holder == self._holder or (not holder and self.path.exists())  # it could not be read just now

    def _beat(self, released: threading.Event) -> None:
        while not released.wait(HEARTBEAT):
            with contextlib.suppress(OSError), self._mutex:
                if self._holder is not None and self._is_ours():
                    os.utime(self.path)

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _is_file(path: Path, descriptor: int) -> bool:
    """Whether the path still names the open file: a holder that ends removes it."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError as error:
        return error.errno not in (errno.ENOENT, errno.ESTALE)  # others pass


def _name(holder: Mapping[str, Any]) -> str:
    if {'pid', 'host', 'since'} - holder.keys():
        return 'another process'
    return printable(f'process {holder["pid"]} on {holder["host"]} since {holder["since"]}')


def _is_dead(holder: Mapping[str, Any]) -> bool:
    """Whether this host was that of the holder, as far as is known, and has no such process."""
    is_here = holder['host_id'] == host_id() if 'host_id' in holder else holder.get('host') == platform.node()
    return is_here and 'pid' in holder and not is_running(holder['pid'])


def _read(path: Path) -> dict[str, Any]:
    try:
        return _parse(path.read_bytes())
    except OSError:
        return {}


def _parse(text: bytes) -> dict[str, Any]:
    """The holder that a file names; without the entries that are not what this program writes."""
    try:
        holder = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(holder, dict):
        return {}
    return {name: holder[name] for name, kind in _HOLDER.items() if type(holder.get(name)) is kind}
