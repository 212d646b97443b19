"""`make demo` and `make demo-detection`: minutes, so slow."""

import json
import re
import subprocess
import sys

import cv2
import pytest

from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow


def make_demo(output, demo='demo'):
    command = ['make', demo, f'OUTPUT={output}', f'VENV={sys.prefix}']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope='module')
def output(tmp_path_factory):
    return tmp_path_factory.mktemp('demo')


def test_demo_classifies_at_least_97_percent_of_the_held_out_digits(output):
    printed = make_demo(output)
    run = output / 'msg_digits_p2_win7_56' / 'demo_seed0'
    accuracy = float(re.search(r' \* Acc@1 ([\d.]+)', (run / 'evaluation.txt').read_text())[1])
    assert accuracy >= 97
    assert f'Accuracy of the network on the 360 test images: {accuracy:.1f}%' in printed
    for name in ('curves', 'predictions'):
        assert cv2.imread(str(output / f'demo_{name}_seed0.png')) is not None

    before = {path: path.stat().st_mtime_ns for path in output.rglob('*')}
    again = make_demo(output)
    assert f'Accuracy of the network on the 360 test images: {accuracy:.1f}%' in again
    assert 'main.py' not in again
    assert {path: path.stat().st_mtime_ns for path in output.rglob('*')} == before


def test_detection_demo_reaches_90_ap50_on_held_out_images(output):
    printed = make_demo(output, 'demo-detection')
    run = output / 'cascade_mask_rcnn_msg_digits' / 'demo_seed0'
    table = re.findall(r'^\| (?:box|mask) .*', (run / 'evaluation.txt').read_text(), re.MULTILINE)
    assert len(table) == 2
    assert all(float(row.split('|')[3]) >= 90 for row in table)  # AP50
    assert all(row in printed for row in table)
    assert len({result['image_id'] for result in json.loads((run / 'results.json').read_text())}) == 200
    pictures = list((output / 'demo_detections_seed0').glob('*.jpg'))
    assert len(pictures) == 12
    assert all(min(cv2.imread(str(path)).shape[:2]) == 384 for path in pictures)
    assert cv2.imread(str(output / 'demo_detection_curves_seed0.png')) is not None
    assert 'detection.main' not in make_demo(output, 'demo-detection')
