"""Masks within their boxes: pasting at pixel centres, run lengths."""

import sys
from math import ceil, floor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask

from detection.models.cascade import crop_masks
from detection.models.masks import BoxMasks
from tests.helpers.processes import start


def paste_into_canvases(masks, boxes, size):
    """Masks pasted into a canvas of the image's size each, (n, 1, H, W), fp32: much memory, one formula."""
    pasted = masks.new_zeros(len(masks), 1, *size, dtype=torch.float32)
    for canvas, mask, (x1, y1, x2, y2) in zip(pasted[:, 0], masks.float(), boxes.tolist(), strict=True):
        rows = range(max(ceil(y1 - 0.5), 0), min(floor(y2 - 0.5) + 1, size[0]))
        columns = range(max(ceil(x1 - 0.5), 0), min(floor(x2 - 0.5) + 1, size[1]))
        if not (rows and columns):
            continue
        y = (torch.arange(rows.start, rows.stop) + 0.5 - y1) / (y2 - y1) * 2 - 1
        x = (torch.arange(columns.start, columns.stop) + 0.5 - x1) / (x2 - x1) * 2 - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing='xy'), dim=-1)
        resampled = F.grid_sample(mask[None], grid[None], align_corners=False)[0, 0]
        canvas[rows.start : rows.stop, columns.start : columns.stop] = resampled
    return pasted


@pytest.fixture
def masks():
    """Smooth masks in 60 boxes of an image of 150 x 203 pixels; some boxes reach beyond it, are outside, or empty."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(60, 2, generator=generator) * torch.tensor([220.0, 170.0]) - 20
    boxes = torch.cat((corners, corners + 80 * torch.rand(60, 2, generator=generator) ** 2), dim=1)
    boxes[:4] = torch.tensor([[7, 7, 7, 9], [300, 9, 310, 20], [-9, -9, -1, -1], [0, 0, 203, 150]])
    noise = torch.rand(60, 1, 7, 7, generator=generator)
    return BoxMasks(F.interpolate(noise, size=(28, 28), mode='bilinear'), boxes, (150, 203))


def test_masks_are_those_of_a_canvas_each_to_the_bit(masks):
    expected = paste_into_canvases(masks.probabilities, masks.boxes, masks.size) > 0.5
    assert expected.flatten(1).any(dim=1).sum() > 40
    assert masks.dense().dtype == torch.bool
    assert torch.equal(masks.dense(), expected)
    chosen = torch.tensor([5, 3, 40])
    assert torch.equal(masks[chosen].dense(), expected[chosen])
    assert BoxMasks(masks.probabilities[:0], masks.boxes[:0], masks.size).dense().shape == (0, 1, 150, 203)


def test_run_lengths_are_those_of_the_whole_masks(masks):
    whole = masks.dense()[:, 0].numpy().astype(np.uint8).transpose(1, 2, 0)
    assert masks.rle() == coco_mask.encode(np.asfortranarray(whole))
    assert BoxMasks(masks.probabilities[:0], masks.boxes[:0], masks.size).rle() == []


def test_a_pasted_mask_has_the_size_of_its_box():
    rows, columns, mask = BoxMasks(torch.ones(1, 1, 28, 28), torch.tensor([[9.7, 3, 15.2, 90]]), (48, 64)).paste(0)
    assert (rows, columns) == (slice(3, 48), slice(10, 15))
    assert mask.shape == (45, 5)
    assert mask.all()
    _, _, mask = BoxMasks(torch.ones(1, 1, 28, 28), torch.tensor([[9e5, 5, 9e5 + 8, 12]]), (10**6, 10**6)).paste(0)
    assert mask.shape == (7, 8)


def test_a_mask_that_is_cropped_and_pasted_is_unchanged():
    """Small objects too, at boxes between pixels, as discs show."""
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing='ij')
    centres = torch.tensor([[10.0, 10.0, 5.0], [32.3, 20.6, 8.0], [45.5, 30.2, 16.0]])
    discs = torch.stack([(x + 0.5 - cx) ** 2 + (y + 0.5 - cy) ** 2 < radius**2 for cx, cy, radius in centres])
    boxes = torch.cat((centres[:, :2] - centres[:, 2:], centres[:, :2] + centres[:, 2:]), dim=1)
    cropped = crop_masks(discs, boxes, torch.arange(3), size=28)
    pasted = BoxMasks(cropped[:, None], boxes, (48, 64)).dense()[:, 0]
    ious = (pasted & discs).sum(dim=(1, 2)) / (pasted | discs).sum(dim=(1, 2))
    assert ious.tolist() == pytest.approx([1, 1, 1], abs=0.02)


def test_masks_cover_the_pixels_whose_centres_are_in_their_boxes():
    boxes = torch.tensor([[2.4, 1.6, 5.6, 4.4], [-3, -3, 2, 2], [60, 40, 80, 50], [7, 7, 7, 9], [70, 9, 80, 20]])
    pasted = BoxMasks(torch.ones(5, 1, 28, 28, dtype=torch.float16), boxes, (48, 64)).dense()
    covered = [((2, 4), (2, 6)), ((0, 2), (0, 2)), ((40, 48), (60, 64))]
    for mask, (rows, columns) in zip(pasted[:3, 0], covered, strict=True):
        inside = torch.zeros(48, 64, dtype=torch.bool)
        inside[slice(*rows), slice(*columns)] = True
        assert torch.equal(mask, inside)
    assert not pasted[3:].any()  # no width; outside


def test_masks_are_interpolated():
    left_half = torch.zeros(1, 1, 2, 2)
    left_half[..., 0] = 1  # 7/8, 5/8, 3/8 and 1/8 at columns 12 to 15
    _, columns, mask = BoxMasks(left_half, torch.tensor([[10.0, 10.0, 18.0, 18.0]]), (48, 64)).paste(0)
    assert mask[4].nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert columns == slice(10, 18)


PHOTO = """
import torch
from detection.detections import Detections
from detection.draw import draw_detections
from detection.models.masks import BoxMasks

def peak_mb():  # getrusage would count the process that started this one
    [line] = [line for line in open('/proc/self/status') if line.startswith('VmHWM')]
    return int(line.split()[1]) / 1024

corners = torch.rand(40, 2) * torch.tensor([2000, 1500])
boxes = torch.cat((corners, corners + torch.rand(40, 2) * torch.tensor([2000, 1500]) + 10), dim=1)
labels, scores = torch.ones(40, dtype=torch.int64), torch.full((40,), 0.9)
before = peak_mb()
image = torch.rand(3, 3000, 4000)
masks = BoxMasks(torch.rand(40, 1, 28, 28), boxes, (3000, 4000))
draw_detections(image, Detections(boxes, scores, labels, ['thing'] * 40, (3000, 4000), masks))
assert len(masks.rle()) == 40
print(peak_mb() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_forty_objects_in_a_large_photo_take_less_than_a_gigabyte():
    done = start('-c', PHOTO)
    assert done.returncode == 0, done.stderr
    assert 144 < float(done.stdout) < 1000  # the image alone takes 144 MB
