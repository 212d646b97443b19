"""COCO's annotation format: a file is checked when it is read, before any work is lost.

Shapes: n objects, an image of H x W pixels.
"""

import difflib
import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
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
from detection.data.annotation_table import AnnotationTable, AnnotationTableWriter, ImageTable
from text_files import read_json

# Keys that the entries of each section must have, and their types. Keys that nothing reads may be of any type.
_KEYS = {
    'images': {'id': int | str, 'file_name': str, 'width': int, 'height': int},
    'categories': {'id': int, 'name': str},
    'annotations': {'image_id': int | str, 'category_id': int, 'bbox': object},
}

_MAX_PIXELS = 178_956_970  # of an image: PIL refuses to decode larger ones


class _Sections(msgspec.Struct):
    """Sections of a file that are read for its classes; the others are skipped."""

    images: list[msgspec.Raw]
    categories: list[msgspec.Raw]


def read_annotations(path: Path, with_masks: bool = True, needs_objects: bool = True) -> dict[str, Any]:
    """Read a file of images, categories and annotations.

    Keys that pycocotools needs and other programs may leave out are filled in: `info`, `iscrowd`, `area`. Annotations
    are renumbered from 1, since pycocotools takes the id 0 for "not found", and images where an id is a text. Where an
    annotation has no mask, `segmentation` is missing.

    Args:
        path: the file.
        with_masks: read the masks too; some annotations must have one.
        needs_objects: refuse a file without a section of annotations, such as COCO's `image_info_test-dev2017.json`.

    Returns:
        `images`, an `ImageTable`; `annotations`, an `AnnotationTable`; `categories` and `info` as in the file; `notes`
        for the log; and `is_labelled`.

    Raises:
        DataError: it cannot be read, or has an invalid entry; the message names it.
    """
    try:
        content = _map(path)
        return _read_sections(_scan_sections(content), path, with_masks, needs_objects, partial(_release, content))
    except DataError:
        raise
    except (OSError, ValueError, RecursionError, msgspec.DecodeError):
        # Python's parser takes several times the memory. It also reads UTF-16 and NaN, and has the messages of errors.
        return _read_sections(read_tree(path), path, with_masks, needs_objects)


def _map(path: Path) -> mmap.mmap:
    """The content of a file, which stays in the system's cache of files.

    Raises:
        OSError, ValueError: it cannot be read, or is empty.
    """
    with path.open('rb') as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _release(content: mmap.mmap) -> None:
    """Let the system drop the pages of a mapped file that have been read from this process's memory."""
    if hasattr(mmap, 'MADV_DONTNEED'):
        content.madvise(mmap.MADV_DONTNEED)


def _scan_sections(content: mmap.mmap) -> dict[str, Any]:
    """The content of an annotation file; the entries of lists are still JSON, checked when they are decoded.

    Raises:
        msgspec.DecodeError, RecursionError: it is not JSON, or nothing that this parser reads.
    """
    sections: dict[str, Any] = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
    for name in sections:
        try:
            sections[name] = msgspec.json.decode(sections[name], type=list[msgspec.Raw] if name in _KEYS else Any)
        except msgspec.ValidationError:  # not a list
            sections[name] = None
    return sections


