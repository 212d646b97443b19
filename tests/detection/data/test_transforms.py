"""Augmentation: boxes and masks follow the image."""

import pytest
import torch

from detection.config import load_config
from detection.data.transforms import TrainTransform, flip, random_crop, resize, scale_jitter
from engine.config_tree import ConfigError
from tests.helpers.paths import DETECTION_CONFIGS, TINY_DETECTOR


def square(height=30, width=40, top=6, left=10, size=8):
    """An image whose only object is a bright square."""
    image, mask = torch.zeros(3, height, width), torch.zeros(1, height, width, dtype=torch.uint8)
    image[:, top : top + size, left : left + size] = mask[:, top : top + size, left : left + size] = 1
    boxes = torch.tensor([[left, top, left + size, top + size]], dtype=torch.float32)
    return image, {'boxes': boxes, 'labels': torch.tensor([2]), 'masks': mask, 'image_id': 7}


def box_of(mask):
    rows, columns = mask.nonzero().unbind(dim=1)
    return torch.stack((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)).float()


def test_flip_mirrors_image_boxes_and_masks():
    image, target = flip(*square())
    assert target['boxes'].tolist() == [[22, 6, 30, 14]]
    assert torch.equal(box_of(target['masks'][0]), target['boxes'][0])
    assert torch.equal(image[0].bool(), target['masks'][0].bool())
    _, original = flip(image, target)
    assert torch.equal(original['boxes'], square()[1]['boxes'])


@pytest.mark.parametrize(
    ('short', 'long', 'size'), [(60, 1000, (60, 80)), (60, 60, (45, 60)), (15, 1000, (15, 20)), (30, 40, (30, 40))]
)
def test_resize_keeps_the_aspect_ratio_and_bounds_the_long_side(short, long, size):
    image, target = resize(*square(), short, long)
    assert tuple(image.shape[1:]) == tuple(target['masks'].shape[1:]) == size
    torch.testing.assert_close(target['boxes'], square()[1]['boxes'] * size[0] / 30)
    assert (box_of(target['masks'][0]) - target['boxes'][0]).abs().max() <= 0.5  # a mask has whole pixels
    assert ((image[0] > 0.5) == target['masks'][0].bool()).float().mean() > 0.98


def test_random_crop_keeps_the_objects_inside():
    whole, target = square()
    whole[0] = torch.arange(30 * 40).view(30, 40)  # pixel indices
    sizes, counts = set(), set()
    for seed in range(60):
        torch.manual_seed(seed)
        image, cropped = random_crop(whole, target, 8, 20)
        height, width = image.shape[1:]
        top, left = divmod(int(image[0, 0, 0]), 40)
        assert torch.equal(image, whole[:, top : top + height, left : left + width])
        sizes |= {height, width}
        counts.add(len(cropped['boxes']))
        mask = target['masks'][0, top : top + height, left : left + width]
        if mask.any():
            assert torch.equal(cropped['boxes'][0], box_of(mask))
            assert torch.equal(cropped['masks'][0], mask)
            assert cropped['labels'].tolist() == [2]
        else:
            assert cropped['boxes'].shape == (0, 4)
            assert cropped['masks'].shape == (0, height, width)
    assert (min(sizes), max(sizes)) == (8, 20)
    assert counts == {0, 1}
    image, _ = random_crop(*square(5, 60, 0, 0, 4), 8, 20)
    assert image.shape[1] == 5  # no larger than the image


def test_training_augmentation_is_the_published_one():
    config = load_config(DETECTION_CONFIGS / 'cascade_mask_rcnn_msg_tiny_3x.yaml')
    assert (config.INPUT.CROP_RESIZE, config.INPUT.CROP_SIZE) == ([400, 500, 600], [384, 600])
    transform = TrainTransform(config)
    short_sides, uncropped, empty = set(), 0, 0
    for seed in range(80):
        torch.manual_seed(seed)
        image, target = transform(*square(375, 500, 60, 100, 40))
        short_sides.add(min(image.shape[1:]))
        assert max(image.shape[1:]) <= 1333
        uncropped += abs(image.shape[2] / image.shape[1] - 500 / 375) < 0.01
        empty += len(target['boxes']) == 0
        assert target['masks'].shape[1:] == image.shape[1:]
    assert short_sides <= set(range(480, 801, 32))
    assert len(short_sides) >= 8
    assert 25 <= uncropped <= 60  # about half
    assert empty < 40


def test_large_scale_jitter_keeps_boxes_on_their_masks():
    mask, counts, sizes = torch.zeros(1, 240, 320, dtype=torch.uint8), set(), []
    for row in range(40):  # a triangle, whose box shrinks when its wide end is cut
        mask[0, 10 + row, 10 : 11 + 2 * row] = 1
    whole, target = mask.expand(3, -1, -1).float(), {'boxes': box_of(mask[0])[None], 'masks': mask}
    target |= {'labels': torch.tensor([2]), 'has_mask': torch.tensor([True])}
    for seed in range(60):
        torch.manual_seed(seed)
        image, jittered = scale_jitter(whole, target, 256, 0.1, 3.0)
        sizes.append(max(image.shape[1:]))
        assert jittered['masks'].shape[1:] == image.shape[1:]
        counts.add(len(jittered['boxes']))
        for box, mask in zip(jittered['boxes'], jittered['masks'], strict=True):
            assert (box_of(mask) - box).abs().max() <= 2  # a small triangle loses its tips
            assert ((image[0] > 0.5) == mask.bool()).float().mean() > 0.9
    assert counts == {0, 1}
    assert min(sizes) < 60
    assert max(sizes) == 256  # cropped
    assert 10 < sum(size < 256 for size in sizes) < 28  # 19 on average

    torch.manual_seed(0)  # without masks, boxes are clipped
    _, jittered = scale_jitter(whole, {key: target[key] for key in ('boxes', 'labels')}, 256, 1.0, 1.0)
    assert jittered['boxes'].tolist() == [pytest.approx([10 * 0.8, 10 * 0.8, 89 * 0.8, 50 * 0.8])]


def test_large_scale_jitter_replaces_the_crop_and_the_resize():
    config = load_config(TINY_DETECTOR, ['INPUT.SCALE_JITTER', '[0.5,2.0]', 'INPUT.JITTER_SIZE', '90'])
    transform, sizes = TrainTransform(config), set()
    for seed in range(30):
        torch.manual_seed(seed)
        image, _ = transform(*square(30, 40))
        sizes.add(tuple(image.shape[1:]))
    assert len(sizes) > 10
    assert 45 <= min(max(size) for size in sizes) <= 60
    assert max(max(size) for size in sizes) == 90
    for value in ('[2.0,0.1]', '[1.0]'):
        with pytest.raises(ConfigError, match='INPUT.SCALE_JITTER is .*: write two numbers, the smaller first'):
            load_config(TINY_DETECTOR, ['INPUT.SCALE_JITTER', value])
