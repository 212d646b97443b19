"""COCO's annotation format: a file is checked when it is read, before any work is lost.

Shapes: n objects, an image of H x W pixels.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from data import DataError

# What these keys hold, in whatever part of a file.
_TYPES = {'id': int, 'image_id': int, 'category_id': int, 'width': int, 'height': int, 'file_name': str, 'name': str}

# What the parts of a file must say of each of their entries.
_KEYS = {
    'images': ('id', 'file_name', 'width', 'height'),
    'categories': ('id', 'name'),
    'annotations': ('image_id', 'category_id', 'bbox', 'segmentation'),
}


def read_annotations(path: Path) -> dict[str, Any]:
    """Read a file of images, categories and annotations.

    What pycocotools wants and files of other programs may lack is filled in: `info`, `iscrowd`, `area`. Annotations
    are numbered anew, from 1, since pycocotools takes the number 0 for "not found".

    Raises:
        DataError: it cannot be read, or an entry of it cannot be used; the message names it.
    """
    tree = _read_json(path)
    for part, keys in _KEYS.items():
        if not isinstance(tree.get(part), list) or not all(isinstance(entry, dict) for entry in tree[part]):
            raise DataError(f'annotation file {path} has no list "{part}": it is not in the format of COCO instances')
        for number, entry in enumerate(tree[part]):
            if missing := [key for key in keys if key not in entry]:
                raise DataError(f'{path}: entry {number} of "{part}" has no {", ".join(missing)}: add it')
            if wrong := [key for key in _TYPES.keys() & entry.keys() if not _is_a(entry[key], _TYPES[key])]:
                kind = 'text' if _TYPES[wrong[0]] is str else 'a whole number'
                raise DataError(
                    f'{path}: entry {number} of "{part}" has the {wrong[0]} {entry[wrong[0]]!r}: write {kind}'
                )
    for part in ('images', 'categories'):
        if not tree[part]:
            raise DataError(f'annotation file {path} has no {part}')
        if double := _first_double(entry['id'] for entry in tree[part]):
            raise DataError(f'{path}: two of the {part} have the id {double[0]}: give each its own')
    for image in tree['images']:
        if not min(image['width'], image['height']) > 0:
            raise DataError(f'{path}: image {image["file_name"]} has no width and height in pixels: write them')
    images = {image['id']: image for image in tree['images']}
    categories = {category['id'] for category in tree['categories']}
    for number, annotation in enumerate(tree['annotations'], start=1):
        where = f'{path}: annotation {annotation.get("id", number)}'
        if annotation['image_id'] not in images:
            raise DataError(f'{where} is of image {annotation["image_id"]}, which is not among the images: remove it')
        if annotation['category_id'] not in categories:
            raise DataError(
                f'{where} is of category {annotation["category_id"]}, which is not among the categories: add it there'
            )
        image = images[annotation['image_id']]
        _check_shapes(annotation, image, f'{where}, of {image["file_name"]},')
        annotation['id'] = number
        if annotation.setdefault('iscrowd', 0) not in (0, 1):
            raise DataError(f'{where} has iscrowd {annotation["iscrowd"]!r}: write 0 or 1')
        if 'area' in annotation:
            if not (_are_numbers([annotation['area']]) and annotation['area'] >= 0):
                raise DataError(
                    f'{where} has the area {annotation["area"]!r}: write the pixels of its mask, or leave it out'
                )
        else:
            annotation['area'] = float(coco_mask.area(to_rle(annotation['segmentation'], image)))
    tree.setdefault('info', {})
    return tree


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(
            f'annotation file {path} cannot be read ({error.strerror}): give --data-path the folder that holds '
            f'annotations/instances_<split>.json and the images in <split>/'
        ) from error
    except ValueError as error:
        raise DataError(f'annotation file {path} is not JSON ({error}): replace it') from error
    return tree if isinstance(tree, dict) else {}


def _first_double(values: Iterable[Any]) -> list[Any]:
    """The first value that comes again, in a list; empty if there is none."""
    seen = set()
    return next(([value] for value in values if value in seen or seen.add(value)), [])


def _check_shapes(annotation: dict[str, Any], image: dict[str, Any], where: str) -> None:
    """Refuse a box or mask that is none."""
    box, shape = annotation['bbox'], annotation['segmentation']
    if not (_are_numbers(box) and len(box) == 4 and box[2] >= 0 and box[3] >= 0):
        raise DataError(f'{where} has the box {box}: write [x, y, width, height] in pixels, or remove it')
    if isinstance(shape, dict):
        counts, size = shape.get('counts'), [image['height'], image['width']]
        runs = _run_lengths(counts) if isinstance(counts, str) else counts
        are_runs = isinstance(runs, list) and all(_is_a(run, int) and run >= 0 for run in runs)
        if not (are_runs and sum(runs) == size[0] * size[1]) or shape.get('size') != size:
            raise DataError(
                f'{where} has a mask of size {shape.get("size")}: write "size" as the image\'s [height, width], '
                f'{size}, and as many pixels in "counts"'
            )
        return
    if isinstance(shape, list) and all(_are_numbers(polygon) and len(polygon) % 2 == 0 for polygon in shape):
        for first, side in enumerate((image['width'], image['height'])):
            places = [
                place for polygon in shape if polygon for place in (min(polygon[first::2]), max(polygon[first::2]))
            ]
            if far := [place for place in places if not -side <= place <= 2 * side]:  # would fill pycocotools' memory
                raise DataError(
                    f'{where} has a corner at {far[0]}, far outside of the image: move it, or remove the mask'
                )
        # One of two corners has no area, and pycocotools would take it for a box.
        annotation['segmentation'] = shape = [polygon for polygon in shape if len(polygon) >= 6]
    else:
        shape = []
    if not shape:
        raise DataError(
            f'{where} has no mask: write its "segmentation" as polygons of three or more corners, or run lengths'
        )


def _run_lengths(text: str) -> list[int]:
    """The run lengths in COCO's compressed form; -1 of what is not in it.

    Each is in characters of five bits, lowest first, and from the fourth on the difference to the last but one.
    """
    runs: list[int] = []
    value = bits = 0
    for code in (ord(character) - 48 for character in text):
        if not 0 <= code < 64 or bits > 40:
            return [-1]
        value |= (code & 31) << bits
        bits += 5
        if not code & 32:  # the last of a number
            value -= (1 << bits) if code & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = bits = 0
    return [-1] if bits else runs


def _is_a(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(x, int | float) and math.isfinite(x) for x in values)


def to_rle(segmentation: Any, image: dict[str, Any]) -> dict[str, Any]:
    """A mask as pycocotools' compressed run lengths.

    Args:
        segmentation: polygons, or run lengths, compressed or not.
        image: the entry of its image.
    """
    height, width = image['height'], image['width']
    if isinstance(segmentation, list):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    if isinstance(segmentation['counts'], list):
        return coco_mask.frPyObjects(segmentation, height, width)
    return segmentation


def clipped_boxes(annotations: list[dict[str, Any]], image: dict[str, Any]) -> Tensor:
    """The objects' boxes (n, 4) as x1, y1, x2, y2, as far as they are inside the image."""
    boxes = torch.tensor([annotation['bbox'] for annotation in annotations], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes[:, 0::2] = boxes[:, 0::2].clamp(0, image['width'])
    boxes[:, 1::2] = boxes[:, 1::2].clamp(0, image['height'])
    return boxes


def has_area(annotation: dict[str, Any], image: dict[str, Any]) -> bool:
    """Whether a pixel or more of the box's width and height is inside the image, so that it can be learned."""
    x, y, width, height = annotation['bbox']
    inside = min(x + width, image['width']) - max(x, 0), min(y + height, image['height']) - max(y, 0)
    return min(inside) >= 1


def decode_masks(annotations: list[dict[str, Any]], image: dict[str, Any]) -> Tensor:
    """The objects' masks as bytes, 0 or 1, (n, H, W)."""
    if not annotations:
        return torch.zeros(0, image['height'], image['width'], dtype=torch.uint8)
    masks = coco_mask.decode([to_rle(annotation['segmentation'], image) for annotation in annotations])  # (H, W, n)
    return torch.from_numpy(np.ascontiguousarray(masks.transpose(2, 0, 1)))
