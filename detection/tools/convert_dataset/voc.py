"""Reader of Pascal VOC's XML files, as of labelImg, CVAT, Label Studio, Roboflow and ImageNet."""

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

from data import DataError
from data.images import existing_path, is_image_file, read_header
from data.samples import same_letters
from detection.tools.convert_dataset.source import Item, Source, decode_file, read_lines
from utils import first_few

_DECLARATION = re.compile(rb'<\?xml[^>]*?encoding\s*=\s*["\']([\w.:-]+)["\']')

# Names of encodings that are used for larger ones.
_LARGER_ENCODINGS = {'gb2312': 'gb18030', 'gbk': 'gb18030', 'shift_jis': 'cp932', 'shift-jis': 'cp932'}


def read_voc(folder: Path) -> Source:
    """Read `Annotations/*.xml` with `JPEGImages/`, split by the lists in `ImageSets/Main` where these are.

    Without these lists, XML files next to their images are read, of folders `train` and `valid` or `val` if there are.
    Boxes are of pixels counted from 1. Difficult objects become crowd regions: they are neither trained nor counted.

    Raises:
        DataError: a file cannot be read.
    """
    files = find_xml_files(folder)
    if not files:
        raise DataError(f'{folder} has no XML files: give the folder that holds Annotations/')
    notes: list[str] = []
    annotations = _annotation_folder(folder)
    lists = _read_lists(folder, annotations) if annotations else {}
    if lists:
        files = {'train': files['train'], **_listed_files(lists, files['train'], notes)}
        if not any(name in lists for name in ('train', 'trainval', 'default')):
            del files['train']
    images = _ImageIndex([folder / name for name in ('JPEGImages', 'images', 'Images')])
    reader = _Reader(images)
    splits = {split: [reader.item(path) for path in paths] for split, paths in files.items() if paths}
    if not splits:
        raise DataError(f'{folder}: the lists in ImageSets/Main name no images: fill or remove them')
    names = {x['category'] for items in splits.values() for item in items for x in item.objects}
    return Source(sorted(names), splits, notes + reader.notes())


def find_xml_files(folder: Path) -> dict[str, list[Path]]:
    """The XML files of a folder: of `Annotations/`, of `train/`, `valid/` and `test/`, or next to its images."""
    annotations = _annotation_folder(folder)
    if annotations:
        return {'train': sorted(annotations.rglob('*.xml'))}
    folders = {'train': [folder / 'train'], 'val': [folder / 'valid', folder / 'val'], 'test': [folder / 'test']}
    found = {split: [x for path in paths for x in sorted(path.rglob('*.xml'))] for split, paths in folders.items()}
    files = {split: paths for split, paths in found.items() if paths} or {'train': sorted(folder.glob('*.xml'))}
    return {split: paths for split, paths in files.items() if paths}


def _annotation_folder(folder: Path) -> Path | None:
    choices = (folder / name for name in ('Annotations', 'annotations'))
    return next((x for x in choices if next(x.rglob('*.xml'), None)), None)


# Lists


def _read_lists(folder: Path, annotations: Path) -> dict[str, list[Path]]:
    """XML files by the name of the list in `ImageSets/Main` that names them; lists of single classes are left out."""
    lists = {}
    for name in ('train', 'val', 'trainval', 'test', 'default'):  # CVAT writes default.txt
        path = folder / 'ImageSets' / 'Main' / f'{name}.txt'
        if path.is_file():
            lists[name] = [_listed_file(annotations, line, path) for line in read_lines(path) if line]
    return lists


def _listed_file(annotations: Path, entry: str, path: Path) -> Path:
    """The file of an entry of a list: a name, or a name and whether the image has an object of a class."""
    entry = entry.replace('\\', '/')
    stems = (entry, entry.split()[0], str(PurePosixPath(entry).with_suffix('')) if is_image_file(entry) else entry)
    found = next((x for stem in stems if os.path.isfile(x := annotations / f'{stem}.xml')), None)
    if found is None:
        raise DataError(f'{path} names {entry[:200]}, which has no XML file in {annotations}: add it')
    return found


def _listed_files(lists: Mapping[str, list[Path]], files: Iterable[Path], notes: list[str]) -> dict[str, list[Path]]:
    """Files by split; the notes say which lists are used, and how many files none of these names."""
    train = next((name for name in ('train', 'trainval', 'default') if name in lists), None)
    used = {split: name for split, name in (('train', train), ('val', 'val'), ('test', 'test')) if name in lists}
    splits = {split: list(dict.fromkeys(lists[name])) for split, name in used.items()}
    if train == 'trainval':
        others = {path for split, paths in splits.items() if split != 'train' for path in paths}
        splits['train'] = [path for path in splits['train'] if path not in others]
    names = ', '.join(f'{name}.txt' for name in used.values())
    unlisted = set(files) - {path for paths in splits.values() for path in paths}
    dropped = f'; {len(unlisted)} XML files that they do not name are left out' if unlisted else ''
    notes.append(f'splits are those of ImageSets/Main: {names}{dropped}')
    notes += [f'ImageSets/Main/{used[split]}.txt names no images' for split, paths in splits.items() if not paths]
    return splits


# Files


def _encoding(content: bytes) -> str:
    """The encoding that an XML file declares, read from bytes that are ASCII up to there."""
    match = _DECLARATION.match(content.lstrip()[:200])
    name = match[1].decode().lower() if match else 'utf-8'
    if name.startswith(('utf-16', 'utf-32', 'ucs')):  # .NET declares UTF-16 in whatever it writes
        name = 'utf-8'
    return _LARGER_ENCODINGS.get(name, name)


