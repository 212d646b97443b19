"""Check a detection dataset before training: annotation files, and every image that they name.

    python -m detection.tools.check_dataset --data-path <coco>
    python -m detection.tools.check_dataset --data-path <folder> --opts DATA.TRAIN_SPLIT train DATA.VAL_SPLIT val

All images are read and decoded in several processes. The summary counts the faults of each kind, with some examples,
and --json writes all of them. The exit code is 1 where there is any.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from data import DataError
from data.images import existing_path, read_file
from detection.config import TREE
from detection.data.annotation_checks import SLACK_PIXELS, corners
from detection.data.annotations import (
    AnnotationReader,
    check_size,
    duplicates,
    has_area,
    has_no_area,
    read_entries,
    read_tree,
)
from detection.data.build import split_files
from detection.data.coco import SplitFiles
from detection.tools.options import add_data_options
from tools.duplicates import CheckedImage, check_image, check_images, similar_pairs
from utils import (
    available_cores,
    exit_on_user_error,
    home_path,
    non_negative_int,
    orderly_termination,
    printable,
    report_write_errors,
)

# Kinds of faults, and what the summary calls them
FAULTS = {
    'file': 'annotation files that cannot be used',
    'empty': 'annotation files without images, categories or objects to train on',
    'entry': 'invalid entries of images, categories or annotations',
    'duplicate': 'ids, names or objects given twice',
    'box': 'boxes without area, outside their images, or away from their masks',
    'mask': 'masks without area',
    'category': 'categories without objects to train on, or missing in a split',
    'missing': 'missing images',
    'broken': 'images that cannot be read',
    'size': 'images of another size than annotated',
    'same': 'images that are in both splits',
    'similar': 'images that look like one of the other split (encoded again or resized)',
}
_EXAMPLES = 3  # in the summary, of each kind


class Fault(NamedTuple):
    """Something wrong with a dataset: its kind in `FAULTS`, the split (`train` or `val`), and what it is in words."""

    kind: str
    split: str
    text: str


@dataclass
class Split:
    """A split as far as it can be read.

    Attributes:
        images: entries of images.
        categories: entries of categories.
        objects: number of valid annotations of each category, by id, without crowd regions.
        counts: numbers of images, objects and so on, for the summary.
    """

    files: SplitFiles
    images: list[dict[str, Any]] = field(default_factory=list)
    categories: list[dict[str, Any]] = field(default_factory=list)
    objects: Counter = field(default_factory=Counter)
    counts: dict[str, int] = field(default_factory=dict)


class _Images(Dataset):
    """A `CheckedImage` by index."""

    def __init__(self, split: Split, upright: bool):
        self.split, self.upright = split, upright

    def __len__(self) -> int:
        return len(self.split.images)

    def __getitem__(self, index: int) -> CheckedImage:
        entry = self.split.images[index]
        path = existing_path(self.split.files.images, entry['file_name'])
        if not os.path.isfile(path):
            return CheckedImage(kind='missing', text=f'image {path} does not exist')
        try:
            image, header = check_image(read_file(path), path)
        except DataError as error:
            return CheckedImage(kind='broken', text=str(error))
        size, annotated = header.upright_size if self.upright else header.size, (entry['width'], entry['height'])
        if size == annotated:
            return image
        text = f'image {path} has {size[0]} x {size[1]} pixels, and its entry {annotated[0]} x {annotated[1]}'
        return image._replace(kind='size', text=text)


def check_file(split: Split, name: str) -> Iterator[Fault]:
    """Read an annotation file as far as possible.

    Args:
        split: with `files`; the rest is filled in.
        name: of the split, `train` or `val`.
    """
    path = split.files.annotations
    errors: list[DataError] = []
    try:
        tree = read_tree(path)
        split.images = list(read_entries(tree, 'images', path, errors.append))
        split.categories = list(read_entries(tree, 'categories', path, errors.append))
        annotations = list(read_entries(tree, 'annotations', path, errors.append))
    except DataError as error:
        yield Fault('file', name, str(error))
        return
    yield from (Fault('entry', name, str(error)) for error in errors)
    for section, key, entries in (
        ('images', 'id', split.images),
        ('images', 'file_name', split.images),
        ('categories', 'id', split.categories),
        ('categories', 'name', split.categories),
        ('annotations', 'id', annotations),
    ):
        for value in duplicates(repr(entry[key]) for entry in entries if key in entry):
            yield Fault('duplicate', name, f'{path}: two of the {section} have the {key} {value}')
    sized = []
    for image in split.images:
        try:
            check_size(image, path)
            sized.append(image)
        except DataError as error:
            yield Fault('entry', name, str(error))
    yield from _check_annotations(split, sized, annotations, name)
    for what, count in (('images', len(sized)), ('categories', len(split.categories))):
        if not count:
            yield Fault('empty', name, f'{path} has no valid {what}')
    if name == 'train' and sized and split.categories and not split.objects:
        yield Fault('empty', name, f'{path} has no objects to train on')


def _check_annotations(
    split: Split, images: list[dict[str, Any]], annotations: list[dict[str, Any]], name: str
) -> Iterator[Fault]:
    """Check annotations of valid images, and count them."""
    path = split.files.annotations
    numbers = {image['id']: number for number, image in reversed(list(enumerate(images)))}
    images = [image | {'id': number} for number, image in enumerate(images)]  # ids may be texts
    reader = AnnotationReader(path, images, numbers, split.categories, with_masks=True)
    placement = reader.placement
    with_objects, seen, crowds = set(), set(), 0
    for number, annotation in enumerate(annotations, start=1):
        label = f'{path}: annotation {str(annotation.get("id", number))[:80]}'
        segmentation, errors, loose = annotation.get('segmentation'), len(placement.errors), len(placement.loose)
        try:
            reader.add(annotation)
        except DataError as error:
            yield Fault('entry', name, str(error))
            continue
        image = images[annotation['image_id']]
        label += f', of {image["file_name"]},'
        if segmentation and has_no_area(segmentation):
            yield Fault('mask', name, f'{label} has polygons of fewer than three corners')
        misplaced = placement.errors[errors:] + placement.loose[loose:]
        yield from (Fault('box', name, text) for text in misplaced)
        if annotation['iscrowd']:
            crowds += 1
            continue
        x1, y1, x2, y2 = corners(annotation['bbox'])
        beyond = max(-x1, -y1, x2 - image['width'], y2 - image['height'])
        if not misplaced and not has_area(annotation, image):
            yield Fault('box', name, f'{label} has the box {annotation["bbox"]}: less than a pixel is in the image')
        elif not misplaced and beyond > SLACK_PIXELS:
            text = f'{label} has the box {annotation["bbox"]}: it leaves the image of {image["width"]} x'
            yield Fault('box', name, f'{text} {image["height"]} pixels by {beyond:g}')
        key = annotation['image_id'], annotation['category_id'], x1, y1, x2, y2
        if key in seen:
            yield Fault('duplicate', name, f'{label} has the category and the box of another object')
        seen.add(key)
        with_objects.add(annotation['image_id'])
        split.objects[annotation['category_id']] += 1
    split.counts = {
        'images': len(split.images),
        'images without objects': len(images) - len(with_objects),
        'objects': split.objects.total(),
        'objects without mask': reader.without_mask,
        'crowd regions': crowds,
        'categories': len(split.categories),
    }


def compare_categories(splits: Mapping[str, Split]) -> Iterator[Fault]:
    """Categories that are not in all splits, and those without objects to train on."""
    names = {name: [x['name'] for x in split.categories] for name, split in splits.items()}
    if len(names) == 2 and names['train'] != names['val'] and all(names.values()):
        for name, other in (('train', 'val'), ('val', 'train')):
            for missing in sorted(set(names[other]) - set(names[name])):
                yield Fault('category', name, f'{missing} is a category of {other} only')
        if set(names['train']) == set(names['val']):
            yield Fault('category', 'val', 'the categories are in another order than in train')
    if 'train' in splits and splits['train'].objects:  # else the fault of the file says so
        for category in splits['train'].categories:
            if not splits['train'].objects[category['id']]:
                yield Fault('category', 'train', f'{category["name"]} has no object')


def compare_images(splits: Mapping[str, Split], images: Mapping[str, Sequence[CheckedImage]]) -> Iterator[Fault]:
    """Pictures that are in both splits: the same file, or encoded again or resized."""
    if len(splits) < 2:
        return

    def path(split: str, index: int) -> Path:
        return splits[split].files.images / splits[split].images[index]['file_name']

    first = {x.content: index for index, x in reversed(list(enumerate(images['train']))) if x.content}
    for index, x in enumerate(images['val']):
        if x.content in first:
            yield Fault('same', 'val', f'{path("val", index)} is the same file as {path("train", first[x.content])}')
    count, reported = len(images['train']), set()
    for one, other in similar_pairs([x.picture for x in (*images['train'], *images['val'])]).tolist():
        index = other - count
        if one < count <= other and index not in reported and images['val'][index].content not in first:
            reported.add(index)
            yield Fault('similar', 'val', f'{path("val", index)} looks like {path("train", one)}')


def check_dataset(files: Mapping[str, SplitFiles], upright: bool, workers: int) -> tuple[dict[str, Any], list[Fault]]:
    """Check the splits of a dataset.

    Args:
        files: of `train`, `val` or both.
        upright: whether annotations are of the images as EXIF turns them.
        workers: processes that read images.

    Returns:
        Counts of each split by name, and all faults.
    """
    splits = {name: Split(x) for name, x in files.items()}
    faults = [fault for name, split in splits.items() for fault in check_file(split, name)]
    faults += compare_categories(splits)
    images = {name: list(check_images(_Images(split, upright), workers, name)) for name, split in splits.items()}
    for name, checked in images.items():
        faults += [Fault(x.kind, name, x.text) for x in checked if x.kind]
        contents = [x.content for x in checked if x.content]
        splits[name].counts |= {
            'images turned by EXIF': sum(x.is_rotated for x in checked),
            'copies of images within the split': len(contents) - len(np.unique(np.array(contents, np.uint64))),
        }
    faults += compare_images(splits, images)
    return {name: split.counts for name, split in splits.items()}, faults


def summary(counts: Mapping[str, Mapping[str, int]], faults: Sequence[Fault]) -> str:
    """The counts of each split, and the faults by kind with some examples."""
    lines = []
    for name, split in counts.items():
        shown = [f'{count:,} {what}' for what, count in split.items() if count or what in ('images', 'objects')]
        lines.append(f'{name}: {", ".join(shown) or "not read"}')
    by_kind = {kind: [fault for fault in faults if fault.kind == kind] for kind in FAULTS}
    for kind, found in by_kind.items():
        if found:
            lines.append(f'{FAULTS[kind]}: {len(found):,}')
            lines += [f'  {fault.split}: {fault.text}' for fault in found[:_EXAMPLES]]
            lines += [f'  and {len(found) - _EXAMPLES:,} more, which --json lists'] * (len(found) > _EXAMPLES)
    return '\n'.join(lines) + ('' if faults else '\nno faults')


def main() -> None:
    """Read the command line, check and print the summary."""
    parser = argparse.ArgumentParser(
        'python -m detection.tools.check_dataset',
        description=__doc__.splitlines()[0],
        epilog='exit code: 0 no faults, 1 faults or an error, 2 a wrong command line',
    )
    add = parser.add_argument
    add_data_options(parser)
    add('--split', nargs='+', choices=('train', 'val'), default=['train', 'val'], help='splits to check (train val)')
    add(
        '--workers',
        type=non_negative_int,
        default=available_cores(),
        metavar='N',
        help='processes that read the images; 0 reads in the main process (default: one per core)',
    )
    add('--json', type=home_path, metavar='FILE', help='also write the counts and all faults as JSON')
    args = parser.parse_args()
    with exit_on_user_error(), orderly_termination():
        config = TREE.load(args.cfg, ['DATA.DATA_PATH', args.data_path, *args.opts])
        if not os.path.isdir(config.DATA.DATA_PATH):
            raise DataError(f'{args.data_path} does not exist: give --data-path the folder of a dataset')
        if args.json:
            with report_write_errors(args.json):  # before the work
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.touch()
        files = {name: split_files(config, name.upper()) for name in dict.fromkeys(args.split)}
        counts, faults = check_dataset(files, config.DATA.EXIF, args.workers)
        if args.json:
            with report_write_errors(args.json):
                tree = {'splits': counts, 'faults': [fault._asdict() for fault in faults]}
                args.json.write_text(json.dumps(tree, indent=1), encoding='utf-8')
        print(printable_lines(summary(counts, faults)))
    sys.exit(bool(faults))


def printable_lines(text: str) -> str:
    """A text with the control characters of its lines escaped."""
    return '\n'.join(map(printable, text.splitlines()))


if __name__ == '__main__':
    main()
