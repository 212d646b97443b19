"""Worker processes of a loader: how they start, which signals they ignore, and when they end."""

import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess

import cv2

# Libraries that take long to import. The project's own modules take a tenth of a second and are not among them: the
# server would look for them in the current folder, where `data` may be a folder of images.
_LIBRARIES = ('timm', 'torchvision', 'cv2', 'simplejpeg', 'pycocotools.mask', 'matplotlib.pyplot', 'datasets')

# What launchers and Ctrl-C send to all processes of a run; the training process still needs batches for its update.
_BLOCKED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def worker_context() -> BaseContext:
    """The multiprocessing context whose processes are forked from a server, which this function starts.

    A process forked from the training process, with its threads, can hang. The server has a single thread, and has
    imported the libraries that this process has imported, so a worker starts in a fraction of a second. The server and
    the workers inherit blocked signals; see `init_worker`.
    """
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


def init_worker(worker: int) -> None:
    """Prepare a worker process: one thread for OpenCV, and an end with the training process.

    Args:
        worker: its number; the `worker_init_fn` of a loader takes one.
    """
    cv2.setNumThreads(1)
    parent = multiprocessing.parent_process()
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()


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
