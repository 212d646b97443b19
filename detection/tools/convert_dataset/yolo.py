"""Reader of YOLO's text files, as of Ultralytics, Roboflow, Label Studio, CVAT, labelImg and Darknet."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from data import DataError
from data.images import existing_path, is_image_file, read_header
from detection.tools.convert_dataset.source import Item, Source, decode_file, read_lines
from utils import first_few

# Where a split's images may be named, in data.yaml and as folders.
_SPLIT_NAMES = {'train': ('train',), 'val': ('val', 'valid', 'validation'), 'test': ('test',)}

_NO_VALUE = ('', '~', 'null', 'Null', 'NULL', 'None')  # of a key of data.yaml that is not set

# Text files next to labels that are not labels.
_NO_LABELS = ('classes.txt', 'train.txt', 'val.txt', 'valid.txt', 'test.txt')


class Description(NamedTuple):
    """What data.yaml, or Darknet's files, say.

    Attributes:
        file: that says it.
        root: folder that entries begin at.
        names: of the classes, by their numbers in label files.
        splits: folders of images and lists of images, by split.
        keypoints: numbers in a line after the box, for keypoints; None where the file does not say.
    """

    file: Path
    root: Path
    names: dict[int, str]
    splits: dict[str, list[str]]
    keypoints: int | None = None


def read_yolo(path: Path, polygons: bool = False) -> Source:
    """Read the images that a `data.yaml`, or Darknet's `obj.names` or `classes.txt`, describes, and their labels.

    Labels are in `labels` where images are in `images`, or else next to them. A line is a class and a box (centre and
    size) or the corners of a polygon, relative to the image's size. Keypoints after a box are left out, where the file
    has their `kpt_shape`.

    Args:
        path: the file, or the folder that holds it.
        polygons: lines of more numbers than a box are polygons, even where they might be keypoints.

    Raises:
        DataError: a file cannot be read, a line is something else, or a split has no labels.
    """
    file = path if path.is_file() else find_description(path)
    if file is None:
        raise DataError(f'{path} has no data.yaml: add it, with the names of the classes')
    description = _read_yaml(file) if file.suffix in ('.yaml', '.yml') else _read_darknet(file)
    if not description.splits:
        raise DataError(f'{file} has no train: write the folder of the training images')
    labels, source = _Labels(description), Source(list(description.names.values()), {})
    for split, entries in description.splits.items():
        images = dict(_images(description, split, entries))
        items = [labels.item(image, folder) for image, folder in images.items()]
        count = sum(labels.path_of(image) in labels.used for image in images)
        if count:
            source.splits[split] = items
            source.notes.append(
                f'{split}: {count} of {len(images)} images have a label file; the others count as images without '
                f'objects'
            )
        elif split == 'test' and source.splits:
            source.notes.append(f'test: {len(images)} images without any label file are left out')
        else:
            raise DataError(
                f'{len(images)} images of {split}, and none has a label file, such as '
                f'{labels.path_of(next(iter(images)))}: put the labels there'
            )
    labels.check_kind(polygons)
    if not os.path.isdir(description.root):
        source.notes.append(
            f'{description.root}, the path in {file}, does not exist: folders are those in {file.parent}'
        )
    source.notes += labels.notes() + _shared_images(source)
    return source


def find_description(folder: Path) -> Path | None:
    """The file that describes a folder's data: data.yaml, or the only YAML file, or Darknet's lists of classes."""
    yamls = sorted(x for suffix in ('yaml', 'yml') for x in folder.glob(f'*.{suffix}'))
    names = ('data.yaml', 'obj.data', 'obj.names', 'classes.txt', 'labels/classes.txt', 'data/obj.names')
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    return found or (yamls[0] if len(yamls) == 1 else None)


# Descriptions


def _read_yaml(file: Path) -> Description:
    """Read a data.yaml; every value is text as written, so the class `no` is not false."""
    try:
        content = yaml.load(decode_file(file), Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise DataError(f'{file} is not YAML: {" ".join(str(error).split())}') from error
    except RecursionError:
        raise DataError(f'{file} is not YAML that can be read: it is nested too deeply') from None
    names = content.get('names') if isinstance(content, Mapping) else None
    if isinstance(names, str) and names not in _NO_VALUE and os.path.isfile(file.parent / names):
        names = list(filter(None, read_lines(file.parent / names)))
    names = _check_names(names, file)
    if content.get('nc', '') not in (*_NO_VALUE, str(len(names))):
        raise DataError(f'{file} has {len(names)} names, but another number of classes as nc: make them agree')
    splits = {}
    for split, keys in _SPLIT_NAMES.items():
        value = next((content[key] for key in keys if content.get(key, '') not in _NO_VALUE), [])
        entries = [value] if isinstance(value, str) else value
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise DataError(f'{file}: {split} is not a folder or a list of folders: write where the images are')
        if entries:
            splits[split] = entries
    path = content.get('path', '')
    root = file.parent / _posix(path if isinstance(path, str) and path not in _NO_VALUE else '')
    return Description(file, root, names, splits, _keypoint_numbers(content.get('kpt_shape'), file))


def _check_names(names: Any, file: Path) -> dict[int, str]:
    """Names of the classes by their numbers in label files."""
    if isinstance(names, list):
        names = {str(number): name for number, name in enumerate(names)}
    is_mapping = isinstance(names, Mapping) and names
    if not is_mapping or not all(_is_count(x) for x in names) or not all(isinstance(x, str) for x in names.values()):
        raise DataError(f'{file} has no names of the classes: write a list, or numbers with their names')
    names = {int(key): names[key] for key in sorted(names, key=int)}
    if not all(name.strip() for name in names.values()):
        raise DataError(f'{file} has a class without a name: write it')
    if len(set(names.values())) < len(names):
        raise DataError(f'{file} has two classes of one name: rename one of them')
    return names


def _is_count(text: Any) -> bool:
    return isinstance(text, str) and text.isdecimal() and len(text) < 7


def _keypoint_numbers(shape: Any, file: Path) -> int | None:
    if shape is None:
        return None
    if not (isinstance(shape, list) and len(shape) == 2 and all(map(_is_count, shape)) and shape[1] in ('2', '3')):
        raise DataError(f'{file}: kpt_shape is not a number of keypoints with 2 or 3: write them, as in [17, 3]')
    return int(shape[0]) * int(shape[1])


def _read_darknet(file: Path) -> Description:
    """Read obj.data, or only names of classes, one on each line; then splits are found by their folders."""
    folder = file.parent.parent if file.parent.name in ('data', 'labels') else file.parent
    if file.suffix != '.data':
        names = list(filter(None, read_lines(file)))
        return Description(file, folder, _check_names(names, file), _find_splits(folder))
    pairs = (line.partition('=') for line in read_lines(file) if '=' in line)
    content = {key.strip(): value.strip() for key, _, value in pairs}
    path = _first_that_exists([folder], content.get('names') or 'obj.names')
    if path is None:
        raise DataError(f'{file} names no file of the names of the classes: write names = obj.names')
    names = list(filter(None, read_lines(path)))
    values = {
        split: next((content[key] for key in keys if content.get(key)), '') for split, keys in _SPLIT_NAMES.items()
    }
    splits = {split: [value] for split, value in values.items() if value}
    return Description(file, folder, _check_names(names, path), splits)


def _find_splits(folder: Path) -> dict[str, list[str]]:
    """Images by the usual places of splits; without these, those of `images/` or the folder are for training."""
    splits = {}
    for split, names in _SPLIT_NAMES.items():
        choices = [x for name in names for x in (f'images/{name}', f'{name}/images', f'{name}.txt', name)]
        if found := next((x for x in choices if (folder / x).exists()), None):
            splits[split] = [found]
    return splits or {'train': ['images' if (folder / 'images').is_dir() else '.']}


# Images


def _posix(text: str) -> str:
    return text.replace('\\', '/')


def _first_that_exists(folders: Sequence[Path], entry: str) -> Path | None:
    """A file or folder of this name: Roboflow writes ../train where train is meant, Darknet data/train.txt."""
    entry = _posix(entry)
    names = dict.fromkeys((entry, entry.removeprefix('../'), entry.removeprefix('data/')))
    paths = (existing_path(folder, name) for name in names for folder in folders)
    return next(filter(os.path.exists, paths), None)


def _images(description: Description, split: str, entries: Sequence[str]) -> Iterator[tuple[Path, Path]]:
    """Images of a split, each with the folder that its name in the dataset begins at."""
    file, root = description.file, description.root
    for entry in entries:
        found = _first_that_exists([root, file.parent], entry)
        if found is None:
            raise DataError(f'{file}: {split} is {entry}, which does not exist in {root}: write where the images are')
        if str(found.resolve()) == found.resolve().anchor:  # searching a whole disk takes hours
            raise DataError(f'{file}: {split} is {entry}, which is a whole disk: write the folder of the images')
        images = list(_listed_images(found, root))
        if not images:
            raise DataError(f'{found}, for the images of {split}, has none: write where the images are')
        yield from ((image, found if found.is_dir() else image.parent) for image in images)


def _listed_images(found: Path, root: Path) -> Iterator[Path]:
    """The images in a folder, or of a list of files."""
    if found.is_dir():
        yield from (x for x in sorted(found.rglob('*')) if is_image_file(x.name) and x.is_file())
        return
    for number, line in enumerate(read_lines(found), start=1):
        if line:
            path = _first_that_exists([found.parent, root], line)
            if path is None:
                raise DataError(f'image {line[:200]} of {found}, line {number}, does not exist: add it')
            yield path


def _shared_images(source: Source) -> list[str]:
    """A note where images to train on are to validate or test with too."""
    paths = {split: {item.path for item in items} for split, items in source.splits.items()}
    train = paths.get('train', set())
    return [
        f'train and {split} share {len(train & others)} images'
        for split, others in paths.items()
        if split != 'train' and train & others
    ]


# Labels


class _Labels:
    """Reads label files, and counts the kinds of their lines.

    Attributes:
        used: label files that have been read.
    """

    def __init__(self, description: Description):
        self.description = description
        self.used: set[Path] = set()
        self.keypoint_objects = 0
        self.lengths: Counter[int] = Counter()  # lines of polygons, by how many numbers they have
        self.pose_lines = 0  # that can be read as a box with keypoints in it, too

    def path_of(self, image: Path) -> Path:
        """The label file of an image, which need not exist."""
        parts, beside = list(image.with_suffix('.txt').parts), image.with_suffix('.txt')
        if 'images' in parts:
            parts[len(parts) - 1 - parts[::-1].index('images')] = 'labels'
        path, beside = (existing_path(x.parent, x.name) for x in (Path(*parts), beside))
        return beside if beside.is_file() and not path.is_file() else path

    def item(self, image: Path, folder: Path) -> Item:
        """An image with its objects; without a label file, it has none."""
        label, size, objects = self.path_of(image), read_header(image).upright_size, []
        if label.is_file():
            self.used.add(label)
            for number, line in enumerate(read_lines(label), start=1):
                if line:
                    objects.append(self._object(line, size, f'{label}, line {number}'))
        return Item(image, str(image.relative_to(folder)), size, objects)

    def _object(self, line: str, size: tuple[int, int], where: str) -> dict[str, Any]:
        where = f'{where} is {line[:200]!r}'
        try:
            index, *values = map(float, line.split())
        except ValueError as error:
            commas = ', with points as decimal marks and spaces between them' if ',' in line else ''
            raise DataError(f'{where}: write a class and numbers{commas}') from error
        names, keypoints = self.description.names, self.description.keypoints
        if keypoints is not None and len(values) == 4 + keypoints:
            values = values[:4]
            self.keypoint_objects += 1
        is_polygon = keypoints is None and len(values) >= 6 and len(values) % 2 == 0
        if not (is_polygon or len(values) == 4) or not all(-1 <= x <= 2 for x in values):  # NaN is not, either
            hint = '; keypoints need a kpt_shape in data.yaml that fits' if len(values) > 5 and not is_polygon else ''
            hint = '; a confidence after the box is of predictions, not of labels' if len(values) == 5 else hint
            raise DataError(f'{where}: write a class and a box, or corners, between 0 and 1{hint}')
        if not is_polygon and min(values[2:]) < 0:
            raise DataError(f'{where}: a box has a negative size: write its centre, width and height')
        if index not in names:
            raise DataError(f'{where}: it has class {index:g}, which names does not have: add it there')
        width, height = size
        category = names[int(index)]
        if not is_polygon:
            x, y, w, h = values
            return {'category': category, 'bbox': [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]}
        self.lengths[len(values)] += 1
        self.pose_lines += _is_like_pose(values)
        xs, ys = [x * width for x in values[::2]], [y * height for y in values[1::2]]
        corners = [x for corner in zip(xs, ys, strict=True) for x in corner]
        box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
        return {'category': category, 'bbox': box, 'segmentation': [corners]}

    def check_kind(self, polygons: bool) -> None:
        """Refuse lines that are keypoints as likely as polygons, unless they are said to be polygons.

        Raises:
            DataError: they are; the message says what to write.
        """
        if not polygons and len(self.lengths) == 1 and self.pose_lines == self.lengths.total():
            numbers = next(iter(self.lengths))
            shapes = [f'[{(numbers - 4) // step}, {step}]' for step in (2, 3) if (numbers - 4) % step == 0]
            raise DataError(
                f'{self.description.file}: all lines have {numbers} numbers after the class, which can be a box with '
                f'keypoints in it or a polygon: add kpt_shape: {" or ".join(shapes)} there, or give --polygons'
            )

    def notes(self) -> list[str]:
        """What the user should know about the label files."""
        notes = []
        if self.keypoint_objects:
            notes.append(f'keypoints of {self.keypoint_objects} objects are left out, and their boxes kept')
        if self.lengths and set(self.lengths) == {8}:
            notes.append(
                f'all {self.lengths.total()} polygons have four corners, as oriented boxes have: each is taken as a '
                f'mask, in an upright box'
            )
        folders = {path.parent for path in self.used}
        unused = sorted({x for folder in folders for x in folder.glob('*.txt') if x.name not in _NO_LABELS} - self.used)
        if unused:
            notes.append(f'{len(unused)} text files next to the labels belong to no image: {first_few(unused)}')
        return notes


def _is_like_pose(values: Sequence[float]) -> bool:
    """Whether numbers can be a box within its image, with keypoints in the box; those not seen may be at 0, 0."""
    x, y, w, h = values[:4]
    low, high = (x - w / 2, y - h / 2), (x + w / 2, y + h / 2)
    if min(low) < -0.02 or max(high) > 1.02:
        return False
    for step in (2, 3):
        rest = values[4:]
        if len(rest) % step:
            continue
        points = list(zip(rest[::step], rest[1::step], strict=True))
        inside = all(
            (px, py) == (0, 0) or (low[0] - 0.02 <= px <= high[0] + 0.02 and low[1] - 0.02 <= py <= high[1] + 0.02)
            for px, py in points
        )
        if inside and (step == 2 or all(flag in (0, 1, 2) for flag in rest[2::3])):
            return True
    return False
