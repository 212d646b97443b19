"""`make demo`, the tutorial that goes on from it, and `make demo-detection`: minutes, so slow."""

import csv
import json
import re
import shutil
import subprocess
import sys

import cv2
import pytest

from tests.helpers.documents import code_blocks
from tests.helpers.paths import ROOT, copy_sources
from tests.helpers.photographs import write_photographs
from tests.helpers.shared import shared_folder

pytestmark = pytest.mark.slow


def make_demo(output, demo='demo'):
    command = ['make', demo, f'OUTPUT={output}', f'VENV={sys.prefix}']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope='module')
def demo(tmp_path_factory):
    """What `make demo` writes; `printed.txt` is what it prints."""
    return shared_folder(
        tmp_path_factory, 'demo', lambda output: (output / 'printed.txt').write_text(make_demo(output))
    )


def test_demo_classifies_at_least_97_percent_of_the_held_out_digits(demo):
    output, printed = demo, (demo / 'printed.txt').read_text()
    run = output / 'msg_digits_p2_win7_56' / 'demo_seed0'
    accuracy = float(re.search(r' \* Acc@1 ([\d.]+)', (run / 'evaluation.txt').read_text())[1])
    assert accuracy >= 97
    assert f'Accuracy of the network on the 360 test images: {accuracy:.1f}%' in printed
    for name in ('curves_seed0', 'predictions_seed0', 'photographs'):
        assert cv2.imread(str(output / f'demo_{name}.png')) is not None
    photographs = sorted(path.relative_to(ROOT / 'docs/photographs') for path in ROOT.glob('docs/photographs/*/*.jpg'))
    assert re.findall(r'^(\S+\.jpg)\tn\d{8} ', printed, re.MULTILINE) == list(map(str, photographs))

    before = {path: path.stat().st_mtime_ns for path in output.rglob('*')}
    again = make_demo(output)
    assert f'Accuracy of the network on the 360 test images: {accuracy:.1f}%' in again
    assert 'main.py' not in again
    assert {path: path.stat().st_mtime_ns for path in output.rglob('*')} == before


def test_tutorial_runs_as_written(demo, tmp_path):
    shutil.copytree(demo, tmp_path, dirs_exist_ok=True)  # so that its `make demo` has nothing left to do
    tree, tutorial = copy_sources(tmp_path / 'tree'), (ROOT / 'docs' / 'tutorial.md').read_text()
    (tree / '.venv').symlink_to(sys.prefix)
    (tree / 'output').symlink_to(tmp_path)
    write_photographs(tree / 'pictures', 40)
    done = subprocess.run(
        ['bash', '-euxo', 'pipefail', '-c', ''.join(code_blocks(tutorial, 'bash'))],
        cwd=tree, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'Accuracy of the network' in done.stdout
    assert 'main.py --cfg configs/msg_digits' not in done.stdout
    for text in (tutorial, done.stdout):
        assert 'msg_transformer_nano.safetensors has other classes: the head starts from scratch' in text
    with (tmp_path / 'predictions.csv').open() as file:
        predicted = {row['path']: row['class'] for row in csv.DictReader(file)}
    assert len(predicted) == 16
    assert sum(path.split('/')[-2] == name for path, name in predicted.items()) >= 14
    for name in ('curves.png', 'sheet.png'):
        assert cv2.imread(str(tmp_path / name)) is not None
    assert len(list((tmp_path / 'inside').iterdir())) == 16
    assert json.loads((tmp_path / 'pictures.onnx.json').read_text())['max_abs_difference'] <= 1e-4
    [code] = code_blocks(tutorial, 'py')
    printed = subprocess.run([sys.executable, '-c', code], cwd=tree, capture_output=True, text=True, check=True).stdout
    exported = dict(line.rsplit(' ', 1) for line in printed.splitlines())
    assert exported.keys() == predicted.keys()
    assert sum(exported[path] == predicted[path] for path in predicted) >= 15  # resized by Pillow alone


def test_detection_demo_reaches_90_ap50_on_held_out_images(tmp_path):
    output = tmp_path
    printed = make_demo(output, 'demo-detection')
    run = output / 'cascade_mask_rcnn_msg_digits' / 'demo_seed0'
    table = re.findall(r'^\| (?:box|mask) \|.*', (run / 'evaluation.txt').read_text(), re.MULTILINE)
    assert len(table) == 2
    assert all(float(row.split('|')[3]) >= 90 for row in table)  # AP50
    assert all(row in printed for row in table)
    assert len({result['image_id'] for result in json.loads((run / 'results.json').read_text())}) == 200
    pictures = list((output / 'demo_detections_seed0').glob('*.jpg'))
    assert len(pictures) == 12
    assert all(min(cv2.imread(str(path)).shape[:2]) == 384 for path in pictures)
    assert cv2.imread(str(output / 'demo_detection_curves_seed0.png')) is not None
    assert 'detection.main' not in make_demo(output, 'demo-detection')