def _read_sections(
    tree: dict[str, Any],
    path: Path,
    with_masks: bool,
    needs_objects: bool,
    release: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Check and collect the sections of a file; see `read_annotations`. `release` is called now and then."""
    images = [{key: image[key] for key in _KEYS['images']} for image in read_entries(tree, 'images', path)]
    categories = list(read_entries(tree, 'categories', path))
    _check_images_and_categories(images, categories, path)
    is_labelled = needs_objects or 'annotations' in tree
    entries = read_entries(tree, 'annotations', path) if is_labelled else ()
    numbers = {image['id']: number for number, image in enumerate(images)}
    has_text_ids = _number_images(images)
    reader = AnnotationReader(path, images, numbers, categories, with_masks)
    for annotation in entries:
        reader.add(annotation)
        if reader.count % 10_000 == 1:
            release()
    annotations, notes = reader.finish(has_text_ids)
    return {
        'info': tree.get('info', {}),
        'images': ImageTable.of(images),
        'categories': categories,
        'annotations': annotations,
        'notes': notes,
        'is_labelled': is_labelled,
    }


class AnnotationReader:
    """Checks annotations one by one, fills in what is missing, and collects them.

    Args:
        path: the file, for messages.
        images: entries of its images.
        numbers: where each image is in the list, by the id that annotations have.
        categories: entries of its categories.
        with_masks: read the masks too.
    """

    def __init__(
        self,
        path: Path,
        images: Sequence[dict[str, Any]],
        numbers: dict[Any, int],
        categories: Sequence[dict[str, Any]],
        with_masks: bool,
    ):
        self.path, self.images, self.numbers, self.with_masks = str(path), images, numbers, with_masks
        self.categories = {category['id'] for category in categories}
        self.table, self.placement = AnnotationTableWriter(), PlacementCheck()
        self.count = self.without_mask = self.without_area = 0
        self.first_without_area = ''

    def add(self, annotation: dict[str, Any]) -> None:
        """Check and append an annotation.

        Raises:
            DataError: it is invalid.
        """
        self.count += 1
        label = f'{self.path}: annotation {str(annotation.get("id", self.count))[:80]}'
        number = self.numbers.get(annotation['image_id'])
        if number is None:
            raise DataError(f'{label} is of image {annotation["image_id"]}, which is not among the images: remove it')
        if annotation['category_id'] not in self.categories:
            raise DataError(
                f'{label} is of category {annotation["category_id"]}, which is not among the categories: add it there'
            )
        image = self.images[number]
        label_of_image = f'{label}, of {image["file_name"]},'
        check_box(annotation, label_of_image)
        segmentation = annotation.get('segmentation')
        is_flat = self.with_masks and bool(segmentation) and has_no_area(segmentation)
        if is_flat:
            self.without_area += 1
            self.first_without_area = self.first_without_area or label_of_image
        if not self.with_masks or segmentation in (None, [], {}) or is_flat:
            annotation.pop('segmentation', None)
            self.without_mask += 1
            extent = [0.0] * 4
        else:
            extent = check_mask(annotation, image, label_of_image)
        annotation['id'], annotation['image_id'] = self.count, image['id']
        if annotation.setdefault('iscrowd', 0) not in (0, 1):
            raise DataError(f'{label} has iscrowd {annotation["iscrowd"]!r}: write 0 or 1')
        annotation['iscrowd'] = int(annotation['iscrowd'])
        if annotation.get('area') is None:
            annotation['area'] = _area(annotation, image)
        elif not (are_numbers([annotation['area']]) and annotation['area'] >= 0):
            raise DataError(
                f'{label} has the area {annotation["area"]!r}: write the pixels of its mask, or leave it out'
            )
        self.placement.add(annotation, image, extent, label_of_image)
        self.table.add(annotation, number, has_area(annotation, image))

    def finish(self, has_text_ids: bool) -> tuple[AnnotationTable, list[str]]:
        """The annotations, and the notes on them.

        Args:
            has_text_ids: whether ids of images are texts.

        Raises:
            DataError: boxes are misplaced, or there are no masks.
        """
        notes = self.placement.finish()
        if has_text_ids:
            notes.append('ids of images are texts: results have numbers instead, from 1 in the order of the file')
        if self.without_mask and self.with_masks:
            if self.without_mask == self.count:
                raise DataError(
                    f'{self.path}: no annotation has a mask: write --opts MODEL.MASK.ENABLED False for boxes only'
                )
            notes.append(f'{self.without_mask} of {self.count} annotations have no mask, and count for boxes only')
        if self.without_area:
            notes.append(
                f'{self.without_area} of them have polygons of fewer than three corners, such as '
                f'{self.first_without_area[:-1]}'
            )
        return self.table.finish(), notes


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


def select_categories(categories: list[dict[str, Any]], names: Sequence[str], path: Path) -> list[dict[str, Any]]:
    """The categories of these names, in the file's order; all of them where there are no names.

    Raises:
        DataError: a name is not among the categories.
    """
    known = {category['name'] for category in categories}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f': did you mean {near[0]}?' if near else f': it has {", ".join(sorted(known)[:5])} and the like'
            raise DataError(f'DATA.CLASSES has {name}, which is not a category of {path}{hint}')
    return [category for category in categories if category['name'] in names] if names else categories


def read_class_names(path: Path, names: Sequence[str] = ()) -> list[str]:
    """Names of a file's categories, or of those chosen by `select_categories`; annotations are only skipped.

    Raises:
        DataError: the file cannot be read, or lacks a category.
    """
    try:
        categories = _read_categories(msgspec.structs.asdict(msgspec.json.decode(_map(path), type=_Sections)), path)
    except DataError:
        raise
    except (OSError, ValueError, RecursionError, msgspec.DecodeError):
        categories = _read_categories(read_tree(path), path)
    return [category['name'] for category in select_categories(categories, names, path)]


def _read_categories(tree: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """Check and collect a file's categories."""
    images, categories = (list(read_entries(tree, section, path)) for section in ('images', 'categories'))
    _check_images_and_categories(images, categories, path)
    return categories


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


def read_entries(
    tree: dict[str, Any], section: str, path: Path, on_error: Callable[[DataError], None] | None = None
) -> Iterator[dict[str, Any]]:
    """Entries of a section, decoded one at a time where they are JSON, and checked for the keys and types they need.

    Args:
        tree: the content of an annotation file.
        section: `images`, `categories` or `annotations`.
        path: the file, for messages.
        on_error: gets the error of each invalid entry, which is left out; None raises it.

    Raises:
        DataError: there is no such section, or an entry is invalid.
    """
    entries = tree.get(section)
    if not isinstance(entries, list):
        raise DataError(f'annotation file {path} has no list "{section}": it is not in COCO\'s instance format')
    for number, entry in enumerate(entries):
        if type(entry) is msgspec.Raw:
            entry = msgspec.json.decode(entry)
        try:
            _check_entry(entry, number, section, path)
        except DataError as error:
            if on_error is None:
                raise
            on_error(error)
        else:
            yield entry


def _check_entry(entry: Any, number: int, section: str, path: Path) -> None:
    """Refuse an entry that is no object, lacks a key or has a value of another type; integers may be floats."""
    if not isinstance(entry, dict):
        raise DataError(f'{path}: entry {number} of "{section}" is not an object: remove it')
    keys = _KEYS[section]
    if missing := [key for key in keys if key not in entry]:
        raise DataError(f'{path}: entry {number} of "{section}" has no {", ".join(missing)}: add it')
    for key, kind in keys.items():
        value = entry[key]
        if kind is object or (type(value) is int and kind is not str and -(2**63) < value < 2**63):
            continue  # most are
        entry[key] = value = whole_number(value)
        if not is_a(value, kind) or (isinstance(value, int) and abs(value) >= 2**63):
            expected = 'text' if kind is str else 'an integer' if kind is int else 'an integer or a text'
            raise DataError(f'{path}: entry {number} of "{section}" has the {key} {repr(value)[:80]}: write {expected}')


def _check_images_and_categories(
    images: Sequence[dict[str, Any]], categories: Sequence[dict[str, Any]], path: Path
) -> None:
    """Refuse sections without entries, ids and names that are given twice, and sizes that no image has."""
    for section, entries in (('images', images), ('categories', categories)):
        if not entries:
            raise DataError(f'annotation file {path} has no {section}')
        if repeated := duplicates(entry['id'] for entry in entries):
            raise DataError(f'{path}: two of the {section} have the id {repeated[0]}: give each its own')
    if repeated := duplicates(category['name'] for category in categories):
        raise DataError(f'{path}: two of the categories have the name {repeated[0]!r}: give each its own')
    for image in images:
        check_size(image, path)


def check_size(image: dict[str, Any], path: Path) -> None:
    """Refuse the entry of an image whose size no image has."""
    if not min(image['width'], image['height']) > 0:
        raise DataError(f'{path}: image {image["file_name"]} has no width and height in pixels: write them')
    if image['width'] * image['height'] > _MAX_PIXELS:
        raise DataError(
            f'{path}: image {image["file_name"]} has {image["width"]} x {image["height"]} pixels, too many to be '
            f'read: correct the entry, or scale the image down'
        )


def duplicates(values: Iterable[Any]) -> list[Any]:
    """The values that have occurred before, each time that they do."""
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
