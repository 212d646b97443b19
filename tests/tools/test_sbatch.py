"""tools/train.sbatch, with stand-ins for SLURM's programs."""

import os
import subprocess

import pytest

from tests.helpers.paths import ROOT


@pytest.mark.parametrize(('code', 'requeues'), [(0, False), (1, False), (75, True), (138, True), (143, True)])
def test_a_stopped_job_requeues_itself(tmp_path, code, requeues):
    for name, script in (('srun', f'exit {code}'), ('scontrol', f'echo "$@" > {tmp_path}/requeued')):
        (tmp_path / name).write_text(f'#!/bin/bash\n{script}\n')
        (tmp_path / name).chmod(0o755)
    variables = os.environ | {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'SLURM_JOB_ID': '7'}
    done = subprocess.run(['bash', ROOT / 'tools' / 'train.sbatch'], env=variables, capture_output=True, text=True)
    assert done.returncode == code
    requeued = tmp_path / 'requeued'
    assert (requeued.read_text() if requeued.exists() else '') == ('requeue 7\n' if requeues else '')


@pytest.mark.parametrize(('program', 'called'), [(None, 'main.py'), ('-m detection.main', '-m detection.main')])
def test_script_starts_the_program_for_classifiers_or_another_one(tmp_path, program, called):
    (tmp_path / 'srun').write_text(f'#!/bin/bash\necho "$@" > {tmp_path}/called\n')
    (tmp_path / 'srun').chmod(0o755)
    variables = os.environ | {'PATH': f'{tmp_path}:{os.environ["PATH"]}'} | ({'PROGRAM': program} if program else {})
    subprocess.run(['bash', ROOT / 'tools' / 'train.sbatch', '--cfg', 'a b.yaml'], env=variables, check=True)
    assert (tmp_path / 'called').read_text().endswith(f'python {called} --cfg a b.yaml\n')
