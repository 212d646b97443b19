"""Test-time augmentation: views, mirroring, merging."""

import pytest
import torch

from detection.models import build_detector
from detection.models.masks import BoxMasks
from detection.tta import build_detect_fn, merge, mirror
from tests.helpers.detectors import tiny_detector


def detections(boxes, labels, scores, masks=True, size=(40, 60)):
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    found = {'boxes': boxes, 'labels': torch.tensor(labels), 'scores': torch.tensor(scores)}
    if masks:
        found['masks'] = BoxMasks(torch.rand(len(boxes), 1, 28, 28), boxes, size)
    return found


def test_mirrored_detections_are_those_of_the_mirrored_image():
    own = detections([[2, 3, 12, 20], [30, 0, 60, 40]], [1, 2], [0.9, 0.8])
    twice = mirror(mirrored := mirror(own, 60), 60)
    assert mirrored['boxes'].tolist() == [[48, 3, 58, 20], [0, 0, 30, 40]]
    assert torch.equal(twice['boxes'], own['boxes'])
    assert torch.equal(mirrored['masks'].dense(), own['masks'].dense().flip(3))


@pytest.mark.parametrize('masks', [True, False])
def test_merging_keeps_the_best_of_each_object(masks):
    one = detections([[0, 0, 10, 10], [20, 20, 30, 30]], [1, 1], [0.5, 0.9], masks)
    two = detections([[0, 0, 10, 11], [0, 0, 10, 10], [40, 0, 50, 10]], [1, 2, 1], [0.8, 0.4, 0.3], masks)
    best = merge((one, two), 0.5, 10)
    assert best['scores'].tolist() == pytest.approx([0.9, 0.8, 0.4, 0.3])
    assert best['labels'].tolist() == [1, 1, 2, 1]
    assert best['boxes'][1].tolist() == [0, 0, 10, 11]
    if masks:
        assert torch.equal(best['masks'].probabilities[1], two['masks'].probabilities[0])
        assert torch.equal(best['masks'].boxes, best['boxes'])
    assert len(merge((one, two), 0.5, 2)['boxes']) == 2
    assert ('masks' in best) == masks


@torch.no_grad()
def test_without_augmentation_detections_are_the_models():
    config = tiny_detector('MODEL.BOX.SCORE', '0.0')
    model, images = build_detector(config).eval(), [torch.rand(3, 50, 70)]
    plain, [found] = model.detect(images)[0], build_detect_fn(config, model)(images)
    assert all(torch.equal(plain[key], found[key]) for key in ('boxes', 'labels', 'scores'))
    small = tiny_detector('MODEL.BOX.SCORE', '0.0', 'TEST.SHORTS', '[48]')
    other = tiny_detector('MODEL.BOX.SCORE', '0.0', 'INPUT.TEST_SHORT', '48')
    same = build_detector(other).eval()
    same.load_state_dict(model.state_dict())
    assert torch.equal(build_detect_fn(small, model)(images)[0]['boxes'], same.detect(images)[0]['boxes'])
    assert model.transform.min_size == (64,)


@torch.no_grad()
def test_a_mirrored_image_has_the_mirrored_detections():
    config = tiny_detector('MODEL.BOX.SCORE', '0.0', 'TEST.FLIP', 'True', 'TEST.SHORTS', '[48, 64]')
    detect = build_detect_fn(config, build_detector(config).eval())
    image = torch.rand(3, 64, 64)
    [own], [other] = detect([image]), detect([image.flip(2)])
    expected = mirror(other, 64)
    torch.testing.assert_close(own['scores'], expected['scores'])
    order, theirs = (x['boxes'][x['scores'].argsort(stable=True)].sort(dim=0).values for x in (own, expected))
    torch.testing.assert_close(order, theirs, atol=1e-3, rtol=1e-3)
    assert len(own['boxes']) <= config.MODEL.BOX.DETECTIONS


@torch.no_grad()
@pytest.mark.parametrize('opts', [(), ('TEST.FLIP', 'True', 'TEST.SHORTS', '[48, 64]')])
def test_detections_do_not_depend_on_the_other_images_of_a_batch(opts):
    config = tiny_detector('MODEL.BOX.SCORE', '0.0', *opts)
    detect = build_detect_fn(config, build_detector(config).eval())
    sizes = [(50, 70), (70, 50), (100, 140), (50, 70), (64, 64)]  # 100 x 140 is resized as 50 x 70 is
    images = [torch.rand(3, *size) for size in sizes]
    for together, image in zip(detect(images), images, strict=True):
        [alone] = detect([image])
        for key in ('boxes', 'labels', 'scores'):
            torch.testing.assert_close(together[key], alone[key], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(together['masks'].probabilities, alone['masks'].probabilities, atol=1e-4, rtol=1e-4)
