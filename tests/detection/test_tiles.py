"""Tiled detection: where tiles are, which detections are kept, and what a detector finds in them."""

import pytest
import torch

from detection.config import load_config
from detection.models import build_detector
from detection.models.masks import BoxMasks
from detection.tiles import Tile, Tiling, merge_indices
from detection.tta import build_detect_fn, detect_in_tiles
from engine.config_tree import ConfigError
from tests.helpers.detectors import tiny_detector
from tests.helpers.paths import TINY_DETECTOR

IOU = 0.5


@pytest.mark.parametrize('overlap', [0.0, 0.2, 0.5])
@pytest.mark.parametrize(('height', 'width'), [(100, 257), (64, 65), (640, 480), (50, 60)])
def test_tiles_cover_an_image_and_overlap(height, width, overlap):
    tiles = Tiling(64, overlap).tiles(height, width)
    seen = torch.zeros(height, width, dtype=torch.int)
    for top, left, rows, columns in tiles:
        assert (rows, columns) == (min(height, 64), min(width, 64))
        seen[top : top + rows, left : left + columns] += 1
    assert seen.min() == 1
    for starts, length in ((sorted({x.top for x in tiles}), height), (sorted({x.left for x in tiles}), width)):
        gaps = torch.tensor(starts).diff()
        assert (gaps <= 64 * (1 - overlap)).all()
        assert (len(gaps) - 1) * int(64 * (1 - overlap)) + 64 < max(length, 65)  # one tile fewer would not do
    assert len(tiles) == len(set(tiles))


def test_a_box_is_cut_where_the_image_goes_on():
    corner, middle = Tile(0, 0, 50, 100), Tile(30, 40, 50, 100)
    boxes = torch.tensor([[0, 0, 20, 20], [80, 5, 100, 20], [5, 30, 20, 49.5], [5, 5, 97, 48], [1, 10, 20, 20]])
    assert corner.is_cut(boxes, 100, 200).tolist() == [False, True, True, False, False]
    assert middle.is_cut(boxes, 100, 200).tolist() == [True, True, True, False, True]
    assert corner.is_cut(boxes, 50, 100).tolist() == [False] * 5  # all of the image
    assert middle.offset(boxes)[0].tolist() == [40, 30, 60, 50]


def test_whole_objects_take_precedence_over_their_parts():
    boxes = torch.tensor(
        [
            [10, 10, 30, 30],  # an object
            [10, 10, 20, 30],  # its left half, which is surer
            [11, 10, 31, 30],  # again, in another tile
            [10, 10, 20, 30],  # of another class
            [60, 10, 70, 30],  # a part whose object nothing has found
            [60, 10, 71, 30],  # again
            [28, 10, 40, 30],  # a part that hardly touches an object
        ],
        dtype=torch.float32,
    )
    scores = torch.tensor([0.6, 0.9, 0.5, 0.8, 0.7, 0.65, 0.3])
    labels = torch.tensor([1, 1, 1, 2, 1, 1, 1])
    is_cut = torch.tensor([False, True, False, True, True, True, True])
    assert merge_indices(boxes, scores, labels, is_cut, IOU).tolist() == [3, 4, 0, 6]
    assert merge_indices(boxes[:0], scores[:0], labels[:0], is_cut[:0], IOU).tolist() == []
    assert merge_indices(boxes, scores, labels, ~is_cut, IOU).tolist() == [1, 3, 4, 0, 6]


def find_bright(images):
    """Detections of the bright rectangles of one colour each: as a perfect detector would find them, with masks."""
    outputs = []
    for image in images:
        boxes, labels, masks = [], [], []
        for label in image.unique()[1:].tolist():
            rows, columns = (image[0] == label).nonzero().unbind(dim=1)
            boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            labels.append(1)
            masks.append(torch.full((1, 4, 4), 8.0))  # also at the corners
        boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
        found = {'boxes': boxes, 'labels': torch.tensor(labels, dtype=torch.int64)}
        found['scores'] = 1 - (boxes[:, 2:] - boxes[:, :2]).prod(dim=1) / 1e5  # parts are surer
        found['masks'] = BoxMasks(torch.stack(masks) if masks else torch.zeros(0, 1, 4, 4), boxes, image.shape[1:])
        outputs.append(found)
    return outputs


