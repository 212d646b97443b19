"""COCO's annotation format: a file is checked when it is read, before any work is lost.

Shapes: n objects, an image of H x W pixels.
"""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from data import DataError
from detection.data.annotation_checks import (
    PlacementCheck,
    are_numbers,
    check_box,
    check_mask,
    has_no_area,
    is_a,
    whole_number,
)
from text_files import read_json

# Keys that the entries of each section must have, and their types. Keys that nothing reads may be of any type.
_KEYS = {
    'images': {'id': int | str, 'file_name': str, 'width': int, 'height': int},
    'categories': {'id': int, 'name': str},
    'annotations': {'image_id': int | str, 'category_id': int, 'bbox': object},
}

_MAX_PIXELS = 178_956_970  # of an image: PIL refuses to decode larger ones


def read_annotations(path: Path, with_masks: bool = True, needs_objects: bool = True) -> dict[str, Any]:
    """Read a file of images, categories and annotations.

    Keys that pycocotools needs and other programs may leave out are filled in: `info`, `iscrowd`, `area`. Annotations
    are renumbered from 1, since pycocotools takes the id 0 for "not found", and images where an id is a text. `notes`
    for the log and `is_labelled` are added. Where an annotation has no mask, `segmentation` is missing.

    Args:
        path: the file.
        with_masks: read the masks too; some annotations must have one.
        needs_objects: refuse a file without a section of annotations, such as COCO's `image_info_test-dev2017.json`.

    Raises:
        DataError: it cannot be read, or has an invalid entry; the message names it.
    """
    tree = read_tree(path)
    tree['is_labelled'] = needs_objects or 'annotations' in tree
    if not tree['is_labelled']:
        tree['annotations'] = []
    _check_sections(tree, path)
    images = {image['id']: image for image in tree['images']}
    has_text_ids = _number_images(tree['images'])
    categories = {category['id'] for category in tree['categories']}
    placement, without_mask, without_area = PlacementCheck(), 0, []
    for number, annotation in enumerate(tree['annotations'], start=1):
        label = f'{path}: annotation {str(annotation.get("id", number))[:80]}'
        if annotation['image_id'] not in images:
            raise DataError(f'{label} is of image {annotation["image_id"]}, which is not among the images: remove it')
        if annotation['category_id'] not in categories:
            raise DataError(
                f'{label} is of category {annotation["category_id"]}, which is not among the categories: add it there'
            )
        image = images[annotation['image_id']]
        label_of_image = f'{label}, of {image["file_name"]},'
        check_box(annotation, label_of_image)
        segmentation = annotation.get('segmentation')
        is_flat = with_masks and bool(segmentation) and has_no_area(segmentation)
        if is_flat:
            without_area.append(label_of_image)
        if not with_masks or segmentation in (None, [], {}) or is_flat:
            annotation.pop('segmentation', None)
            without_mask += 1
            extent = [0.0] * 4
        else:
            extent = check_mask(annotation, image, label_of_image)
        annotation |= {'id': number, 'image_id': image['id']}
        if annotation.setdefault('iscrowd', 0) not in (0, 1):
            raise DataError(f'{label} has iscrowd {annotation["iscrowd"]!r}: write 0 or 1')
        annotation['iscrowd'] = int(annotation['iscrowd'])
        if annotation.get('area') is None:
            annotation['area'] = _area(annotation, image)
        elif not (are_numbers([annotation['area']]) and annotation['area'] >= 0):
            raise DataError(
                f'{label} has the area {annotation["area"]!r}: write the pixels of its mask, or leave it out'
            )
        placement.add(annotation, image, extent, label_of_image)
    tree.setdefault('info', {})
    tree['notes'] = placement.finish()
    if has_text_ids:
        tree['notes'].append('ids of images are texts: results have numbers instead, from 1 in the order of the file')
    count = len(tree['annotations'])
    if without_mask and with_masks:
        if without_mask == count:
            raise DataError(f'{path}: no annotation has a mask: write --opts MODEL.MASK.ENABLED False for boxes alone')
        tree['notes'].append(f'{without_mask} of {count} annotations have no mask, and count for boxes alone')
    if without_area:
        tree['notes'].append(
            f'{len(without_area)} of them have polygons of fewer than three corners, such as {without_area[0][:-1]}'
        )
    return tree


def _number_images(images: list[dict[str, Any]]) -> bool:
    """Give images numbers as ids where some id is a text, as evaluators need them; returns whether it is so."""
    has_text_ids = any(isinstance(image['id'], str) for image in images)
    for number, image in enumerate(images, start=1):
        image['id'] = number if has_text_ids else image['id']
    return has_text_ids


def _area(annotation: dict[str, Any], image: dict[str, Any]) -> float:
    """Pixels of an annotation's mask or, without one, of its box."""
    if 'segmentation' in annotation:
        return float(coco_mask.area(to_rle(annotation['segmentation'], image)))
    return float(annotation['bbox'][2] * annotation['bbox'][3])


