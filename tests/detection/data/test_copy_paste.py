"""Copy-paste: what is pasted, and what becomes of the objects below it."""

import pytest
import torch

from detection.config import load_config
from detection.data.coco import CocoDataset
from detection.data.copy_paste import paste_objects
from detection.data.transforms import OBJECT_KEYS
from engine.config_tree import ConfigError
from tests.helpers.detectors import ground_truth
from tests.helpers.paths import TINY_DETECTOR


def picture(value, *boxes, label=1, size=(64, 64)):
    """A plain image with objects that fill their boxes."""
    target = ground_truth(*boxes, label=label, size=size)
    target['has_mask'] = torch.ones(len(boxes), dtype=torch.bool)
    return torch.full((3, *size), value), target


def paste(image, source):
    """`paste_objects`, after checking what always holds."""
    (pixels, target), (_, other) = image, source
    before = {key: x.clone() for key, x in target.items()}
    result, merged = paste_objects(pixels, target, *source)
    assert all(torch.equal(target[key], x) for key, x in before.items())  # not changed in place
    assert len({len(merged[key]) for key in OBJECT_KEYS}) == 1
    assert result.shape == pixels.shape
    for box, mask, has_mask in zip(merged['boxes'], merged['masks'], merged['has_mask'], strict=True):
        if has_mask:
            rows, columns = mask.nonzero().unbind(dim=1)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    new = merged['masks'][merged['labels'] == other['labels'][0]].any(dim=0).bool()
    assert torch.equal(result[0] == source[0][0, 0, 0], new)  # the objects alone are pasted
    return result, merged


def test_pasted_objects_hide_what_is_below_them():
    image = picture(0.2, (0, 0, 10, 10), (20, 20, 40, 40), (50, 0, 60, 10))
    source = picture(0.8, (0, 0, 10, 10), (20, 30, 45, 45), label=2)
    counts = set()
    for seed in range(20):
        torch.manual_seed(seed)
        _, merged = paste(image, source)
        assert merged['labels'].tolist() == [1] * (merged['labels'] == 1).sum() + [2] * (merged['labels'] == 2).sum()
        own, pasted = (merged['boxes'][merged['labels'] == label].tolist() for label in (1, 2))
        counts.add(len(pasted))
        assert [50, 0, 60, 10] in own
        assert ([0, 0, 10, 10] in own) != ([0, 0, 10, 10] in pasted)  # one of the same place is hidden, and dropped
        partly_hidden = [20, 30, 45, 45] in pasted
        assert ([20, 20, 40, 30] in own) == partly_hidden  # its box is that of what is left
        assert ([20, 20, 40, 40] in own) != partly_hidden
    assert counts == {1, 2}


@pytest.mark.parametrize('size', [(30, 100), (100, 30), (64, 64)])
def test_an_image_of_another_size_is_laid_over_at_a_random_position(size):
    image, places = picture(0.2, (0, 0, 64, 64)), set()
    for seed in range(20):
        torch.manual_seed(seed)
        _, merged = paste(image, picture(0.8, (2, 3, 22, 23), label=2, size=size))
        box = merged['boxes'][merged['labels'] == 2]
        places.add(tuple(box.flatten().tolist()))
    assert (len(places) > 5) == (size != (64, 64))
    assert all(x1 >= 0 and y1 >= 0 and x2 <= 64 and y2 <= 64 for x1, y1, x2, y2 in filter(None, places))


def test_objects_without_masks_stay_and_are_not_pasted():
    image, source = picture(0.2, (0, 0, 10, 10)), picture(0.8, (0, 0, 30, 30), (40, 40, 50, 50), label=2)
    for _, target in (image, source):
        target['has_mask'][0] = False
        target['masks'][0] = 0
    _, merged = paste(image, source)
    assert merged['boxes'].tolist() == [[0, 0, 10, 10], [40, 40, 50, 50]]
    assert merged['has_mask'].tolist() == [False, True]
    for _, target in (image, source):
        target['has_mask'][:] = False
    result, merged = paste_objects(*image, *source)
    assert torch.equal(result, image[0])
    assert merged['boxes'].tolist() == [[0, 0, 10, 10]]
    empty = picture(0.2)
    result, merged = paste_objects(*empty, *picture(0.8, (0, 0, 30, 30), label=2))
    assert merged['boxes'].tolist() == [[0, 0, 30, 30]]
    assert not paste_objects(*empty, *empty)[1]['boxes'].numel()


def test_a_dataset_pastes_with_its_probability_and_draws_nothing_without(coco):
    def samples(probability):
        dataset = CocoDataset(coco, 'train', is_train=True, copy_paste=probability)
        torch.manual_seed(0)
        return [dataset[i % 6] for i in range(60)], torch.rand(())

    (plain, after), (sometimes, _), (always, _) = samples(0.0), samples(0.5), samples(1.0)
    torch.manual_seed(0)
    assert after == torch.rand(())
    fractions = []
    for pasted in (sometimes, always):
        changed = [not torch.equal(image, x) for (image, _), (x, _) in zip(plain, pasted, strict=True)]
        fractions.append(sum(changed) / 60)
    assert 0.3 < fractions[0] < 0.7
    assert fractions[1] > 0.7  # one of six gets its own objects, where they are


def test_data_or_detectors_without_masks_are_refused(coco):
    with pytest.raises(ConfigError, match='INPUT.COPY_PASTE is 0.5, and MODEL.MASK.ENABLED is False.*COPY_PASTE 0'):
        load_config(TINY_DETECTOR, ['INPUT.COPY_PASTE', '0.5', 'MODEL.MASK.ENABLED', 'False'])
    with pytest.raises(ConfigError, match='INPUT.COPY_PASTE is 1.5: write a number between 0 and 1'):
        load_config(TINY_DETECTOR, ['INPUT.COPY_PASTE', '1.5'])
