"""The benchmark of the start of a detector's data."""

import re
import subprocess
import sys

import pytest

from tests.helpers.coco_data import write_coco
from tests.helpers.paths import ROOT
from tests.helpers.processes import environment


@pytest.mark.slow
def test_a_row_for_two_ranks_with_a_worker_each(tmp_path):
    root = write_coco(tmp_path / 'coco', train=404)
    options = ['DATA.TRAIN_SPLIT', 'train', 'DATA.VAL_SPLIT', 'val']
    command = ['tools.benchmark.coco_start', '--data-path', str(root), '--ranks', '2', '--workers', '1']
    command = [sys.executable, '-m', *command, '--opts', *options]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    head, _, row = done.stdout.splitlines()
    assert head.startswith('| ranks | workers per rank | start-up, s |')
    assert re.fullmatch(r'\| 2 \| 1 (\| [\d,.]+ ){5}\| -?[\d.]+ \|', row)
