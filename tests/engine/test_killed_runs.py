"""Processes that are killed, at random and while they save, and resume to the same bits."""

import json
import os
import random
import re
import signal
import time

import pytest

from tests.helpers.processes import SpawnedRun, start_two_ranks
from tests.helpers.runs import differences
from tools.rehearsal.launch import children

pytestmark = pytest.mark.slow


def is_saving(run):
    return any(name.endswith('.tmp') for name in run.checkpoint_names())


def kill_and_resume(folder, uninterrupted, tag, kills, seed, options=''):
    """Kill a run again and again, every third time while it saves, then let it finish.

    Returns:
        What the kills hit: 'saving', 'training' (or evaluating), or a run that had 'finished'.
    """
    expected, seconds = uninterrupted
    rng, hit = random.Random(seed), set()
    for number in range(kills):
        run = SpawnedRun(folder, tag, options=options)
        log_before = len(run.log())
        assert run.wait_for(lambda run=run, start=log_before: 'Train: [' in run.log()[start:]), run.output.read_text()
        if number % 3 == 0:
            run.wait_for(lambda run=run: is_saving(run))
        else:
            time.sleep(rng.uniform(0, seconds / kills))
        run.kill()
        if run.process.returncode != -signal.SIGKILL:
            hit.add('finished')
        else:
            hit.add('saving' if is_saving(run) else 'training')
    run = SpawnedRun(folder, tag)
    assert run.wait() == 0, run.output.read_text()
    assert differences(expected, run.last_checkpoint()) == []
    assert not is_saving(run)
    metrics = [json.loads(line) for line in (run.folder / 'metrics.jsonl').read_text().splitlines()]
    assert [record['epoch'] for record in metrics if record['kind'] == 'epoch'] == list(range(12))
    return hit


def test_run_killed_ten_times_ends_with_the_same_bits(folder, uninterrupted):
    workers = 'DATA.NUM_WORKERS 2'
    hit = kill_and_resume(folder, uninterrupted, 'killed_10', kills=10, seed=time.time_ns(), options=workers)
    assert hit >= {'training', 'saving'}


def test_killed_rank_ends_the_other_and_torchrun_restarts_both(folder, uninterrupted_pair):
    run = start_two_ranks(folder, 'dead_rank', 'DATA.NUM_WORKERS 2')
    assert run.wait_for(lambda: 'Train: [2/12]' in run.log())
    ranks = children(run.process.pid)
    os.kill(ranks[0], signal.SIGKILL)
    assert run.wait(60) != 0  # within a minute
    assert all(not os.path.exists(f'/proc/{rank}') for rank in ranks)
    run = start_two_ranks(folder, 'dead_rank', 'DATA.NUM_WORKERS 2', restarts=1)
    assert run.wait_for(lambda: 'Train: [6/12]' in run.log())
    os.kill(children(run.process.pid)[0], signal.SIGKILL)
    assert run.wait() == 0, run.output.read_text()
    assert differences(uninterrupted_pair, run.last_checkpoint()) == []


def test_torchrun_restarts_a_run_with_resume_from_its_own_newest_checkpoint(folder, uninterrupted_pair):
    source = folder / 'output' / 'tiny' / 'pair' / 'ckpt_epoch_9.pth'
    run = start_two_ranks(folder, 'resumed_pair', f'MODEL.RESUME {source} TRAIN.EPOCHS 40', restarts=1)
    assert run.wait_for(lambda: (run.folder / 'ckpt_epoch_12.pth').exists())
    os.kill(children(run.process.pid)[0], signal.SIGKILL)
    assert run.wait() == 0, run.output.read_text()
    starts = [int(epoch) for epoch in re.findall(r'resuming at epoch (\d+)', run.log())]
    assert len(starts) == 2
    assert starts[0] == 10
    assert starts[1] > 12
    metrics = [json.loads(line) for line in (run.folder / 'metrics.jsonl').read_text().splitlines()]
    assert [record['epoch'] for record in metrics if record['kind'] == 'epoch'] == list(range(10, 40))
