import pytest

from tests.helpers.paths import TINY_DETECTOR
from tests.helpers.processes import error_line, run_here

PROGRAM = ['-m', 'detection.tools.benchmark']
SMALL = ['--height', '64', '--width', '96', '--rounds', '2', '--device', 'cpu']


def test_it_prints_time_and_memory_of_each_mode():
    done = run_here(*PROGRAM, TINY_DETECTOR, *SMALL, '--precisions', 'fp32', 'bf16')
    assert done.returncode == 0, done.stderr
    rows = [
        [cell.strip() for cell in line.split('|')[1:-1]] for line in done.stdout.splitlines() if line[:6] == '| tiny'
    ]
    assert [row[0] for row in rows] == ['tiny_detector, fp32', 'tiny_detector, bf16'] * 2
    assert [row[2] for row in rows[::2]] == ['1.00 (1.00 to 1.00)'] * 2
    inference, train = (int(rows[i][3]) for i in (0, 2))
    assert 0 < inference < train
    assert 'revision' in done.stdout


@pytest.mark.parametrize('name', ['torchvision:resnet50', 'torchvision:ssdlite320_mobilenet_v3_large', 'nothing.yaml'])
def test_what_is_no_detector_is_one_line(name):
    assert name.split(':')[-1] in error_line(*PROGRAM, name, *SMALL)
