"""tools.rehearsal: interrupted runs are compared with an uninterrupted run."""

import json
import os
import subprocess
import sys
import time

import pytest

from engine.checkpoint import load_checkpoint, save_checkpoint
from tests.helpers.images import write_images
from tests.helpers.paths import ROOT, TINY
from tests.helpers.processes import environment, error_line, run_here, start
from tools.rehearsal.interruptions import compare, restart_of_logs
from tools.rehearsal.launch import SlurmJob, children
from tools.rehearsal.names import write_names

UPDATE = 'x: INFO Train: [{}/9][{}/3]\teta\n'
RESUMED = 'x: INFO resuming at epoch {}, update {}, max\nx: INFO the run resumes {}\n' + UPDATE.format(4, 2)


@pytest.mark.parametrize(
    ('resumed', 'lost', 'is_exact'),
    [
        (RESUMED.format(4, 2, 'bit for bit, as if it had never stopped'), 0, True),
        (RESUMED.format(3, 1, 'bit for bit'), 4, True),
        (RESUMED.format(4, 0, 'on another processor: not bit for bit'), 2, False),
        (UPDATE.format(0, 0), 14, True),
    ],
)
def test_restart_is_read_from_the_logs(resumed, lost, is_exact):
    log_before = ''.join(UPDATE.format(epoch, step) for epoch in range(5) for step in range(3))[: -len(UPDATE) + 4]
    restart = restart_of_logs('killed', log_before, resumed, [4, 2], seconds=3.0, peak_mb=1.0)
    assert restart == ('killed', 4, (4, 2), lost, 3.0, 1.0, is_exact)


def test_names_are_links_to_few_files(tmp_path):
    write_names(tmp_path / 'names', images=250, classes=10, size=16)
    names = [*(tmp_path / 'names' / 'train').glob('*/*.jpg')]
    assert len(names) == 250
    assert len({path.stat().st_ino for path in names}) <= 100
    assert {path.parent.name for path in names} == {path.name for path in (tmp_path / 'names' / 'val').iterdir()}
    assert all(len([*folder.iterdir()]) == 25 for folder in (tmp_path / 'names' / 'train').iterdir())


def test_output_must_be_empty(tmp_path):
    (tmp_path / 'file').touch()
    done = run_here('-m', 'tools.rehearsal', '--output', tmp_path, '--', 'main.py')
    assert done.returncode == 2
    assert 'is not empty: give an empty folder' in done.stderr


@pytest.mark.slow
def test_run_that_fails_is_named(tmp_path):
    line = error_line('-m', 'tools.rehearsal', '--output', tmp_path / 'new', '--', 'main.py', '--cfg', 'none.yaml')
    assert 'uninterrupted ended with exit code 1: see' in line


@pytest.mark.slow
def test_interrupted_run_equals_the_uninterrupted_one_and_a_faulty_one_does_not(tmp_path):
    write_images(tmp_path / 'tree')
    options = 'TRAIN.EPOCHS 100 SAVE_STEPS 1 PRINT_FREQ 1 EVAL_FREQ 50 TRAIN.VIRTUAL_RANKS 2 DATA.BATCH_SIZE 4'
    command = ['main.py', '--cfg', TINY, '--data-path', tmp_path / 'tree', '--opts', *options.split()]
    output = tmp_path / 'runs'
    # With this seed, the last interruption comes early enough on a fast machine: at 74 % of the epochs, and 0.4 s later
    arguments = ['--output', output, '--processes', 1, 2, '--kills', 3, '--seed', 13]
    done = start('-m', 'tools.rehearsal', *arguments, '--', *command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'interrupted: equal to the uninterrupted run, to the bit' in done.stdout
    restarts = json.loads((output / 'rehearsal.json').read_text())['interrupted']['restarts']
    assert [restart['processes'] for restart in restarts] == [[1, 1], [1, 2], [2, 2]]
    assert all(restart['is_exact'] for restart in restarts)
    one, two = (output / 'tiny' / tag / 'ckpt_epoch_99.pth' for tag in ('uninterrupted', 'interrupted'))
    assert compare(one, two) == []
    changed = load_checkpoint(two)
    next(iter(changed['model'].values())).view(-1)[0] += 1e-6
    save_checkpoint(two, changed)
    (difference,) = compare(one, two)
    assert difference.startswith('model.')


@pytest.mark.slow
def test_interrupted_rehearsal_leaves_no_process(tmp_path):
    write_images(tmp_path / 'tree')
    command = [sys.executable, '-m', 'tools.rehearsal', '--output', tmp_path / 'runs', '--', 'main.py', '--cfg', TINY]
    command += ['--data-path', tmp_path / 'tree', '--opts', 'TRAIN.EPOCHS', '9999']
    with subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment(), stderr=subprocess.PIPE) as process:
        log, end = tmp_path / 'runs' / 'uninterrupted.txt', time.monotonic() + 120
        while not (log.exists() and 'Train: [' in log.read_text()):
            assert time.monotonic() < end
            time.sleep(0.1)
        started = children(process.pid)
        process.terminate()
        process.wait(30)
    assert started
    assert not [pid for pid in started if os.path.exists(f'/proc/{pid}')]


def test_script_for_slurm_is_a_shell_script():
    assert subprocess.run(['bash', '-n', ROOT / 'tools' / 'rehearsal' / 'slurm_node.sh']).returncode == 0


@pytest.mark.parametrize(('program', 'started'), [('main.py', 'main.py'), ('detection.main', '-m detection.main')])
def test_slurm_job_starts_the_program_of_the_command(tmp_path, monkeypatch, program, started):
    stub = f'#!/bin/bash\necho "$PROGRAM|${{@: -2}}" > {tmp_path}/called\necho 7\n'
    (tmp_path / 'sbatch').write_text(stub)
    (tmp_path / 'sbatch').chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
    assert SlurmJob([program, '--cfg', 'x.yaml'], 2, tmp_path / 'console.txt').number == '7'
    assert (tmp_path / 'called').read_text() == f'{started}|--cfg x.yaml\n'