def select_classes(tree: dict[str, Any], names: Sequence[str], path: Path) -> dict[str, Any]:
    """Keep the categories of these names, in the file's order, and their annotations.

    Raises:
        DataError: a name is not among the categories.
    """
    known = {category['name'] for category in tree['categories']}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f': did you mean {near[0]}?' if near else f': it has {", ".join(sorted(known)[:5])} and the like'
            raise DataError(f'DATA.CLASSES has {name}, which is not a category of {path}{hint}')
    categories = [category for category in tree['categories'] if category['name'] in names]
    ids = {category['id'] for category in categories}
    annotations = [annotation for annotation in tree['annotations'] if annotation['category_id'] in ids]
    return tree | {'categories': categories, 'annotations': annotations}


def read_class_names(path: Path, names: Sequence[str] = ()) -> list[str]:
    """Names of a file's categories, or of those chosen by `select_classes`.

    Raises:
        DataError: the file cannot be read, or lacks a category.
    """
    tree = read_tree(path)
    tree.setdefault('annotations', [])
    _check_sections(tree, path)
    if names:
        tree = select_classes(tree, names, path)
    return [category['name'] for category in tree['categories']]


def read_tree(path: Path) -> dict[str, Any]:
    """The content of an annotation file, not checked; {} where it is no JSON object.

    Raises:
        DataError: it cannot be read, or is not JSON.
    """
    remedy = (
        'replace it, or give --data-path the folder that holds annotations/instances_<split>.json and the images in '
        '<split>/'
    )
    tree = read_json(path, f'annotation file {path}', DataError, remedy)
    return tree if isinstance(tree, dict) else {}


def _check_sections(tree: dict[str, Any], path: Path) -> None:
    """Refuse sections that are missing, and entries without the keys and types they need."""
    for section, keys in _KEYS.items():
        entries = tree.get(section)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DataError(f'annotation file {path} has no list "{section}": it is not in COCO\'s instance format')
        for number, entry in enumerate(entries):
            if missing := [key for key in keys if key not in entry]:
                raise DataError(f'{path}: entry {number} of "{section}" has no {", ".join(missing)}: add it')
            for key, kind in keys.items():
                entry[key] = whole_number(entry[key])
                if not is_a(entry[key], kind) or (isinstance(entry[key], int) and abs(entry[key]) >= 2**63):
                    expected = 'text' if kind is str else 'an integer' if kind is int else 'an integer or a text'
                    value = repr(entry[key])[:80]
                    raise DataError(f'{path}: entry {number} of "{section}" has the {key} {value}: write {expected}')
    for section in ('images', 'categories'):
        if not tree[section]:
            raise DataError(f'annotation file {path} has no {section}')
        if duplicates := _duplicates(entry['id'] for entry in tree[section]):
            raise DataError(f'{path}: two of the {section} have the id {duplicates[0]}: give each its own')
    if duplicates := _duplicates(category['name'] for category in tree['categories']):
        raise DataError(f'{path}: two of the categories have the name {duplicates[0]!r}: give each its own')
    for image in tree['images']:
        if not min(image['width'], image['height']) > 0:
            raise DataError(f'{path}: image {image["file_name"]} has no width and height in pixels: write them')
        if image['width'] * image['height'] > _MAX_PIXELS:
            raise DataError(
                f'{path}: image {image["file_name"]} has {image["width"]} x {image["height"]} pixels, too many to be '
                f'read: correct the entry, or scale the image down'
            )


def _duplicates(values: Iterable[Any]) -> list[Any]:
    seen = set()
    return [value for value in values if value in seen or seen.add(value)]


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
    """Boxes (n, 4) as x1, y1, x2, y2, clipped to the image."""
    boxes = torch.tensor([annotation['bbox'] for annotation in annotations], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes[:, 0::2] = boxes[:, 0::2].clamp(0, image['width'])
    boxes[:, 1::2] = boxes[:, 1::2].clamp(0, image['height'])
    return boxes


def has_area(annotation: dict[str, Any], image: dict[str, Any]) -> bool:
    """Whether the box has a width and height of a pixel or more within the image, so it can be trained on."""
    x, y, width, height = annotation['bbox']
    visible = min(x + width, image['width']) - max(x, 0), min(y + height, image['height']) - max(y, 0)
    return min(visible) >= 1


def decode_masks(annotations: list[dict[str, Any]], image: dict[str, Any]) -> Tensor:
    """Masks (n, H, W) as bytes, 0 or 1; all 0 where there is none."""
    masks = torch.zeros(len(annotations), image['height'], image['width'], dtype=torch.uint8)
    index = [i for i, annotation in enumerate(annotations) if 'segmentation' in annotation]
    if index:
        decoded = coco_mask.decode([to_rle(annotations[i]['segmentation'], image) for i in index])  # (H, W, n)
        masks[index] = torch.from_numpy(np.ascontiguousarray(decoded.transpose(2, 0, 1)))
    return masks
