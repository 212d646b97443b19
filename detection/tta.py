"""Inference of a detector, perhaps with test-time augmentation: several sizes, and mirrored; merged by NMS."""

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.ops import batched_nms
from yacs.config import CfgNode

from detection.data.transforms import resized_shape
from detection.models.build import Detector
from detection.models.masks import BoxMasks

# What the network returns for an image, see `Detector.detect`
Output = dict[str, Tensor | BoxMasks]


def build_detect_fn(config: CfgNode, model: Detector) -> Callable[[list[Tensor]], list[Output]]:
    """A function from images (3, H, W) in [0, 1] to their detections, with the augmentation of `TEST`, if any.

    An image's detections do not depend on the others, but for rounding errors: only images that are resized to one
    shape are batched, as others would be padded to a common one, which changes scores.

    Args:
        config: the config tree; `TEST`, `INPUT` and `MODEL.BOX` are read.
        model: in evaluation mode.
    """
    shorts = config.TEST.SHORTS or [config.INPUT.TEST_SHORT]

    def detect_alike(images: Sequence[Tensor], short: int) -> list[Output]:
        by_shape = defaultdict(list)
        for i, image in enumerate(images):
            by_shape[resized_shape(*image.shape[1:], short, config.INPUT.MAX_LONG)].append(i)
        found: dict[int, Output] = {}
        for indices in by_shape.values():
            found |= zip(indices, model.detect([images[i] for i in indices], short), strict=True)
        return [found[i] for i in range(len(images))]

    if len(shorts) == 1 and not config.TEST.FLIP:
        return lambda images: detect_alike(images, shorts[0])

    def detect(images: list[Tensor]) -> list[Output]:
        views = []
        for short in shorts:
            views.append(detect_alike(images, short))
            if config.TEST.FLIP:
                mirrored = detect_alike([image.flip(2) for image in images], short)
                views.append([mirror(x, image.shape[2]) for x, image in zip(mirrored, images, strict=True)])
        box = config.MODEL.BOX
        return [merge(detections, box.NMS_IOU, box.DETECTIONS) for detections in zip(*views, strict=True)]

    return detect


def mirror(detections: Output, width: int) -> Output:
    """Detections of a mirrored image, in the image itself, of this width in pixels."""
    x1, y1, x2, y2 = detections['boxes'].unbind(dim=1)
    mirrored = detections | {'boxes': torch.stack((width - x2, y1, width - x1, y2), dim=1)}
    if 'masks' in detections:
        masks = detections['masks']
        mirrored['masks'] = BoxMasks(masks.probabilities.flip(3), mirrored['boxes'], masks.size)
    return mirrored


def merge(views: tuple[Output, ...], nms_iou: float, limit: int) -> Output:
    """The best detections of all views of an image: NMS within each class, then those with the highest scores."""
    merged: Output = {key: torch.cat([view[key] for view in views]) for key in ('boxes', 'labels', 'scores')}
    if 'masks' in views[0]:
        masks = [view['masks'] for view in views]
        merged['masks'] = BoxMasks(torch.cat([x.probabilities for x in masks]), merged['boxes'], masks[0].size)
    kept = batched_nms(merged['boxes'], merged['scores'], merged['labels'], nms_iou)[:limit]
    return {key: x[kept] for key, x in merged.items()}
