"""Convert a detection dataset (COCO, YOLO, Pascal VOC) to COCO's layout, check it, and draw sample images.

    python -m detection.tools.convert_dataset <export> --output <folder>

Reads exports in COCO's format (Roboflow, Label Studio, CVAT), YOLO's text files, and Pascal VOC's XML files. Boxes and
masks stay as they are; images are copied, and nothing is written outside the folder. Choices that the files leave open
are reported on stderr. `samples.png` shows some of the result with its boxes.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data import DataError
from data.images import choose_images
from detection.data import CocoDataset
from detection.draw import draw_sheet
from detection.tools.convert_dataset.formats import READERS, detect_format
from detection.tools.convert_dataset.names import UniqueNames
from detection.tools.convert_dataset.source import Item, Source
from detection.tools.convert_dataset.yolo import read_yolo
from text_files import read_json
from utils import exit_on_user_error, first_few, fraction, home_path, printable, report_write_errors

EPILOG = """examples:
  python -m detection.tools.convert_dataset roboflow_export --output output/mine
  python -m detection.tools.convert_dataset yolo/data.yaml --output output/mine --link
  python -m detection.tools.convert_dataset VOCdevkit/VOC2012 --output output/voc
  python -m detection.tools.convert_dataset labelstudio/result.json --output output/mine --val-fraction 0.1
"""


def convert(source: Source, output: Path, links: bool = False, val_fraction: float = 0.2) -> dict[str, int]:
    """Write a dataset in COCO's layout: `annotations/instances_<split>.json`, and the images in `<split>/`.

    Where there is no `val`, the `test` images become it or, without these, a part of the training images.
    There need not be training images. Images keep their names as far as these stay in the folder and are not taken.

    Args:
        source: the dataset; notes on what has been chosen are added.
        output: a folder that does not exist yet, or an empty one.
        links: make symbolic links to the images, instead of copies.
        val_fraction: part of the training images that becomes `val` where there is nothing else.

    Returns:
        Images by split.

    Raises:
        DataError: there are too few images.
        OutputError: the folder cannot be written.
    """
    splits = dict(source.splits)
    if 'val' not in splits and 'test' in splits:
        splits['val'] = splits.pop('test')
        source.notes.append('there are no validation images: those to test with become val')
    if 'val' not in splits:
        splits['train'], splits['val'] = _divide(splits['train'], val_fraction)
        source.notes.append(
            f'there are no validation images: {len(splits["val"])} of {len(source.splits["train"])} training images, a '
            f'random but fixed choice, become val (--val-fraction)'
        )
    with report_write_errors(output):
        (output / 'annotations').mkdir(parents=True)
        for split, items in splits.items():
            names = UniqueNames()
            items = [item._replace(name=names.add(item.name)) for item in items]
            if names.renamed:
                pairs = first_few([f'{old} is {new}' for old, new in names.renamed])
                source.notes.append(f'{split}: {len(names.renamed)} images of equal names are renamed: {pairs}')
            _write_images(items, output / split, links)
            text = json.dumps(to_coco(source.categories, items))
            (output / 'annotations' / f'instances_{split}.json').write_text(text, encoding='utf-8')
    return {split: len(items) for split, items in splits.items()}


def to_coco(categories: list[str], items: list[Item]) -> dict[str, Any]:
    """A split in COCO's format; ids count from 1."""
    ids = {name: i for i, name in enumerate(categories, start=1)}
    images, annotations = [], []
    for i, item in enumerate(items, start=1):
        images.append({'id': i, 'file_name': item.name, 'width': item.size[0], 'height': item.size[1]})
        for x in item.objects:
            own = {key: value for key, value in x.items() if key != 'category'}
            annotation = {'id': len(annotations) + 1, 'image_id': i, 'category_id': ids[x['category']], 'iscrowd': 0}
            annotations.append(annotation | own)
    entries = [{'id': i, 'name': name} for name, i in ids.items()]
    return {'images': images, 'annotations': annotations, 'categories': entries}


