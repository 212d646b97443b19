"""The benchmark of the start of a detector's data."""

import json
import re
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.processes import environment
from tools.benchmark.coco_names import write_coco_names


@pytest.mark.slow
def test_a_row_for_two_ranks_with_a_worker_each(tmp_path):
    write_coco_names(tmp_path / 'coco', 404, 8)
    path = tmp_path / 'coco' / 'annotations' / 'instances_train2017.json'
    annotations = json.loads(path.read_text())['annotations']
    assert len(annotations) == round(404 * 860 / 118)
    command = [sys.executable, '-m', 'tools.benchmark.coco_start', '--data-path', str(tmp_path / 'coco')]
    command += ['--ranks', '2', '--workers', '1']
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    head, _, row = done.stdout.splitlines()
    assert head.startswith('| ranks | workers per rank | start-up, s |')
    assert re.fullmatch(r'\| 2 \| 1 (\| [\d,.]+ ){5}\| -?[\d.]+ \|', row)
