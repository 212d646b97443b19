"""Split an annotation file in COCO's format into a training and a validation file; images stay where they are.

    python -m detection.tools.split_coco annotations/instances.json --val 0.1 --output annotations/split

Writes instances_train.json and instances_val.json. Each class has, as nearly as possible, the same fraction of its
images in both. With --group-by, images of one group, such as the frames of a film, stay together.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from data import DataError
from detection.data.annotations import duplicates, read_entries
from text_files import read_json
from utils import exit_on_user_error, first_few, fraction, home_path, non_negative_int, printable, report_write_errors


def choose_val(shown: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Choose the groups of images that become `val`, by iterative stratification.

    The groups of the rarest class are divided first: each goes to the split that lacks more images of the class.

    Args:
        shown: number of images of each group that show each class, (groups, classes).
        fraction: of images that become `val`.
        seed: of the order of groups.

    Returns:
        Whether each group becomes `val`, (groups,): at least one, and not all.

    Source: Sechidis et al., On the Stratification of Multi-Label Data, 2011.
    """
    order = np.random.default_rng(seed).permutation(len(shown))
    lacking = np.array([[1 - fraction], [fraction]]) * shown.sum(axis=0)  # of train and val, (2, classes)
    sides, is_free = np.zeros(len(shown), np.int64), np.ones(len(shown), bool)
    while (remaining := (shown[is_free] > 0).sum(axis=0)).any():
        rarest = np.where(remaining, remaining, len(shown) + 1).argmin()
        for group in order[(is_free & (shown[:, rarest] > 0))[order]].tolist():
            train, val = lacking[:, rarest]
            if train == val:
                train, val = lacking.sum(axis=1)
            sides[group] = val > train
            lacking[sides[group]] -= shown[group]
            is_free[group] = False
    if sides.min() == sides.max():
        sides[order[0]] = 1 - sides[order[0]]
    return sides == 1


def split_tree(
    tree: dict[str, Any], path: Path, fraction: float, seed: int = 0, group_by: str | None = None
) -> dict[str, dict[str, Any]]:
    """Split the content of an annotation file by image.

    Args:
        tree: the content; each split has all of it but for its images and annotations.
        path: the file, for messages.
        fraction: see `choose_val`.
        seed: see `choose_val`.
        group_by: key of the images' entries; images of one value stay together.

    Returns:
        The content of `train` and of `val`.

    Raises:
        DataError: it is not in COCO's format, has no objects, has an id or the name of a category twice, has fewer than
            two groups, or an image lacks the key.
    """
    images, categories, annotations = (
        list(read_entries(tree, section, path)) for section in ('images', 'categories', 'annotations')
    )
    for what, entries in (('categories', categories), ('annotations', annotations)):
        if not entries:
            raise DataError(f'{path} has no {what}, so there are no objects to divide: give a file with objects')
    for key in ('id', 'name'):
        if repeated := duplicates(category[key] for category in categories):
            raise DataError(f'{path}: two of the categories have the {key} {repeated[0]!r}: give each its own')
    groups = {image['id']: _group(image, group_by, path) for image in images}
    if len(groups) < len(images):
        raise DataError(f'{path}: two of the images have one id: give each its own')
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups.values()))}
    if len(numbers) < 2:
        what = f'value of {group_by}' if group_by else 'image'
        raise DataError(f'{path} has {len(numbers)} {what}, of which none is left to validate on: give two or more')
    classes = {category['id']: number for number, category in enumerate(categories)}
    pairs = {(x['image_id'], x['category_id']) for x in annotations}
    shown = np.zeros((len(numbers), len(classes) + 1), np.int64)  # the last column counts all images
    for group in groups.values():
        shown[numbers[group], -1] += 1
    for image_id, category_id in pairs:
        if image_id not in groups or category_id not in classes:
            missing = f'image {image_id}' if image_id not in groups else f'category {category_id}'
            raise DataError(
                f'{path} has an annotation of {missing}, which it does not list: remove it or add the entry'
            )
        shown[numbers[groups[image_id]], classes[category_id]] += 1
    is_val = choose_val(shown, fraction, seed)
    splits = {}
    for name, side in (('train', False), ('val', True)):
        own = {image_id for image_id, group in groups.items() if is_val[numbers[group]] == side}
        splits[name] = tree | {
            'images': [x for x in images if x['id'] in own],
            'annotations': [x for x in annotations if x['image_id'] in own],
        }
    return splits


def _group(image: dict[str, Any], key: str | None, path: Path) -> Any:
    if key is None:
        return image['id']
    value = image.get(key)
    if not isinstance(value, int | str):
        keys = ', '.join(sorted(image))
        raise DataError(f'{path}: image {image["file_name"]} has no number or text {key}: it has {keys}')
    return value


def missing_classes(split: dict[str, Any]) -> list[str]:
    """Names of the classes without objects."""
    used = {x['category_id'] for x in split['annotations']}
    return [x['name'] for x in split['categories'] if x['id'] not in used]


def main() -> None:
    """Read the command line, split, and print what to train with."""
    parser = argparse.ArgumentParser(
        'python -m detection.tools.split_coco',
        description=__doc__.splitlines()[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='example:\n  python -m detection.tools.split_coco instances.json --val 0.1 --output split',
    )
    add = parser.add_argument
    add('annotations', type=home_path, metavar='FILE', help="annotation file in COCO's format")
    add('--output', type=home_path, required=True, metavar='DIR', help='folder for the two annotation files')
    add('--val', type=fraction, default=0.2, metavar='F', help='fraction of the images to validate on (0.2)')
    add('--seed', type=non_negative_int, default=0, metavar='N', help='random seed of the split (0)')
    add(
        '--group-by',
        metavar='KEY',
        help='key of the entries of images, such as video_id: images of one value go to the same split',
    )
    args = parser.parse_args()
    with exit_on_user_error():
        files = {name: args.output / f'instances_{name}.json' for name in ('train', 'val')}
        for path in files.values():
            if path.exists():
                raise DataError(f'{path} exists: write another --output, or remove it')
        file = args.annotations
        tree = read_json(file, f'annotation file {file}', DataError, "give a file in COCO's format")
        splits = split_tree(tree if isinstance(tree, dict) else {}, file, args.val, args.seed, args.group_by)
        with report_write_errors(args.output):
            args.output.mkdir(parents=True, exist_ok=True)
            for name, split in splits.items():
                files[name].write_text(json.dumps(split), encoding='utf-8')
        for name, split in splits.items():
            text = f'{files[name]}: {len(split["images"])} images, {len(split["annotations"])} annotations'
            missing = missing_classes(split)
            print(printable(text + (f'; no object of {first_few(missing, 5)}' if missing else '')))
        paths = {name: shlex.quote(str(path.resolve())) for name, path in files.items()}
        opts = ' '.join(f'DATA.{x}_ANNOTATIONS {paths[x.lower()]} DATA.{x}_IMAGES .' for x in ('TRAIN', 'VAL'))
        print(printable(f'train with --data-path <folder of the images> --opts MODEL.NUM_CLASSES None {opts}'))


if __name__ == '__main__':
    main()
