"""The set of digits in COCO's format, and predictions on pictures."""

import json

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from data import DataError
from detection.config import load_config
from detection.data import CocoDataset, build_loaders
from detection.models import build_detector
from tests.conftest import ROOT
from tests.test_command_line import start
from tools.make_digits_coco import DIGITS, make_digits_coco, paste
from tools.predict_detection import drawn_paths

DIGITS_YAML = ROOT / 'detection' / 'configs' / 'digits.yaml'


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp('digits')
    written = make_digits_coco(root, train=8, val=4)
    assert written == {split: len(read(root, split)['annotations']) for split in ('train', 'val')}
    return root


def read(root, split):
    return json.loads((root / 'annotations' / f'instances_{split}.json').read_text())


def test_pasted_digits_have_the_boxes_and_masks_of_their_pixels():
    rng = np.random.default_rng(0)
    canvas, taken = np.full((96, 128, 3), 40, dtype=np.uint8), np.zeros((96, 128), dtype=bool)
    digit = np.zeros((8, 8))
    digit[1:7, 2:5] = 16
    masks = [paste(rng, canvas, digit, taken) for _ in range(3)]
    for mask in masks:
        inside = canvas[mask].min(axis=-1)
        assert (inside >= 40 + (190 - 40) / 2 - 1).all()  # half of the darkest colour, or more
    nowhere = ~np.any(masks, axis=0)
    assert (canvas[nowhere].min(axis=-1) < 150).all()
    assert sum(mask.sum() for mask in masks) == np.any(masks, axis=0).sum()  # none on another
    assert paste(rng, canvas, digit, np.ones_like(taken)) is None  # no place


def test_the_digits_are_a_data_set_of_the_demo(digits):
    train, val = build_loaders(load_config(DIGITS_YAML, ['DATA.DATA_PATH', str(digits)]))
    assert (len(train.dataset), len(val.dataset)) == (8, 4)
    assert [category['name'] for category in val.dataset.categories] == list('0123456789')
    assert val.dataset.notes == []
    shapes = set()
    for split in ('train', 'val'):
        for image, target in CocoDataset(digits, split):
            shapes.add(image.shape)
            assert 1 <= len(target['boxes']) <= DIGITS[1]
            assert target['masks'].sum(dim=0).max() == 1
            for box, mask in zip(target['boxes'], target['masks'], strict=True):
                rows, columns = mask.nonzero().unbind(dim=1)
                assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        for annotation in read(digits, split)['annotations']:
            assert annotation['area'] == coco_mask.area(annotation['segmentation'])
    assert shapes == {(3, 96, 128), (3, 128, 96)}


def test_the_digits_are_always_the_same(digits, tmp_path):
    make_digits_coco(tmp_path, train=8, val=4)
    for path in digits.rglob('*.*'):
        assert path.read_bytes() == (tmp_path / path.relative_to(digits)).read_bytes()


def test_drawings_have_their_images_places_and_overwrite_none(digits, tmp_path):
    train, val = digits / 'train', digits / 'val' / '000001.jpg'
    paths = drawn_paths([train], tmp_path)
    assert paths[train / '000003.jpg'] == tmp_path / '000003.jpg'
    assert drawn_paths([digits], tmp_path)[val] == tmp_path / 'val' / '000001.jpg'
    with pytest.raises(DataError, match='several images have the same name'):
        drawn_paths([train, val], tmp_path)
    with pytest.raises(DataError, match=r'000001.jpg would be overwritten: write another --output'):
        drawn_paths([val], digits / 'val')
    for output in (digits, digits / 'drawn'):
        with pytest.raises(DataError, match='is in .*, with the images: write another'):
            drawn_paths([digits], output)
    (tmp_path / 'none').mkdir()
    with pytest.raises(DataError, match='no images in'):
        drawn_paths([tmp_path / 'none'], tmp_path)
    with pytest.raises(DataError, match='nowhere does not exist: give image files or folders'):
        drawn_paths([tmp_path / 'nowhere'], tmp_path)


@pytest.mark.slow
def test_predictions_as_a_user_starts_them(digits, tmp_path):
    torch.manual_seed(0)
    names = [f'digit {number}' for number in range(10)]
    model = build_detector(load_config(DIGITS_YAML))
    torch.save({'model': model.state_dict(), 'classes': names}, tmp_path / 'weights.pth')
    common = ['--cfg', DIGITS_YAML, '--resume', tmp_path / 'weights.pth', '--output', tmp_path / 'drawn']
    flags = ['--score', '0', '--opts', 'MODEL.BOX.SCORE', '0', 'MODEL.BOX.DETECTIONS', '5', 'DEVICE', 'cpu']
    done = start('-m', 'tools.predict_detection', digits / 'val', '--limit', '2', *common, *flags)
    assert done.returncode == 0, done.stderr
    *found, said = done.stdout.splitlines()
    assert said == str(tmp_path / 'drawn')
    drawn = sorted((tmp_path / 'drawn').iterdir())
    assert len(drawn) == 2
    assert {line.split('\t')[0] for line in found} == {str(digits / 'val' / path.name) for path in drawn}
    for line in found:
        _, name, score, box = line.split('\t')
        assert name in names
        assert 0 <= float(score) <= 1
        x1, y1, x2, y2 = map(float, box.split())
        assert 0 <= x1 <= x2 <= 128
        assert 0 <= y1 <= y2 <= 128
    for path in drawn:
        large, small = cv2.imread(str(path)), cv2.imread(str(digits / 'val' / path.name))
        assert large.shape[:2] == tuple(4 * side for side in small.shape[:2])
        assert np.abs(cv2.resize(large, small.shape[1::-1]).astype(int) - small).max() > 60  # something is drawn


@pytest.mark.slow
@pytest.mark.parametrize(
    ('tool', 'flags', 'message'),
    [
        ('predict_detection', ['nowhere', '--cfg', 'nowhere'], 'error: config file nowhere: No such file'),
        ('predict_detection', ['nowhere', '--cfg', str(DIGITS_YAML)], 'error: checkpoint x does not exist'),
        ('make_digits_coco', ['--output', 'README.md'], 'error: '),
    ],
)
def test_tools_tell_mistakes_in_one_line(tool, flags, message):
    more = ['--resume', 'x', '--output', 'output'] if tool == 'predict_detection' else []
    done = start('-m', f'tools.{tool}', *flags, *more)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]
    assert 'Traceback' not in done.stderr
