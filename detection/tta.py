"""Test-time augmentation and tiling of a detector: several scales, flips and tiles, merged by NMS."""

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.ops import batched_nms
from yacs.config import CfgNode

from detection.data.transforms import resized_shape
from detection.models.build import Detector
from detection.models.masks import BoxMasks
from detection.tiles import Tile, Tiling, merge_indices

# What the network returns for an image, see `Detector.detect`
Output = dict[str, Tensor | BoxMasks]

DetectFn = Callable[[list[Tensor]], list[Output]]


def build_detect_fn(config: CfgNode, model: Detector, tiling: Tiling | None = None, batch_size: int = 1) -> DetectFn:
    """Build a function from images (3, H, W) in [0, 1] to detections, with the tiles and augmentation of `TEST`.

    An image's detections do not depend on the other images, except for rounding errors: only images that are resized to
    the same shape are batched, since padding to a common shape would change scores.

    Args:
        config: the config tree; `TEST`, `INPUT` and `MODEL.BOX` are read.
        model: in evaluation mode.
        tiling: how images are divided into tiles; None takes that of `TEST`.
        batch_size: tiles at a time.
    """
    detect, box = _build_view_fn(config, model), config.MODEL.BOX
    tiling = Tiling.of_config(config) if tiling is None else tiling
    if not tiling.size:
        return detect
    return lambda images: [detect_in_tiles(x, detect, tiling, batch_size, box.NMS_IOU, box.DETECTIONS) for x in images]


def _build_view_fn(config: CfgNode, model: Detector) -> DetectFn:
    """`build_detect_fn` without tiles."""
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


def detect_in_tiles(
    image: Tensor, detect: DetectFn, tiling: Tiling, batch_size: int, nms_iou: float, limit: int
) -> Output:
    """The best detections of all tiles of an image and, perhaps, of the whole image; see `merge_indices`.

    Args:
        image: (3, H, W), in [0, 1].
        detect: detects objects in tiles.
        tiling: how the image is divided; one that fits into a tile is seen whole.
        batch_size: tiles at a time.
        nms_iou: IoU threshold of NMS.
        limit: maximum number of detections.
    """
    size = tuple(image.shape[1:])
    tiles = tiling.tiles(*size)
    if len(tiles) == 1:
        return detect([image])[0]
    views, cut = [], []
    for first in range(0, len(tiles), batch_size):
        batch = tiles[first : first + batch_size]
        for tile, found in zip(batch, detect([tile.crop(image) for tile in batch]), strict=True):
            cut.append(tile.is_cut(found['boxes'], *size))
            views.append(offset(found, tile, size))
    if tiling.sees_whole:
        views += detect([image])
        cut.append(torch.zeros(len(views[-1]['boxes']), dtype=torch.bool, device=image.device))
    found = concatenate(views)
    kept = merge_indices(found['boxes'], found['scores'], found['labels'], torch.cat(cut), nms_iou)[:limit]
    return {key: x[kept] for key, x in found.items()}


def offset(detections: Output, tile: Tile, size: tuple[int, int]) -> Output:
    """Detections of a tile, in its image, of this height and width."""
    moved = detections | {'boxes': tile.offset(detections['boxes'])}
    if 'masks' in detections:
        moved['masks'] = BoxMasks(detections['masks'].probabilities, moved['boxes'], size)
    return moved


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
    found = concatenate(views)
    kept = batched_nms(found['boxes'], found['scores'], found['labels'], nms_iou)[:limit]
    return {key: x[kept] for key, x in found.items()}


def concatenate(views: Sequence[Output]) -> Output:
    """The detections of all views of an image, one after the other."""
    found: Output = {key: torch.cat([view[key] for view in views]) for key in ('boxes', 'labels', 'scores')}
    if 'masks' in views[0]:
        masks = [view['masks'] for view in views]
        found['masks'] = BoxMasks(torch.cat([x.probabilities for x in masks]), found['boxes'], masks[0].size)
    return found
