"""Images before the detector, and detections after it."""

import torch

from detection.models import build_detector
from tests.helpers.detectors import ground_truth, tiny_detector


def test_evaluation_resizes_images_and_maps_detections_back_and_training_does_not():
    model = build_detector(tiny_detector('MODEL.BOX.SCORE', '0.0')).eval()
    shapes = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    images = [torch.rand(3, 32, 40), torch.rand(3, 100, 30)]
    with torch.inference_mode():
        results = model(images)
        lazy = model.detect(images)
    for whole, detections in zip(results, lazy, strict=True):
        assert torch.equal(detections['masks'].dense(), whole['masks'])
        assert torch.equal(detections['boxes'], whole['boxes'])
    assert shapes.pop() == shapes[0]
    assert shapes == [(2, 3, 128, 96)]  # 64 x 80 and 100 x 30, which the long side bounds, in multiples of 32
    for image, detections in zip(images, results, strict=True):
        height, width = image.shape[1:]
        n = len(detections['boxes'])
        assert 0 < n <= 10
        assert detections['masks'].shape == (n, 1, height, width)
        assert detections['masks'].dtype == torch.bool
        assert set(detections['labels'].tolist()) <= {1, 2, 3}
        assert torch.equal(detections['scores'].sort(descending=True)[0], detections['scores'])
        assert (detections['boxes'] >= 0).all()
        assert (detections['boxes'][:, 2] <= width).all()
        assert (detections['boxes'][:, 3] <= height).all()
    model.train()
    model(images, [ground_truth((1, 1, 20, 20), size=(32, 40)), ground_truth(size=(100, 30))])
    assert shapes[-1] == (2, 3, 128, 64)


def test_images_without_detections_have_empty_results():
    model = build_detector(tiny_detector('MODEL.BOX.SCORE', '1.0')).eval()
    with torch.inference_mode():
        results = model([torch.rand(3, 32, 40), torch.rand(3, 100, 30)])
    assert [len(detections['boxes']) for detections in results] == [0, 0]
    assert results[1]['masks'].shape == (0, 1, 100, 30)


def test_an_image_one_pixel_high_is_evaluated():
    detector = build_detector(tiny_detector()).eval()
    with torch.inference_mode():
        (detections,) = detector([torch.rand(3, 1, 2000)])
    assert detections['masks'].shape[2:] == (1, 2000)
