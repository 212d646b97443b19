from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from detection.data import CocoDataset
from detection.detections import Detections
from detection.draw import draw_detections, instance_color
from tests.helpers.detectors import box_masks, perfect_detections

NAMES = ['box', 'wedge', 'rare']
NOTHING = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0), [], (9, 9))


def test_detections_above_the_threshold_are_drawn(coco):
    image, target = CocoDataset(coco, 'val')[0]
    detections = perfect_detections(target)  # with scores of 0.9
    detections = Detections.from_output(detections | {'masks': box_masks(detections['masks'])}, NAMES, image.shape[1:])
    drawn = np.asarray(draw_detections(image, detections.above(0.5)))
    assert drawn.shape == (8 * 48, 8 * 64, 3)  # enlarged to make names legible
    x1, y1 = (int(x) * 8 for x in target['boxes'][0, :2])
    assert tuple(drawn[y1, x1]) in {instance_color(rank) for rank in range(len(target['labels']))}
    plain = np.asarray(draw_detections(image, detections.above(0.95)))
    enlarged = (F.interpolate(image[None], scale_factor=8, mode='bilinear')[0] * 255).round().to(torch.uint8)
    np.testing.assert_array_equal(plain, enlarged.permute(1, 2, 0).numpy())


def test_large_images_are_not_enlarged_and_long_ones_only_to_4000_pixels():
    for shape, size in (((3, 500, 600), (600, 500)), ((3, 3, 900), (3600, 12))):
        image = torch.rand(shape)
        assert draw_detections(image, NOTHING).size == size


def test_colors_of_100_instances_differ_and_those_of_neighbours_are_far_apart():
    colors = [instance_color(rank) for rank in range(100)]
    assert len(set(colors)) == 100
    assert min(np.abs(np.subtract(*pair)).max() for pair in pairwise(colors)) > 100


def test_instances_of_one_class_have_different_colors():
    masks = torch.zeros(2, 1, 500, 600)
    masks[0, :, :200, :200] = masks[1, :, 300:, 300:] = 1
    boxes = torch.tensor([[0.0, 0, 200, 200], [300, 300, 600, 500]])
    detections = {'boxes': boxes, 'labels': torch.tensor([1, 1]), 'scores': torch.tensor([0.9, 0.8])}
    detections = Detections.from_output(detections | {'masks': box_masks(masks)}, NAMES, (500, 600))
    drawn = draw_detections(torch.zeros(3, 500, 600), detections)
    for rank, centre in enumerate([(100, 100), (450, 400)]):
        assert drawn.getpixel(centre) == tuple(value // 2 for value in instance_color(rank))


def test_an_image_that_is_not_enlarged_is_not_interpolated(monkeypatch):
    monkeypatch.setattr(F, 'interpolate', lambda *_, **__: pytest.fail('interpolated'))
    image = torch.rand(3, 400, 500)
    drawn = np.asarray(draw_detections(image, NOTHING))
    np.testing.assert_array_equal(drawn, (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
