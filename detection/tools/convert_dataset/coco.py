"""Reader of exports in COCO's format, as of Roboflow, Label Studio, CVAT and Supervisely."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data import DataError
from data.images import read_header
from detection.data.annotation_checks import has_no_area, is_a, whole_number
from detection.data.annotations import read_tree
from detection.tools.convert_dataset.source import Item, Source, find_image
from utils import first_few

# The split that a word in the name of an annotation file stands for.
_SPLIT_WORDS = {'train': 'train', 'val': 'val', 'valid': 'val', 'validation': 'val', 'test': 'test'}

# Names of COCO's files of other tasks, which are in the same folder as those of objects.
_OTHER_FILES = ('captions_*', 'person_keypoints_*', 'stuff_*', 'panoptic_*', 'image_info_*')


def read_roboflow(folder: Path) -> Source:
    """Read `<split>/_annotations.coco.json` with its images next to it; splits are train, valid and test.

    Raises:
        DataError: a file cannot be read.
    """
    files = {}
    for name, split in (('train', 'train'), ('valid', 'val'), ('test', 'test')):
        path = folder / name / '_annotations.coco.json'
        if path.is_file():
            files[split] = path
    if not files:
        raise DataError(f'{folder} has no train/_annotations.coco.json: give the folder of an export')
    return _read_files(files, folder, {path: [path.parent] for path in files.values()})


def read_coco(path: Path) -> Source:
    """Read an annotation file, or a folder with one for each split, such as `annotations/instances_val.json`.

    Images are next to the file, or in the folder, `images/`, or a folder of the split's name. A single file has the
    training images.

    Raises:
        DataError: a file cannot be read, or it is not clear which split it is of.
    """
    paths = find_annotation_files(path) if path.is_dir() else [path]
    if not paths:
        raise DataError(f'{path} has no annotations/*.json: give the annotation file')
    files: dict[str, Path] = {}
    for file in paths:
        split = _split_of(file) if len(paths) > 1 else 'train'
        if split is None or split in files:
            names = first_few([x.name for x in paths])
            raise DataError(f'{path} has {names}, whose names do not tell the splits: give one file, or call them '
                            f'train.json and val.json')  # fmt: skip
        files[split] = file
    root = path if path.is_dir() else path.parent
    root = root.parent if root.name == 'annotations' else root
    return _read_files(files, root, {file: _image_folders(file, root) for file in files.values()})


def find_annotation_files(folder: Path) -> list[Path]:
    """The JSON files that may be in COCO's format: in `annotations/`, or else in the folder."""
    for pattern in ('annotations/instances_*.json', 'annotations/*.json', '*.json'):
        found = [x for x in sorted(folder.glob(pattern)) if not any(x.match(other) for other in _OTHER_FILES)]
        if found:
            return found
    return []


def _split_of(path: Path) -> str | None:
    words = re.split('[^a-z]+', path.stem.lower())
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), None)


def _image_folders(file: Path, root: Path) -> list[Path]:
    """Folders that may hold the images of a file, such as `val2017/` for `instances_val2017.json`."""
    name = file.stem.removeprefix('instances_')
    names = ['', name, *(x for x, split in _SPLIT_WORDS.items() if split == _split_of(file))]
    return [root / part / x for part in ('', 'images') for x in names] + [file.parent]


def _read_files(files: Mapping[str, Path], root: Path, folders: Mapping[Path, Sequence[Path]]) -> Source:
    """Read the file of each split; categories are matched by their names."""
    source, names, parents, used = Source([], {}), {}, set(), set()
    for split, path in files.items():
        tree = read_tree(path)
        try:
            entries = {x['id']: x['name'] for x in tree['categories']}
            if len(set(entries.values())) < len(tree['categories']):
                raise DataError(f'{path} has two categories of one name or id: give each its own')
            parents |= {x.get('supercategory') for x in tree['categories'] if x.get('supercategory') != x['name']}
            source.splits[split] = _Reader(path, tree, entries, root, folders[path]).items(source.notes)
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path} is not in COCO's format: {type(error).__name__} {error}") from error
        if names and list(names) != list(entries.values()):
            source.notes.append(f'{path} has other categories than the split before it: they are matched by name')
        names |= dict.fromkeys(entries.values())
        used |= {x['category'] for item in source.splits[split] for x in item.objects}
    # Roboflow adds a category for the whole set: the parent of others, which no object has.
    source.categories = [name for name in names if name in used or name not in parents]
    return source


class _Reader:
    """Reads the images of an annotation file, and counts what is unusual."""

    def __init__(
        self, path: Path, tree: Mapping[str, Any], names: Mapping[Any, str], root: Path, folders: Sequence[Path]
    ):
        self.path, self.tree, self.names, self.root, self.folders = path, tree, names, root, folders
        self.counts: dict[str, list[str]] = {}  # examples, by what is unusual
        self.found_by_name: dict[Path, str] = {}

    def items(self, notes: list[str]) -> list[Item]:
        """The images; what is unusual is added to the notes."""
        objects: dict[Any, list[dict[str, Any]]] = {image['id']: [] for image in self.tree['images']}
        if len(objects) < len(self.tree['images']):
            raise DataError(f'{self.path}: two images have the same id: export the data again')
        for number, x in enumerate(self.tree['annotations'], start=1):
            for key, known in (('image', objects), ('category', self.names)):
                if x[f'{key}_id'] not in known:
                    text = f'{key} {x[f"{key}_id"]!r}, which the file does not have'
                    raise DataError(f'{self.path}: annotation {number} is of {text}: add it, or export the data again')
            objects[x['image_id']].append(self._object(x, number))
        items = [self._item(x, objects[x['id']]) for x in self.tree['images']]
        notes += [f'{self.path}: {len(x)} {what}, such as {x[0]}' for what, x in self.counts.items()]
        return items

    def _object(self, x: Mapping[str, Any], number: int) -> dict[str, Any]:
        found = {'category': self.names[x['category_id']], 'bbox': x['bbox']}
        if x.get('segmentation'):
            if has_no_area(x['segmentation']):
                self._count('masks of fewer than three corners are left out, and the boxes kept', f'object {number}')
            else:
                found['segmentation'] = x['segmentation']
        crowd = x.get('iscrowd') or x.get('ignore')
        return found | ({'iscrowd': crowd} if crowd else {})

    def _item(self, x: Mapping[str, Any], objects: list[dict[str, Any]]) -> Item:
        name = x['file_name']
        if not is_a(name, str):
            raise DataError(f'{self.path}: an image has the file_name {name!r}: write text')
        found = find_image(name, self.folders)
        if found is None:
            raise DataError(f'image {name} of {self.path} is not in {self.folders[0]}: add it')
        path, given = found
        if given != name and len(given) < len(name.rstrip('/')) and '/' not in given:
            self._count('images are found by the last part of their names', name)
            if self.found_by_name.setdefault(path, name) != name:
                raise DataError(f'{self.path}: {name} and {self.found_by_name[path]} are both found as {path}: '
                                f'write names with folders')  # fmt: skip
        size = whole_number(x.get('width')), whole_number(x.get('height'))
        is_outside = not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(self.root))
        if is_outside:
            self._count(f'images are outside {self.root}', name)
        has_size = min(size[0] or 0, size[1] or 0) > 0
        if not has_size:
            self._count('images have no width and height, which are read from the images', name)
        upright = size if has_size and not is_outside else read_header(path).upright_size
        return Item(path, given, size if has_size else upright, objects)

    def _count(self, what: str, example: str) -> None:
        self.counts.setdefault(what, []).append(example)
