"""Images before the detector, and detections after it."""

import pytest
import torch

from detection.models import build_detector
from detection.models.cascade import crop_masks
from detection.models.transform import paste_masks
from tests.helpers.detectors import ground_truth, tiny_detector


def test_a_mask_that_is_cropped_and_pasted_is_unchanged():
    """Small objects too, at boxes between pixels, as discs show."""
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing='ij')
    centres = torch.tensor([[10.0, 10.0, 5.0], [32.3, 20.6, 8.0], [45.5, 30.2, 16.0]])
    discs = torch.stack([(x + 0.5 - cx) ** 2 + (y + 0.5 - cy) ** 2 < radius**2 for cx, cy, radius in centres])
    boxes = torch.cat((centres[:, :2] - centres[:, 2:], centres[:, :2] + centres[:, 2:]), dim=1)
    cropped = crop_masks(discs, boxes, torch.arange(3), size=28)
    pasted = paste_masks(cropped[:, None], boxes, (48, 64))[:, 0] > 0.5
    ious = (pasted & discs).sum(dim=(1, 2)) / (pasted | discs).sum(dim=(1, 2))
    assert ious.tolist() == pytest.approx([1, 1, 1], abs=0.02)


def test_masks_cover_the_pixels_whose_centres_are_in_their_boxes():
    boxes = torch.tensor([[2.4, 1.6, 5.6, 4.4], [-3, -3, 2, 2], [60, 40, 80, 50], [7, 7, 7, 9], [70, 9, 80, 20]])
    pasted = paste_masks(torch.ones(5, 1, 28, 28, dtype=torch.float16), boxes, (48, 64))
    assert pasted.dtype == torch.float32
    covered = [((2, 4), (2, 6)), ((0, 2), (0, 2)), ((40, 48), (60, 64))]
    for mask, (rows, columns) in zip(pasted[:3, 0], covered, strict=True):
        inside = torch.zeros(48, 64, dtype=torch.bool)
        inside[slice(*rows), slice(*columns)] = True
        assert torch.equal(mask > 0.5, inside)
    assert not pasted[3:].any()  # no width; outside
    left_half = torch.zeros(1, 1, 2, 2)
    left_half[..., 0] = 1
    (values,) = paste_masks(left_half, torch.tensor([[10.0, 10.0, 18.0, 18.0]]), (48, 64))[0]
    assert values[14, 12:16].tolist() == pytest.approx([1 - 1 / 8, 1 - 3 / 8, 1 - 5 / 8, 1 - 7 / 8])


def test_evaluation_resizes_images_and_maps_detections_back_and_training_does_not():
    model = build_detector(tiny_detector('MODEL.BOX.SCORE', '0.0')).eval()
    shapes = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    images = [torch.rand(3, 32, 40), torch.rand(3, 100, 30)]
    with torch.inference_mode():
        results = model(images)
    assert shapes == [(2, 3, 128, 96)]  # 64 x 80 and 100 x 30, which the long side bounds, in multiples of 32
    for image, detections in zip(images, results, strict=True):
        height, width = image.shape[1:]
        n = len(detections['boxes'])
        assert 0 < n <= 10
        assert detections['masks'].shape == (n, 1, height, width)
        assert ((detections['masks'] >= 0) & (detections['masks'] <= 1)).all()
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