def _divide(items: list[Item], fraction: float) -> tuple[list[Item], list[Item]]:
    """Training and validation images: a random but fixed choice."""
    if len(items) < 2:
        raise DataError(f'there are {len(items)} images, and none to validate on: give two or more')
    count = min(max(round(fraction * len(items)), 1), len(items) - 1)
    chosen = set(choose_images(range(len(items)), count))
    return [x for i, x in enumerate(items) if i not in chosen], [x for i, x in enumerate(items) if i in chosen]


def _write_images(items: list[Item], folder: Path, links: bool) -> None:
    for item in items:
        target = folder / item.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if links:
            target.symlink_to(item.path.resolve())
        else:
            shutil.copyfile(item.path, target)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Context with a folder that becomes `path` at its end; after an error nothing is left of it.

    Raises:
        DataError: something of that name has come up meanwhile.
        OutputError: the folder cannot be written.
    """
    with report_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f'.{path.name}.', dir=path.parent))
    try:
        yield folder
        folder.chmod(0o755)
        if path.exists():
            raise DataError(f'{path} exists by now: write another --output')
        with report_write_errors(path):
            folder.rename(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def open_converted(folder: Path, split: str, source: Path) -> CocoDataset:
    """Open a split, which checks it; with masks, if it has any.

    Raises:
        DataError: the data cannot be used.
    """
    path = folder / 'annotations' / f'instances_{split}.json'
    tree = read_json(path, str(path), DataError)
    has_masks = any('segmentation' in x for x in tree['annotations'])
    try:
        return CocoDataset(folder, split, with_masks=has_masks)
    except DataError as error:
        text = str(error).replace(str(folder), '<converted>')
        raise DataError(f'{source}, {split}: {text} (images and objects are counted from 1)') from error


def main() -> None:
    """Read the command line and convert."""
    parser = argparse.ArgumentParser(
        'python -m detection.tools.convert_dataset',
        description=__doc__.splitlines()[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        'source',
        type=home_path,
        metavar='SOURCE',
        help='folder of the dataset, a data.yaml, or a COCO JSON file',
    )
    add('--output', type=home_path, required=True, metavar='DIR', help='folder to write; it must not exist')
    add('--format', choices=READERS, help='format of the dataset (default: recognised from its files)')
    add('--link', action='store_true', help='make symbolic links to the images, instead of copies')
    add(
        '--val-fraction',
        type=fraction,
        default=0.2,
        metavar='F',
        help='fraction of train that becomes val where there is no split (0.2)',
    )
    add('--polygons', action='store_true', help='read YOLO lines that could be keypoints or polygons as polygons')
    args = parser.parse_args()
    with exit_on_user_error():
        if not args.source.exists():
            raise DataError(f'{args.source} does not exist: give the folder of the data')
        if args.output.exists():
            raise DataError(f'{args.output} exists: write another --output')
        name = args.format or detect_format(args.source)
        source = read_yolo(args.source, args.polygons) if name == 'yolo' else READERS[name](args.source)
        with new_folder(args.output) as folder:
            counts = convert(source, folder, args.link, args.val_fraction)
            datasets = {split: open_converted(folder, split, args.source) for split in counts}
            draw_sheet(next(iter(datasets.values()))).save(folder / 'samples.png')
        for note in source.notes:
            print(printable(note), file=sys.stderr)
        for split, dataset in datasets.items():
            annotations = dataset.ground_truth['annotations']
            empty = counts[split] - len({x['image_id'] for x in annotations})
            text = f'{split}: {counts[split]} images, {empty} of them without objects, {len(annotations)} objects'
            print(printable('; '.join([text, *dataset.notes])))
        opts = f'MODEL.NUM_CLASSES {len(source.categories)} DATA.TRAIN_SPLIT train DATA.VAL_SPLIT val'
        opts += '' if all(dataset.with_masks for dataset in datasets.values()) else ' MODEL.MASK.ENABLED False'
        print(printable(f'Look at {args.output / "samples.png"}, then: --data-path {args.output} --opts {opts}'))


if __name__ == '__main__':
    main()