@pytest.mark.parametrize(('sees_whole', 'batch_size'), [(True, 1), (False, 4)])
def test_objects_at_borders_of_tiles_are_found_once_and_whole(sees_whole, batch_size):
    torch.manual_seed(0)
    image, expected = torch.zeros(3, 200, 300), []
    for number, (x, y) in enumerate(((x, y) for x in range(2, 280, 25) for y in range(3, 180, 25)), start=1):
        width, height = (int(side) for side in torch.randint(3, 15, (2,)))  # smaller than the overlap less the margins
        image[:, y : y + height, x : x + width] = number
        expected.append([x, y, x + width, y + height])
    tiling = Tiling(80, 0.25, sees_whole)
    found = detect_in_tiles(image, find_bright, tiling, batch_size, IOU, 1000)
    assert sorted(found['boxes'].int().tolist()) == sorted(expected)
    assert (found['scores'].diff() <= 0).all()
    masks = found['masks'].dense()
    assert masks.shape == (len(expected), 1, 200, 300)
    assert torch.equal(masks.any(dim=0)[0], image[0] > 0)
    for box, mask in zip(found['boxes'].int().tolist(), masks[:, 0], strict=True):
        assert mask[box[1] : box[3], box[0] : box[2]].all()
    assert len(detect_in_tiles(image, find_bright, tiling, batch_size, IOU, 7)['boxes']) == 7


def test_objects_larger_than_the_overlap_are_found_in_the_whole_image():
    image = torch.zeros(3, 200, 300)
    image[:, 20:150, 50:260] = 1
    whole, parts = (detect_in_tiles(image, find_bright, Tiling(80, 0.25, x), 1, IOU, 1000) for x in (True, False))
    assert whole['boxes'].tolist() == [[50, 20, 260, 150]]
    assert len(parts['boxes']) > 1


@torch.no_grad()
def test_a_detector_sees_tiles_as_images():
    config = tiny_detector('MODEL.BOX.SCORE', '0.0', 'TEST.TILES', '48')
    plain = tiny_detector('MODEL.BOX.SCORE', '0.0')
    model, image = build_detector(config).eval(), torch.rand(3, 48, 80)
    [found] = build_detect_fn(config, model)([image])
    detect = build_detect_fn(plain, model)
    views = [detect([image])[0], detect([image[:, :, :48]])[0], detect([image[:, :, 32:]])[0]]
    views[2]['boxes'] += torch.tensor([32, 0, 32, 0])
    boxes = torch.cat([x['boxes'] for x in views])
    assert len(found['boxes']) == config.MODEL.BOX.DETECTIONS
    for box in found['boxes']:
        assert (boxes == box).all(dim=1).any()
    assert (found['boxes'][:, 2] > 48).any()
    assert found['masks'].dense().shape[2:] == (48, 80)
    [batched] = build_detect_fn(config, model, batch_size=8)([image])
    torch.testing.assert_close(batched['scores'], found['scores'])
    small = image[:, :40, :48]  # fits into a tile
    [alone], [same] = detect([small]), build_detect_fn(config, model)([small])
    assert all(torch.equal(alone[key], same[key]) for key in ('boxes', 'labels', 'scores'))


def test_mistakes_are_told():
    for key, value, message in (
        ('TEST.TILES', '16', r'size of tiles \(TEST.TILES\) is 16: write at least 32 pixels, or 0 for no tiles'),
        ('TEST.TILE_OVERLAP', '1.0', 'TEST.TILE_OVERLAP is 1.0: write a number between 0 and 0.9'),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(TINY_DETECTOR, [key, value])
