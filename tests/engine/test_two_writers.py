"""The same command started twice, at random offsets, some killed: one run at a time writes, and its files are whole.

Some have no file locks, and so a lease. Six pairs; any number by
PAIRS=50 python -m pytest -m slow tests/engine/test_two_writers.py
"""

import json
import os
import random
import signal
import time

import pytest

from engine.checkpoint import CheckpointError, load_checkpoint
from tests.helpers.processes import SpawnedRun

pytestmark = pytest.mark.slow

PAIRS = int(os.environ.get('PAIRS', '6'))
OPTIONS = 'SAVE_STEPS 1 SAVE_KEEP 3 TRAIN.EPOCHS 6'
EPOCHS = list(range(6))

# As on a file system without locks
NO_LOCKS = """
import errno, fcntl, os

def refuse(*_):
    raise OSError(errno.ENOLCK, 'No locks available')

fcntl.lockf = os.lockf = refuse
"""


def check_files(folder):
    """Every checkpoint loads; one that was removed meanwhile is not there."""
    for path in folder.glob('*.pth'):
        try:
            load_checkpoint(path)
        except CheckpointError:
            assert not path.exists(), path


@pytest.mark.parametrize('number', range(PAIRS))
def test_pair_of_processes_in_one_folder(folder, tmp_path, number):
    rng = random.Random(time.time_ns())
    (tmp_path / 'sitecustomize.py').write_text(NO_LOCKS)
    # In a third of the pairs, neither has locks; in another, one of them.
    variables = [{'PYTHONPATH': str(tmp_path)} if (number + i) % 3 == 2 else {} for i in range(2)]
    if number % 3 == 2:
        variables[1] = variables[0]
    tag, wait = f'pair_{number}', 60 if number % 4 < 2 else 1  # the second waits for the first, or gives up
    options = f'{OPTIONS} LOCK_WAIT {wait}'
    runs = [SpawnedRun(folder, tag, options=options, variables=variables[0])]
    time.sleep(rng.uniform(0, 3))
    runs.append(SpawnedRun(folder, tag, options=options, variables=variables[1]))
    if number % 2 == 0:
        time.sleep(rng.uniform(3, 10))
        runs[rng.randrange(2)].kill()
    while any(run.process.poll() is None for run in runs):
        check_files(runs[0].folder)
        time.sleep(0.05)
    codes = sorted(run.process.returncode for run in runs)
    is_killed = codes[0] == -signal.SIGKILL  # not if it had ended before
    codes = codes[is_killed:]
    output = runs[0].output.read_text()  # of both
    assert codes in ([0], [0, 0], [0, 1], [1]), output
    refused = 'is being written to by process' in output and 'stop that run, or write another --tag' in output
    assert refused if 1 in codes else is_killed or not refused, output  # it may be killed while it says so
    if 0 not in codes:  # the one that wrote was killed after the other had given up
        again = SpawnedRun(folder, tag, options=options)
        assert again.wait() == 0, again.output.read_text()
    check_files(runs[0].folder)
    names = {path.name for path in runs[0].folder.glob('ckpt_*')}
    kept = {'ckpt_best.pth', 'ckpt_epoch_3.pth', 'ckpt_epoch_4.pth', 'ckpt_epoch_5.pth'}
    assert names == kept or (is_killed and names > kept)  # killed after the last save, before older ones went
    metrics = [json.loads(line) for line in (runs[0].folder / 'metrics.jsonl').read_text().splitlines()]
    assert [record['epoch'] for record in metrics if record['kind'] == 'epoch'] == EPOCHS
    updates = [(record['epoch'], record['step']) for record in metrics if record['kind'] == 'train']
    assert updates == [(epoch, step) for epoch in EPOCHS for step in range(6)]
    assert is_killed or not list(runs[0].folder.glob('run.lock*'))