def _parse(path: Path) -> Element:
    """The root of an XML file, which must be in Pascal VOC's format and may not define entities."""
    text = decode_file(path, _encoding)
    try:
        root = fromstring(text.lstrip(), forbid_dtd=True)
    except DefusedXmlException as error:
        raise DataError(f'{path} has a DOCTYPE, which may define harmful entities: remove it') from error
    except (ParseError, ValueError) as error:
        raise DataError(f'{path} is not XML: {error}') from error
    if root.tag != 'annotation':
        raise DataError(f"{path} is not in Pascal VOC's format: its root is {root.tag[:80]}, not annotation")
    return root


class _ImageIndex:
    """Finds images by name or, where the suffix is another one or is missing, by stem."""

    def __init__(self, folders: Sequence[Path]):
        self.folders = [folder for folder in folders if folder.is_dir()]
        self._stems: dict[Path, dict[str, list[Path]]] = {}

    def find(self, name: str, beside: Path) -> Path | None:
        """The image of this name in the folders of images or next to an XML file.

        Raises:
            DataError: several images have the stem.
        """
        folders = [*self.folders, beside.parent]
        exact = next((x for folder in folders if os.path.isfile(x := existing_path(folder, name))), None)
        if exact:
            return exact
        for folder in folders:
            stems = self._stems_of(folder)
            name = same_letters(name)
            found = stems.get(name) or stems.get(Path(name).stem if is_image_file(name) else name, [])
            if len(found) > 1:
                raise DataError(f'{beside}: image {name} may be {found[0]} or {found[1]}: remove one of them')
            if found:
                return found[0]
        return None

    def _stems_of(self, folder: Path) -> dict[str, list[Path]]:
        if folder not in self._stems:
            stems = self._stems[folder] = {}
            for path in sorted(folder.rglob('*') if folder in self.folders else folder.iterdir()):
                if is_image_file(path.name):
                    stems.setdefault(same_letters(path.stem), []).append(path)
        return self._stems[folder]


class _Reader:
    """Reads XML files, and counts what is unusual."""

    def __init__(self, images: _ImageIndex):
        self.images = images
        self.of_image: dict[Path, Path] = {}
        self.counts: dict[str, list[Path]] = {}

    def notes(self) -> list[str]:
        """What the user should know about the files."""
        return [f'{len(paths)} {what}, such as {first_few(paths, 1)}' for what, paths in self.counts.items()]

    def item(self, path: Path) -> Item:
        """The image of an XML file, with its objects."""
        root = _parse(path)
        image = self._image(root, path)
        size = read_header(image).upright_size
        stated = [root.findtext(f'size/{key}') for key in ('width', 'height')]
        if all(stated) and [x.strip() for x in stated] not in (list(map(str, size)), ['0', '0']):
            self._count('XML files state another size than their images have', path)
        objects = [self._object(x, path) for x in root.iterfind('object')]
        return Item(image, image.name, size, objects)

    def _image(self, root: Element, path: Path) -> Path:
        """The image by <filename>, of which only the last part counts, or by the name of the XML file."""
        given = PurePosixPath((root.findtext('filename') or '').strip().replace('\\', '/')).name
        image = self.images.find(given, path) if given else None
        if image is None:
            image = self.images.find(path.stem, path)
            if image is None:
                folders = ' nor '.join(map(str, [*self.images.folders, 'next to it']))
                raise DataError(f'{path}: image {given or path.stem} is neither in {folders}: add it')
            if given:
                self._count('images are found by the name of the XML file, not by <filename>', path)
        elif image.name != given:
            self._count('images have another suffix than <filename>', path)
        if image in self.of_image and self.of_image[image] != path:
            raise DataError(f'{path} and {self.of_image[image]} are both of image {image}: remove one of them')
        self.of_image[image] = path
        return image

    def _object(self, x: Element, path: Path) -> dict[str, Any]:
        name = (x.findtext('name') or '').strip()
        try:
            x1, y1, x2, y2 = (float(x.findtext(f'bndbox/{key}')) for key in ('xmin', 'ymin', 'xmax', 'ymax'))
        except (TypeError, ValueError) as error:
            raise DataError(f'{path} has an object without name, or bndbox of four numbers: write them') from error
        if not name or not all(map(math.isfinite, (x1, y1, x2, y2))):
            raise DataError(f'{path} has an object without name, or bndbox of four numbers: write them')
        if x2 < x1 or y2 < y1:
            box = f'xmin {x1:g}, xmax {x2:g}, ymin {y1:g}, ymax {y2:g}'
            raise DataError(f'{path} has an object {name[:80]} with {box}: write the smaller number as min')
        if min(x1, y1) < 1:
            self._count('objects begin before pixel 1, from which boxes are counted', path)
        if x.find('part') is not None:
            self._count('objects have parts, which are left out', path)
        is_difficult = (x.findtext('difficult') or '').strip().lower() in ('1', 'true')
        if is_difficult:
            self._count('difficult objects become crowd regions, which are ignored', path)
        box = {'category': name, 'bbox': [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]}
        return box | ({'iscrowd': 1} if is_difficult else {})

    def _count(self, what: str, path: Path) -> None:
        self.counts.setdefault(what, []).append(path)
