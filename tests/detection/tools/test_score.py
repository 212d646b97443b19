import json

import pytest

from tests.helpers.paths import TINY_DETECTOR
from tests.helpers.processes import error_line, run_here

PROGRAM = ['-m', 'detection.tools.score']


@pytest.fixture
def data(coco):
    return ['--cfg', TINY_DETECTOR, '--data-path', coco]


@pytest.fixture
def results(coco):
    """Every annotation as a detection, without crowds."""
    tree = json.loads((coco / 'annotations' / 'instances_val.json').read_text())
    objects = [x for x in tree['annotations'] if not x.get('iscrowd')]
    return [{key: x[key] for key in ('image_id', 'category_id', 'bbox')} | {'score': 0.9} for x in objects]


def test_each_evaluator_finds_the_annotations_perfect(data, results, tmp_path):
    path = tmp_path / 'results.json'
    path.write_text(json.dumps(results))
    done = run_here(*PROGRAM, path, *data, '--by', 'pycocotools', 'hotcoco')
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('| box | 100.00 | 100.00 | 100.00 |') == 2
    assert f'{len(results)} detections, pycocotools: ' in done.stdout
    size, counts = [48, 64], [0, 48 * 64]
    whole = [{'image_id': 5, 'category_id': 3, 'bbox': [0, 0, 64, 48], 'score': 0.5}]
    path.write_text(json.dumps([x | {'segmentation': {'size': size, 'counts': counts}} for x in whole]))
    assert '| mask | 0.00 |' in run_here(*PROGRAM, path, *data).stdout
    path.write_text('[]')
    assert '| box | 0.00 |' in run_here(*PROGRAM, path, *data).stdout


def test_the_report_of_the_classes(data, results, tmp_path):
    path = tmp_path / 'results.json'
    path.write_text(json.dumps(results))
    done = run_here(*PROGRAM, path, *data, '--output', tmp_path / 'new' / 'report')
    assert '| objects | box AP | box AP50 | best threshold | precision | recall | F1 | class |' in done.stdout
    names = {f'{name}{end}' for name in ('precision_recall', 'confusion') for end in ('.csv', '.png')} | {'classes.csv'}
    assert {file.name for file in (tmp_path / 'new' / 'report').iterdir()} == names
    assert str(path) in error_line(*PROGRAM, path, *data, '--output', path)


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('[{"image_id": "x", "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1}]', 'image x is not in the annotation'),
        (
            '[{"image_id": 5, "category_id": 99, "bbox": [0, 0, 1, 1], "score": 1}]',
            'category 99 is not in the annotation',
        ),
        ('[{"image_id": 1, "category_id": 3, "bbox": [0, 0, 1], "score": 1}]', 'entry 0 is not in the result format'),
        ('[{"image_id": 1, "category_id": 3, "bbox": [0, 0, 1, 1], "score": NaN}]', 'entry 0 is not in the result'),
        ('[{"image_id": [1], "category_id": 3, "bbox": [0, 0, 1, 1], "score": 1}]', 'entry 0 is not in the result'),
        (
            '[{"image_id": 5, "category_id": 3, "bbox": [0, 0, 1, 1], "score": 1, '
            '"segmentation": {"size": [48, 64], "counts": "~~~~"}}]',
            'a detection in image 5 has a mask of size [48, 64]',
        ),
        ('[{"image_id": true, "category_id": 3, "bbox": [0, 0, 1, 1], "score": 1}]', 'entry 0 is not in the result'),
        ('[' * 100_000, 'is nested too deeply'),
        ('{}', 'is not in the result format'),
        ('[', 'is not JSON'),
        (None, 'No such file'),
    ],
)
def test_what_is_wrong_is_one_line(data, content, message, tmp_path):
    path = tmp_path / 'results.json'
    if content is not None:
        path.write_text(content)
    assert message in error_line(*PROGRAM, path, *data)
