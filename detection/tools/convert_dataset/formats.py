"""Readers of other programs' detection data: Roboflow's COCO export, YOLO text files, Pascal VOC XML.

Boxes are [x, y, width, height] in pixels of the upright image, as in COCO.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from torchvision.datasets.folder import is_image_file

from data import DataError
from data.images import read_header
from utils import read_json, read_yaml


class Item(NamedTuple):
    """An image and its objects.

    Attributes:
        path: of the image.
        name: of the image in the result: unique within its split, with folders.
        size: width and height, in pixels, upright.
        objects: each with `category`, a name, and COCO's `bbox`, `segmentation` if it has a mask, and `iscrowd`.
    """

    path: Path
    name: str
    size: tuple[int, int]
    objects: list[dict[str, Any]]


class Source(NamedTuple):
    """A dataset of another program.

    Attributes:
        categories: names, in the order of their labels.
        splits: images by the split's name, `train`, `val` or `test`.
    """

    categories: list[str]
    splits: dict[str, list[Item]]


def detect_format(path: Path) -> str:
    """The format of a folder or file.

    Raises:
        DataError: it is none of those known.
    """
    if path.suffix in ('.yaml', '.yml') or (path / 'data.yaml').is_file():
        return 'yolo'
    if next(path.glob('*/_annotations.coco.json'), None) is not None:
        return 'roboflow'
    if (path / 'Annotations').is_dir() or next(path.glob('*/*.xml'), None) is not None:
        return 'voc'
    raise DataError(
        f'{path} is of no known format: it has no <split>/_annotations.coco.json (Roboflow), no data.yaml (YOLO) '
        f'and no Annotations/ (VOC)'
    )


# Roboflow's COCO export


def read_roboflow(folder: Path) -> Source:
    """Read `<split>/_annotations.coco.json` with its images beside it; splits are train, valid and test.

    Raises:
        DataError: a file cannot be read.
    """
    categories, used, splits = None, set(), {}
    for name, split in (('train', 'train'), ('valid', 'val'), ('test', 'test')):
        path = folder / name / '_annotations.coco.json'
        if not path.is_file():
            continue
        tree = read_json(path, str(path), DataError)
        try:
            entries = [(x['id'], x['name'], x.get('supercategory')) for x in tree['categories']]
            splits[split] = _roboflow_items(tree, dict(entry[:2] for entry in entries), path.parent)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is not in COCO's format: {type(error).__name__} {error}") from error
        if categories is not None and categories != entries:
            raise DataError(f'{path} has other categories than the splits before it: export them together')
        categories = entries
        used |= {x['category'] for item in splits[split] for x in item.objects}
    if not splits:
        raise DataError(f'{folder} has no train/_annotations.coco.json: give the folder of an export')
    # Roboflow adds a category for the whole set: the parent of others, which no object has.
    parents = {parent for _, name, parent in categories if parent != name}
    return Source([name for _, name, _ in categories if name in used or name not in parents], splits)


def _roboflow_items(tree: Mapping[str, Any], names: dict[Any, str], folder: Path) -> list[Item]:
    objects: dict[Any, list[dict[str, Any]]] = {image['id']: [] for image in tree['images']}
    if len(objects) < len(tree['images']):
        raise DataError(f'{folder}: two images have the same id: export the data again')
    for x in tree['annotations']:
        extra = {key: x[key] for key in ('segmentation', 'iscrowd') if x.get(key)}
        objects[x['image_id']].append({'category': names[x['category_id']], 'bbox': x['bbox']} | extra)
    items = []
    for x in tree['images']:
        path = folder / x['file_name']
        if not path.is_file() or not path.is_relative_to(folder):
            raise DataError(f'image {x["file_name"]} is not in {folder}: add it')
        items.append(Item(path, x['file_name'], (x['width'], x['height']), objects[x['id']]))
    return items


def _read_lines(path: Path) -> list[str]:
    """The lines of a text file, without spaces around them."""
    try:
        return [line.strip() for line in path.read_text(encoding='utf-8').splitlines()]
    except OSError as error:
        raise DataError(f'{path}: {error.strerror}') from error
    except UnicodeDecodeError as error:
        raise DataError(f'{path} is not text in UTF-8: {error.reason}') from error


# YOLO


def read_yolo(path: Path) -> Source:
    """Read a `data.yaml`, or the folder that holds it; labels are beside `images`, in `labels`.

    A line is a class and a box (centre and size) or the corners of a polygon, relative to the image's size.

    Raises:
        DataError: a file cannot be read, or a line is something else.
    """
    file = path if path.is_file() else path / 'data.yaml'
    content = read_yaml(file, str(file), DataError)
    names, splits = _yolo_names(content, file), {}
    for key, split in (('train', 'train'), ('val', 'val'), ('test', 'test')):
        if content.get(key):
            images = list(_yolo_images(file, content, key))
            splits[split] = [_yolo_item(image, root, names) for image, root in images]
    if not splits:
        raise DataError(f'{file} has no train: write the folder of the training images')
    return Source(list(names.values()), splits)


def _yolo_names(content: Any, file: Path) -> dict[int, str]:
    """Names of the classes by their numbers in label files."""
    names = content.get('names') if isinstance(content, Mapping) else None
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, Mapping) or not names or not all(str(key).isdecimal() for key in names):
        raise DataError(f'{file} has no names of the classes: write a list, or numbers with their names')
    names = {int(key): str(names[key]) for key in sorted(names, key=int)}
    if len(set(names.values())) < len(names):
        raise DataError(f'{file} has two classes of one name: rename one of them')
    return names


def _yolo_images(file: Path, content: Mapping[str, Any], key: str) -> Iterator[tuple[Path, Path]]:
    """Images of a split, and the folder that each was found in."""
    entries = content[key] if isinstance(content[key], list) else [content[key]]
    root = file.parent / str(content.get('path') or '')
    for entry in map(str, entries):
        # Roboflow writes ../train/images where train/images is meant.
        choices = [root / entry, file.parent / entry, file.parent / entry.removeprefix('../')]
        found = next((choice for choice in choices if choice.exists()), None)
        if found is None:
            raise DataError(f'{file}: {key} is {entry}, which does not exist in {root}: write where the images are')
        if found.is_dir():
            yield from ((x, found) for x in sorted(found.rglob('*')) if x.is_file() and is_image_file(x.name))
        else:  # a list of files
            lines = filter(None, _read_lines(found))
            paths = [Path(line) if Path(line).is_absolute() else found.parent / line for line in lines]
            yield from ((path, path.parent) for path in paths)


def _yolo_item(image: Path, root: Path, names: dict[int, str]) -> Item:
    parts = list(image.with_suffix('.txt').parts)
    if 'images' in parts:
        last = len(parts) - 1 - parts[::-1].index('images')
        parts[last] = 'labels'
    label, size, objects = Path(*parts), read_header(image).upright_size, []
    for number, line in enumerate(_read_lines(label) if label.is_file() else (), start=1):
        if line:
            objects.append(_yolo_object(line, size, names, f'{label}, line {number}'))
    return Item(image, str(image.relative_to(root)), size, objects)


def _yolo_object(line: str, size: tuple[int, int], names: dict[int, str], where: str) -> dict[str, Any]:
    try:
        index, *values = map(float, line.split())
    except ValueError as error:
        raise DataError(f'{where} is {line!r}: write a class and numbers') from error
    is_polygon = len(values) >= 6 and len(values) % 2 == 0
    if not (is_polygon or len(values) == 4) or not all(-1 <= x <= 2 and math.isfinite(x) for x in values):
        raise DataError(f'{where} is {line!r}: write a class and a box, or corners, between 0 and 1')
    if index not in names:
        raise DataError(f'{where} has class {index:g}, which names does not have: add it there')
    width, height = size
    category = names[int(index)]
    if not is_polygon:
        x, y, w, h = values
        return {'category': category, 'bbox': [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]}
    xs, ys = [x * width for x in values[::2]], [y * height for y in values[1::2]]
    corners = [x for corner in zip(xs, ys, strict=True) for x in corner]
    box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    return {'category': category, 'bbox': box, 'segmentation': [corners]}


# Pascal VOC


def read_voc(folder: Path) -> Source:
    """Read `Annotations/*.xml` with `JPEGImages/`, split by `ImageSets/Main/<split>.txt` where these are.

    Without these files, XML files beside their images are read, of folders `train` and `valid` or `val` if there are.
    Boxes are of pixels counted from 1. Difficult objects become crowd regions: they are neither trained nor counted.

    Raises:
        DataError: a file cannot be read.
    """
    annotations, images = folder / 'Annotations', folder / 'JPEGImages'
    lists = {split: folder / 'ImageSets' / 'Main' / f'{split}.txt' for split in ('train', 'val', 'test')}
    if not annotations.is_dir():
        found = {'train': folder / 'train', 'val': folder / 'valid', 'test': folder / 'test'}
        if not found['val'].is_dir():
            found['val'] = folder / 'val'
        files = {split: sorted(path.glob('*.xml')) for split, path in found.items() if path.is_dir()}
    elif any(path.is_file() for path in lists.values()):
        files = {
            split: [_voc_file(annotations, line) for line in _read_lines(path) if line]
            for split, path in lists.items()
            if path.is_file()
        }
    else:
        files = {'train': sorted(annotations.glob('*.xml'))}
    splits = {split: [_voc_item(path, images) for path in paths] for split, paths in files.items() if paths}
    if not splits:
        raise DataError(f'{folder} has no XML files: give the folder that holds Annotations/')
    names = {x['category'] for items in splits.values() for item in items for x in item.objects}
    return Source(sorted(names), splits)


def _voc_file(annotations: Path, entry: str) -> Path:
    """The file of an entry of a list: a name, or a name and whether the image has an object of a class."""
    whole = annotations / f'{entry}.xml'
    return whole if whole.is_file() else annotations / f'{entry.split()[0]}.xml'


def _voc_item(path: Path, images: Path) -> Item:
    try:
        tree = ElementTree.parse(path)
    except OSError as error:
        raise DataError(f'{path}: {error.strerror}') from error
    except ElementTree.ParseError as error:
        raise DataError(f'{path} is not XML: {error}') from error
    name = Path(tree.findtext('filename') or '').name or f'{path.stem}.jpg'
    image = next((x for x in (images / name, path.with_name(name)) if x.is_file()), None)
    if image is None:
        raise DataError(f'{path}: image {name} is neither in {images} nor beside it: add it')
    objects = []
    for x in tree.iterfind('object'):
        try:
            x1, y1, x2, y2 = (float(x.findtext(f'bndbox/{key}')) for key in ('xmin', 'ymin', 'xmax', 'ymax'))
            found = {'category': x.findtext('name').strip(), 'bbox': [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]}
        except (TypeError, ValueError, AttributeError) as error:
            raise DataError(f'{path} has an object without name, or bndbox of four numbers: write them') from error
        objects.append(found | ({'iscrowd': 1} if (x.findtext('difficult') or '0').strip() == '1' else {}))
    return Item(image, image.name, read_header(image).upright_size, objects)


READERS: dict[str, Callable[[Path], Source]] = {'roboflow': read_roboflow, 'yolo': read_yolo, 'voc': read_voc}
