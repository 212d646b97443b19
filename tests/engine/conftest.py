import time

import pytest

from engine.checkpoint import load_checkpoint
from tests.helpers.images import write_images
from tests.helpers.processes import SpawnedRun, start_two_ranks
from tests.helpers.shared import shared_folder


def finish(run):
    assert run.wait() == 0, run.output.read_text()


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    """Folder of spawned runs, with their data in `tree/`."""
    return shared_folder(tmp_path_factory, 'spawned', lambda folder: write_images(folder / 'tree'))


@pytest.fixture(scope='session')
def uninterrupted(folder, tmp_path_factory):
    """The last checkpoint of a run that nothing happens to, and its seconds after the first checkpoint."""

    def fill(about):
        run = SpawnedRun(folder, 'uninterrupted')
        assert run.wait_for(run.checkpoint_names)
        start_time = time.monotonic()
        finish(run)
        (about / 'seconds').write_text(str(time.monotonic() - start_time))

    about = shared_folder(tmp_path_factory, 'uninterrupted', fill)
    run_folder = folder / 'output' / 'tiny' / 'uninterrupted'
    return load_checkpoint(run_folder / 'ckpt_epoch_11.pth'), float((about / 'seconds').read_text())


@pytest.fixture(scope='session')
def uninterrupted_pair(folder, tmp_path_factory):
    """The last checkpoint of such a run of two ranks."""
    shared_folder(tmp_path_factory, 'pair', lambda _: finish(start_two_ranks(folder, 'pair')))
    return load_checkpoint(folder / 'output' / 'tiny' / 'pair' / 'ckpt_epoch_11.pth')
