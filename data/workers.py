"""DataLoader workers: start method, signals, shutdown, and error messages."""

import contextlib
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker, util
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

import cv2
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from data.images import DataError
from utils import first_line

# Libraries that take long to import. The project's own modules take a tenth of a second and are not among them: the
# server would look for them in the current folder, where `data` may be a folder of images.
_LIBRARIES = ('timm', 'torchvision', 'cv2', 'simplejpeg', 'pycocotools.mask', 'matplotlib.pyplot', 'datasets')

# What launchers and Ctrl-C send to all processes of a run; the training process still needs batches for its update.
_BLOCKED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

# Each tensor on its way from a worker takes open files; many systems start processes with a limit of 1024, or 256.
_OPEN_FILES = 65_536

# Bytes of the path of a temporary folder in which the sockets of the processes, whose paths have at most 104 or 108
# bytes, still have room for their own names.
_LONGEST_FOLDER = 70

_FEWER = 'use fewer worker processes (DATA.NUM_WORKERS, or --workers of a tool)'


class WorkerLoader(DataLoader):
    """A `DataLoader` that reports failures of its workers in one line with a remedy.

    Args:
        dataset: indexed by sample.
        num_workers: number of worker processes; 0 reads in this process.
        collate_fn: makes a batch of a list of samples; None stacks them.
        options: further arguments of `DataLoader`.

    Raises:
        DataError: worker processes cannot be started.
    """

    def __init__(
        self, dataset: Dataset, num_workers: int = 0, collate_fn: Callable[[list], Any] | None = None, **options: Any
    ):
        context = None
        if num_workers:
            collate_fn = _SharedBatches(collate_fn or default_collate)
            with _report_failed_start():
                context = worker_context()
        super().__init__(
            dataset,
            num_workers=num_workers,
            collate_fn=collate_fn,
            multiprocessing_context=context,
            worker_init_fn=init_worker,
            **options,
        )

    def __iter__(self) -> Iterator[Any]:
        """The batches.

        Raises:
            DataError: worker processes cannot be started, or fail.
        """
        if not self.num_workers:
            return super().__iter__()
        with _report_failures(), _report_failed_start():
            batches = super().__iter__()  # also waits for workers of the last epoch
        return _reporting_failures(batches)


def _reporting_failures(batches: Iterator[Any]) -> Iterator[Any]:
    with _report_failures():
        yield from batches


@contextmanager
def _report_failures() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        failure = _explain(error)
        if failure is None:
            raise
        raise DataError(failure) from error


def _explain(error: Exception) -> str | None:
    """Describe a failure of worker processes and the remedy; None for an error that the user cannot fix."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    message = lines[-1]  # after a worker's traceback
    is_connection = isinstance(error, OSError | EOFError) and 'in DataLoader worker process' not in lines[0]
    if re.search('Too many open files|received 0 items of ancdata', message):
        return f'the worker processes of the loader have too many files open: raise the limit (ulimit -n), or {_FEWER}'
    if re.search('shared memory|</torch_', message):
        return (
            f'the worker processes of the loader have too little shared memory{_shared_memory_size()}: make /dev/shm '
            f'larger (docker run --shm-size=16g, or --ipc=host), or {_FEWER}'
        )
    if is_connection or re.search('DataLoader worker .*(killed|exited)|Pin memory thread exited', message):
        return (
            f'a worker process of the loader has died ({message}); the system kills processes when memory or /dev/shm'
            f'{_shared_memory_size()} is full: give the run more of it, or {_FEWER}'
        )
    return None


def _shared_memory_size() -> str:
    """The size of shared memory for messages, where the system tells it."""
    with contextlib.suppress(OSError):
        return f' ({shutil.disk_usage("/dev/shm").total >> 20} MB)'
    return ''


@contextmanager
def _report_failed_start() -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'Got pickle error')  # PyTorch's, which advises to fork
            yield
    except (OSError, EOFError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or first_line(error)
        raise DataError(
            f'the worker processes of the loader cannot be started ({reason}): check TMPDIR, /dev/shm and the limits '
            f'of processes and open files (ulimit -u, ulimit -n), or {_FEWER}'
        ) from error
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        if 'pickle' not in str(error):
            raise
        raise DataError(
            f'the dataset or its transform cannot be sent to the worker processes of the loader ({first_line(error)}): '
            f'define classes and functions at the top of their module, open files in __getitem__, or write '
            f'DATA.NUM_WORKERS 0'
        ) from error


class _SharedBatches:
    """A collate function that moves its batches into shared memory before it returns.

    Otherwise, a thread of the worker would move them there. That thread only prints errors, such as a full /dev/shm,
    and the training process would wait for the batch for ever.
    """

    def __init__(self, collate_fn: Callable[[list], Any]):
        self.collate_fn = collate_fn

    def __call__(self, samples: list) -> Any:
        batch = self.collate_fn(samples)
        _share(batch)
        return batch


def _share(batch: Any) -> None:
    """Move the tensors of a batch into shared memory."""
    if isinstance(batch, Tensor):
        batch.share_memory_()
    elif isinstance(batch, Mapping):
        _share([*batch.values()])
    elif isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        for part in batch:
            _share(part)


def worker_context() -> BaseContext:
    """The multiprocessing context whose processes are forked from a server, which this function starts.

    A process forked from the training process, with its threads, can hang. The server has a single thread, and has
    imported the libraries that this process has imported, so a worker starts in a fraction of a second. The server and
    the workers inherit blocked signals; see `init_worker`.
    """
    _raise_limit_of_open_files()
    _choose_socket_folder()
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload([name for name in _LIBRARIES if name in sys.modules])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED_SIGNALS)
    try:
        resource_tracker.ensure_running()  # once started, it unblocks two of the signals in this process
        signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED_SIGNALS)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def _raise_limit_of_open_files() -> None:
    """Let this process, and those that it will start, open as many files as the system lets a user allow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # macOS has a further limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _choose_socket_folder() -> None:
    """Put the sockets of the processes into /tmp where the path of TMPDIR is too long for them."""
    before = tempfile.gettempdir()
    if len(os.fsencode(before)) <= _LONGEST_FOLDER:
        return
    tempfile.tempdir = '/tmp'
    try:
        util.get_temp_dir()  # made at the first call, and used from then on
    finally:
        tempfile.tempdir = before


def init_worker(worker: int) -> None:
    """Prepare a worker process: one thread for OpenCV, and an end with the training process.

    Args:
        worker: its number; the `worker_init_fn` of a loader takes one.
    """
    cv2.setNumThreads(1)
    sys.excepthook = _report_unless_disconnected
    parent = multiprocessing.parent_process()
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()


def _report_unless_disconnected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an uncaught error of a worker, unless its connection is lost: the training process has ended.

    Multiprocessing's thread that hands tensors over reports its errors through `sys.excepthook`.
    """
    if not isinstance(error, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def _exit_with(parent: BaseProcess) -> None:
    """End this process when the training process sends SIGTERM, as the loader does to close it, or has died.

    PyTorch's workers watch their parent, which here is the server.
    """
    if not hasattr(signal, 'sigtimedwait'):  # macOS does not say who sends a signal
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        parent.join()
        os._exit(0)
    while parent.is_alive():
        received = signal.sigtimedwait([signal.SIGTERM], 1)
        if received is not None and received.si_pid == parent.pid:
            break
    os._exit(0)
