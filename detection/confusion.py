"""Confusion matrix of a detector's boxes, with missed objects and false detections."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torchvision.ops import box_area, box_convert, box_iou

BACKGROUND = 'background'


def confusion_matrix(
    ground_truth: dict[str, Any], results: Sequence[dict[str, Any]], min_score: float = 0.5, min_iou: float = 0.5
) -> np.ndarray:
    """Count how ground truth of each class is detected.

    In an image, pairs of an object and a detection are matched one to one, whatever their classes, from the highest IoU
    down. Crowd regions are not counted. As in COCO's metrics, neither is a detection that matches no object and has
    `min_iou` or more of its area in a crowd region of its class.

    Args:
        ground_truth: in COCO's annotation format.
        results: in COCO's result format.
        min_score: minimum score of a detection.
        min_iou: minimum IoU of a matched pair.

    Returns:
        (K + 1, K + 1): rows are the objects' classes, in the order of the categories, columns the detections'. The last
        column counts objects that are missed, the last row detections without an object.
    """
    labels = {category['id']: i for i, category in enumerate(ground_truth['categories'])}
    counts = np.zeros((len(labels) + 1, len(labels) + 1), dtype=np.int64)
    objects = _by_image(x for x in ground_truth['annotations'] if not x['iscrowd'])
    crowds = _by_image(x for x in ground_truth['annotations'] if x['iscrowd'])
    detections = _by_image(x for x in results if x['score'] >= min_score)
    for image_id in objects.keys() | detections.keys():
        ours, theirs = objects.get(image_id, []), detections.get(image_id, [])
        rows, columns = ([labels[x['category_id']] for x in entries] for entries in (ours, theirs))
        for i, j in match_boxes(_boxes(ours), _boxes(theirs), min_iou):
            counts[rows[i], columns[j]] += 1
            rows[i] = columns[j] = -1
        for row in rows:
            if row >= 0:
                counts[row, -1] += 1
        is_ignored = in_crowds(theirs, crowds.get(image_id, []), min_iou)
        for column, ignored in zip(columns, is_ignored, strict=True):
            if column >= 0 and not ignored:
                counts[-1, column] += 1
    return counts


def in_crowds(
    detections: Sequence[dict[str, Any]], crowds: Sequence[dict[str, Any]], min_fraction: float
) -> list[bool]:
    """Whether each detection of an image has this fraction of its area in the box of a crowd region of its class."""
    if not crowds:
        return [False] * len(detections)
    boxes, regions = _boxes(detections), _boxes(crowds)
    low = torch.maximum(boxes[:, None, :2], regions[:, :2])
    high = torch.minimum(boxes[:, None, 2:], regions[:, 2:])
    inside = (high - low).clamp(min=0).prod(dim=2)  # (n, m)
    ours, theirs = (torch.tensor([x['category_id'] for x in entries]) for entries in (detections, crowds))
    matches = (ours[:, None] == theirs) & (inside >= min_fraction * box_area(boxes)[:, None])
    return matches.any(dim=1).tolist()


def match_boxes(a: torch.Tensor, b: torch.Tensor, min_iou: float) -> list[tuple[int, int]]:
    """Pairs of boxes (n, 4) and (m, 4), each box in one at most, from the highest IoU down."""
    iou = box_iou(a, b)
    pairs = []
    for flat in iou.flatten().argsort(descending=True, stable=True).tolist():
        i, j = divmod(flat, len(b))
        if iou[i, j] < min_iou:
            break
        pairs.append((i, j))
    chosen, used_a, used_b = [], set(), set()
    for i, j in pairs:
        if i not in used_a and j not in used_b:
            chosen.append((i, j))
            used_a.add(i)
            used_b.add(j)
    return chosen


def _by_image(entries: Any) -> dict[Any, list[dict[str, Any]]]:
    grouped: dict[Any, list[dict[str, Any]]] = {}
    for entry in entries:
        grouped.setdefault(entry['image_id'], []).append(entry)
    return grouped


def _boxes(entries: list[dict[str, Any]]) -> torch.Tensor:
    boxes = torch.tensor([entry['bbox'] for entry in entries], dtype=torch.float32).view(-1, 4)
    return box_convert(boxes, 'xywh', 'xyxy')
