import numpy as np
import pytest
import torch
import torch.nn.functional as F

from detection.data import CocoDataset
from detection.detections import Detections
from detection.draw import class_color, contrasting, draw_detections
from tests.helpers.detectors import NAMES, box_masks, perfect_detections

NOTHING = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0), [], (9, 9))


def test_detections_above_the_threshold_are_drawn(coco):
    image, target = CocoDataset(coco, 'val')[0]
    detections = perfect_detections(target)  # with scores of 0.9
    detections = Detections.from_output(detections | {'masks': box_masks(detections['masks'])}, NAMES, image.shape[1:])
    drawn = np.asarray(draw_detections(image, detections.above(0.5)))
    assert drawn.shape == (8 * 48, 8 * 64, 3)  # enlarged to make names legible
    x1, y1 = (int(x) * 8 for x in target['boxes'][0, :2])
    assert tuple(drawn[y1, x1]) == class_color(int(target['labels'][0]))
    plain = np.asarray(draw_detections(image, detections.above(0.95)))
    enlarged = (F.interpolate(image[None], scale_factor=8, mode='bilinear')[0] * 255).round().to(torch.uint8)
    np.testing.assert_array_equal(plain, enlarged.permute(1, 2, 0).numpy())


def test_large_images_are_not_enlarged_and_long_ones_only_to_4000_pixels():
    for shape, size in (((3, 500, 600), (600, 500)), ((3, 3, 900), (3600, 12))):
        image = torch.rand(shape)
        assert draw_detections(image, NOTHING).size == size


def test_80_classes_have_different_colors_on_which_their_names_are_legible():
    colors = [class_color(label) for label in range(1, 81)]
    assert len(set(colors)) == 80
    assert class_color(81) == colors[0]
    for color in colors:
        light, dark = sorted((luminance(color), luminance(contrasting(color))), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, color  # as the WCAG asks of text


def luminance(color):
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in (value / 255 for value in color)]
    return np.dot((0.2126, 0.7152, 0.0722), linear)


def test_objects_have_the_colors_of_their_classes_and_masks_an_outline():
    masks = torch.zeros(3, 1, 500, 600)
    masks[0, :, :200, :200] = masks[1, :, 300:, 300:] = masks[2, :, :200, 300:500] = 1
    boxes = torch.tensor([[0.0, 0, 200, 200], [300, 300, 600, 500], [300, 0, 500, 200]])
    detections = {'boxes': boxes, 'labels': torch.tensor([1, 1, 2]), 'scores': torch.tensor([0.9, 0.8, 0.7])}
    detections = Detections.from_output(detections | {'masks': box_masks(masks)}, NAMES, (500, 600))
    drawn = draw_detections(torch.zeros(3, 500, 600), detections)
    for label, centre in [(1, (100, 100)), (1, (450, 400)), (2, (400, 100))]:
        assert drawn.getpixel(centre) == tuple(value // 2 for value in class_color(label))
    assert drawn.getpixel((198, 100)) == class_color(1)  # next to the line of the box


def test_names_stay_within_the_picture():
    boxes = torch.tensor([[590.0, 2, 599, 9], [0, 490, 9, 499], [-5, -5, 700, 700]])
    detections = Detections(boxes, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([1, 2, 3]), NAMES, (500, 600))
    drawn = np.asarray(draw_detections(torch.zeros(3, 500, 600), detections))
    for label in (1, 2, 3):
        assert (drawn == class_color(label)).all(axis=2).sum() > 300  # the ground of a name


def test_an_image_that_is_not_enlarged_is_not_interpolated(monkeypatch):
    monkeypatch.setattr(F, 'interpolate', lambda *_, **__: pytest.fail('interpolated'))
    image = torch.rand(3, 400, 500)
    drawn = np.asarray(draw_detections(image, NOTHING))
    np.testing.assert_array_equal(drawn, (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
