import time

import pytest

from tests.helpers.images import write_images
from tests.helpers.processes import SpawnedRun, start_two_ranks


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    """Folder of spawned runs, with their data in `tree/`."""
    folder = tmp_path_factory.mktemp('spawned')
    write_images(folder / 'tree')
    return folder


@pytest.fixture(scope='session')
def undisturbed(folder):
    """The last checkpoint of a run that nothing happens to, and its seconds after the first checkpoint."""
    run = SpawnedRun(folder, 'undisturbed')
    assert run.wait_for(run.checkpoint_names)
    start_time = time.monotonic()
    assert run.wait() == 0, run.output.read_text()
    return run.last_checkpoint(), time.monotonic() - start_time


@pytest.fixture(scope='session')
def undisturbed_pair(folder):
    """The last checkpoint of such a run of two ranks."""
    run = start_two_ranks(folder, 'pair')
    assert run.wait() == 0, run.output.read_text()
    return run.last_checkpoint()
