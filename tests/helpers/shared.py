"""Folders that all workers of a test session share, so that what takes long is made once."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest


def shared_folder(factory: pytest.TempPathFactory, name: str, fill: Callable[[Path], None]) -> Path:
    """A folder that the first worker to ask for it fills, while the others wait.

    Args:
        factory: of pytest's temporary folders.
        name: of the folder.
        fill: writes the folder's content. If it fails, the next one who asks calls it again, on an empty folder.
    """
    session = factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        session = session.parent  # each worker has its own folder in the session's
    folder, done = session / name, session / f'{name}.done'
    with (session / f'{name}.lock').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            if folder.exists():
                folder.rename(factory.mktemp('failed') / name)
            folder.mkdir()
            fill(folder)
            done.touch()
    return folder
