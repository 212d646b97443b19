"""Configs and ground truth of tiny detectors."""

import torch
from torch import Tensor
from yacs.config import CfgNode

from detection.config import load_config
from detection.models.masks import BoxMasks
from tests.helpers.paths import TINY_DETECTOR

NAMES = ['box', 'wedge', 'rare']  # classes of `write_coco`
STRIDES = (4, 8, 16, 32)  # of the levels that RoIs are pooled from

ONE_EPOCH = ('TRAIN.EPOCHS', '1', 'TRAIN.LR_SCHEDULER.DECAY_EPOCHS', '[]')
ALL = ('MODEL.BOX.SCORE', '0.0')  # an untrained network is sure of nothing
NO_DROP_PATH = ('MODEL.DROP_PATH_RATE', '0')


def tiny_detector(*opts: object) -> CfgNode:
    """The config of a detector with three classes and three stages."""
    return load_config(TINY_DETECTOR, opts)


def ground_truth(*boxes: tuple[int, ...], label: int = 1, size: tuple[int, int] = (64, 64)) -> dict[str, Tensor]:
    """An image's target: boxes that their masks fill."""
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = 1
    labels = torch.full((len(boxes),), label)
    return {'boxes': torch.tensor(boxes, dtype=torch.float32).view(-1, 4), 'labels': labels, 'masks': masks}


def perfect_detections(target: dict[str, Tensor]) -> dict[str, Tensor]:
    """An image's objects as detections with scores of 0.9."""
    return {
        'boxes': target['boxes'],
        'labels': target['labels'],
        'scores': torch.full((len(target['labels']),), 0.9),
        'masks': target['masks'][:, None].float(),
    }


def no_detections(target: dict[str, Tensor]) -> dict[str, Tensor]:
    """Detections of an image where nothing is found."""
    return {key: x[:0] for key, x in perfect_detections(target).items()}


def box_masks(masks: Tensor) -> BoxMasks:
    """Masks (n, 1, H, W) of 0 and 1 in boxes that cover the image."""
    height, width = masks.shape[2:]
    boxes = torch.tensor([[0.0, 0, width, height]]).expand(len(masks), 4)
    return BoxMasks(masks, boxes, (height, width))
