import numpy as np
import torch
import torch.nn.functional as F

from detection.data import CocoDataset
from detection.draw import draw_detections, label_color
from tests.helpers.detectors import no_detections, perfect_detections

NAMES = ['box', 'wedge', 'rare']


def test_detections_above_the_threshold_are_drawn(coco):
    image, target = CocoDataset(coco, 'val')[0]
    detections = perfect_detections(target)  # with scores of 0.9
    drawn = np.asarray(draw_detections(image, detections, NAMES, threshold=0.5))
    assert drawn.shape == (8 * 48, 8 * 64, 3)  # enlarged to make names legible
    x1, y1 = (int(x) * 8 for x in target['boxes'][0, :2])
    assert tuple(drawn[y1, x1]) in {label_color(label) for label in target['labels'].tolist()}
    plain = np.asarray(draw_detections(image, detections, NAMES, threshold=0.95))
    enlarged = (F.interpolate(image[None], scale_factor=8, mode='bilinear')[0] * 255).round().to(torch.uint8)
    np.testing.assert_array_equal(plain, enlarged.permute(1, 2, 0).numpy())


def test_large_images_are_not_enlarged_and_long_ones_only_to_4000_pixels(coco):
    _, target = CocoDataset(coco, 'val')[0]
    detections = no_detections(target)
    assert draw_detections(torch.rand(3, 500, 600), detections, NAMES).size == (600, 500)
    assert draw_detections(torch.rand(3, 3, 900), detections, NAMES).size == (3600, 12)


def test_colors_of_80_classes_differ():
    assert len({label_color(label) for label in range(1, 81)}) == 80
