"""The confusion matrix, against counting by hand and by brute force."""

import itertools

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from detection.confusion import confusion_matrix, match_boxes

CATEGORIES = [{'id': 3, 'name': 'cat'}, {'id': 7, 'name': 'dog'}]


def entry(image, category, x, score=None, crowd=0):
    found = {'image_id': image, 'category_id': category, 'bbox': [x, 0, 10, 10]}
    return found | ({'iscrowd': crowd} if score is None else {'score': score})


def test_objects_are_right_wrong_missed_or_made_up():
    annotations = [entry(1, 3, 0), entry(1, 7, 100), entry(2, 7, 0), entry(3, 3, 0, crowd=1)]
    results = [
        entry(1, 3, 1, 0.9),  # right
        entry(1, 3, 101, 0.8),  # a dog taken for a cat
        entry(1, 7, 102, 0.4),  # the score is too low
        entry(2, 7, 40, 0.9),  # apart: one missed, one made up
        entry(3, 3, 4, 0.9),  # in a crowd region of its class: neither right nor made up
    ]
    counts = confusion_matrix({'categories': CATEGORIES, 'annotations': annotations}, results)
    assert counts.tolist() == [[1, 0, 0], [1, 0, 1], [0, 1, 0]]
    assert confusion_matrix({'categories': CATEGORIES, 'annotations': annotations}, []).tolist() == [
        [0, 0, 1], [0, 0, 2], [0, 0, 0]
    ]  # fmt: skip


def test_detections_in_crowd_regions_of_their_class_are_not_counted():
    region = entry(1, 3, 0, crowd=1) | {'bbox': [0, 0, 100, 100]}
    tree = {'categories': CATEGORIES, 'annotations': [region, entry(1, 3, 50)]}
    results = [
        entry(1, 3, 10, 0.9),  # in the region, although its IoU with it is low
        entry(1, 3, 80, 0.9),  # regions hold any number of detections
        entry(1, 3, 94, 0.9),  # half of it and more
        entry(1, 3, 96, 0.9),  # less than half: made up
        entry(1, 7, 30, 0.9),  # of another class: made up
        entry(1, 3, 50, 0.9),  # an object within the region is right
        entry(2, 3, 10, 0.9),  # another image
    ]
    counts = confusion_matrix(tree, results)
    assert counts.tolist() == [[1, 0, 0], [0, 0, 0], [2, 1, 0]]


@pytest.mark.parametrize('seed', range(20))
def test_boxes_are_matched_once_from_the_highest_iou_down(seed):
    rng = np.random.default_rng(seed)
    a, b = (torch.tensor(rng.uniform(0, 20, (n, 2)), dtype=torch.float32) for n in rng.integers(0, 6, 2))
    a, b = (torch.cat((x, x + 10), dim=1) for x in (a, b))
    iou, left_a, left_b, expected = box_iou(a, b), set(range(len(a))), set(range(len(b))), []
    while left_a and left_b:
        i, j = max(itertools.product(sorted(left_a), sorted(left_b)), key=lambda pair: iou[pair].item())
        if iou[i, j] < 0.5:
            break
        expected.append((i, j))
        left_a.remove(i)
        left_b.remove(j)
    assert match_boxes(a, b, 0.5) == expected
