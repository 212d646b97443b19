import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from detection.config import load_config
from detection.data import CocoDataset, build_loaders
from detection.tools.make_digits_coco import DIGITS, make_digits_coco, paste
from tests.helpers.coco_data import read_tree
from tests.helpers.paths import DETECTION_CONFIGS
from tests.helpers.processes import error_line, run_here
from utils import UserError

BOXES = [[56.0, 25.0, 24.0, 37.0], [27.0, 71.0, 21.0, 41.0], [54.0, 31.0, 17.0, 33.0]]


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """A small dataset of digits."""
    root = tmp_path_factory.mktemp('digits')
    written = make_digits_coco(root, train=8, val=4)
    assert written == {split: len(read_tree(root, split)['annotations']) for split in ('train', 'val')}
    return root


def test_pasted_digits_have_the_masks_of_their_pixels():
    rng = np.random.default_rng(0)
    canvas, occupied = np.full((96, 128, 3), 40, dtype=np.uint8), np.zeros((96, 128), dtype=bool)
    digit = np.zeros((8, 8))
    digit[1:7, 2:5] = 16
    masks = [paste(rng, canvas, digit, occupied) for _ in range(3)]
    for mask in masks:
        inside = canvas[mask].min(axis=-1)
        assert (inside >= 40 + (190 - 40) / 2 - 1).all()  # half of the darkest colour, or more
    outside = ~np.any(masks, axis=0)
    assert (canvas[outside].min(axis=-1) < 150).all()
    assert sum(mask.sum() for mask in masks) == np.any(masks, axis=0).sum()  # they do not overlap
    assert paste(rng, canvas, digit, np.ones_like(occupied)) is None  # no free position


def test_the_digits_are_a_valid_dataset_of_their_config(digits):
    train, val = build_loaders(load_config(DETECTION_CONFIGS / 'digits.yaml', ['DATA.DATA_PATH', str(digits)]))
    assert (len(train.dataset), len(val.dataset)) == (8, 4)
    assert val.dataset.classes == list('0123456789')
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
        for annotation in read_tree(digits, split)['annotations']:
            assert annotation['area'] == coco_mask.area(annotation['segmentation'])
    assert shapes == {(3, 96, 128), (3, 128, 96)}


def test_the_digits_are_always_the_same(digits, tmp_path):
    make_digits_coco(tmp_path, train=8, val=4)
    for path in digits.rglob('*.*'):
        assert path.read_bytes() == (tmp_path / path.relative_to(digits)).read_bytes()
    first = [annotation['bbox'] for annotation in read_tree(digits, 'val')['annotations'][:3]]
    assert first == BOXES  # published results were trained on these images


def test_images_and_digits_of_other_sizes(tmp_path):
    done = run_here(
        *('-m', 'detection.tools.make_digits_coco', '--output', tmp_path, '--train', 3, '--val', 6),
        *('--size', 256, 192, '--digit-size', 60, 80),
    )
    assert done.returncode == 0, done.stderr
    tree = read_tree(tmp_path, 'val')
    assert {(image['width'], image['height']) for image in tree['images']} == {(256, 192), (192, 256)}
    for image in tree['images']:
        written = cv2.imread(str(tmp_path / 'val' / image['file_name']))
        assert written.shape == (image['height'], image['width'], 3)
    sizes = [max(annotation['bbox'][2:]) for annotation in tree['annotations']]
    assert len(sizes) >= 6
    assert 45 < min(sizes) <= max(sizes) <= 80  # a digit may leave a margin


@pytest.mark.parametrize(
    ('sizes', 'message'),
    [
        ({'size': (400, 192)}, 'an image of 400 x 192 pixels does not fit the photographs: write at most 320'),
        ({'size': (64, 48)}, 'digits of 24 to 56 pixels do not fit: write .* from 8 to 48'),
        ({'digit_size': (56, 24)}, 'digits of 56 to 24 pixels do not fit: write the smallest size and the largest'),
        ({'digit_size': (4, 24)}, 'digits of 4 to 24 pixels do not fit'),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, sizes, message):
    with pytest.raises(UserError, match=message):
        make_digits_coco(tmp_path / 'out', train=2, val=1, **sizes)
    assert not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_an_output_that_is_a_file_is_reported_in_one_line():
    assert error_line('-m', 'detection.tools.make_digits_coco', '--output', 'README.md').startswith('error: ')
