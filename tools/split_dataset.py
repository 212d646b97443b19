"""Split class folders of your own pictures into train/ and val/, copying the files.

    python -m tools.split_dataset pictures --output output/pictures

DIR holds a folder of images for each class. Of every class, a random but fixed part goes to val/. Copies of a picture
stay together, whatever their names and classes, so no picture is in both: equal files, and pictures that were encoded
again or resized.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

from data.image_folder import ClassFolders
from data.images import DataError
from tools.check_dataset import check_split
from tools.duplicates import content_hash, group_copies, similar_pairs
from utils import exit_on_user_error, fraction, home_path, non_negative_int, printable, report_write_errors


def split_classes(samples: ClassFolders, fraction: float, seed: int = 0, workers: int = 0) -> dict[str, list[int]]:
    """Choose the samples of each split, class by class; copies of a picture go to one split.

    Args:
        samples: the class folders.
        fraction: part of each class's different images that goes to `val`: at least one, and not all.
        seed: of the choice.
        workers: processes that read the images.

    Returns:
        Indices of the samples, by split, in order.

    Raises:
        DataError: a class with fewer than two different images, or whose images are all copies of other classes', or
            images that cannot be read.
    """
    rng, sides = random.Random(seed), {}  # copies -> split
    groups = _find_copies(samples, workers)
    for target, name in enumerate(samples.classes):
        copies = list(dict.fromkeys(groups[samples.targets == target].tolist()))
        if len(copies) < 2:
            raise DataError(_too_few(samples, name, len(copies)))
        rng.shuffle(copies)
        count = min(max(round(fraction * len(copies)), 1), len(copies) - 1)
        chosen = [sides[group] for group in copies if group in sides]  # with another class
        free = [group for group in copies if group not in sides]
        count = max(count - chosen.count('val'), 0)
        sides |= dict.fromkeys(free[:count], 'val') | dict.fromkeys(free[count:], 'train')
        if len({sides[group] for group in copies}) < 2:
            raise DataError(
                f'class {name} of {samples.root} shares its pictures with other classes, and cannot be split so that '
                f'no picture is in both train and val: keep each picture in one class'
            )
    splits = {'train': [], 'val': []}
    for index, group in enumerate(groups.tolist()):
        splits[sides[group]].append(index)
    return splits


def _find_copies(samples: ClassFolders, workers: int) -> np.ndarray:
    """A number for each sample (N,) that is the same for copies of one picture.

    In a class of fewer than two different pictures, such as the frames of a still film, only equal files are copies.
    """
    images = check_split(samples, workers, lambda problem: None, samples.root.name)
    contents = np.array([image.content for image in images], np.uint64)
    for index in np.flatnonzero(contents == 0).tolist():  # images that cannot be decoded are copied all the same
        contents[index] = content_hash(samples.read(index))
    equal = group_copies(contents, np.zeros((0, 2), np.int64))
    groups = group_copies(contents, similar_pairs([image.picture for image in images]))
    alike = [target for target in range(len(samples.classes)) if len(set(groups[samples.targets == target])) < 2]
    undone = np.isin(groups, groups[np.isin(samples.targets, alike)])
    groups = np.where(undone, equal + len(groups), groups)
    samples.notes += _describe_copies(samples, groups)
    return groups


def _too_few(samples: ClassFolders, name: str, count: int) -> str:
    if count == 0 and name in samples.other_kinds:  # such as images that are not read
        return samples.describe_empty(name)
    return (
        f'class {name} of {samples.root} has {count} different image(s): '
        f'give it two, one to train on and one to validate on, or remove it'
    )


def _describe_copies(samples: ClassFolders, groups: np.ndarray) -> list[str]:
    """Lines on the copies that were found, with an example of each kind."""
    order = np.lexsort((np.arange(len(groups)), groups))
    copies = order[1:][groups[order[1:]] == groups[order[:-1]]]
    originals = order[:-1][groups[order[1:]] == groups[order[:-1]]]
    notes = []
    if len(copies):
        example = f'{samples.names[originals[0]]} and {samples.names[copies[0]]}'
        notes.append(f'{len(copies)} duplicate image(s) stay in the split of their original, such as {example}')
    other_class = np.flatnonzero(samples.targets[copies] != samples.targets[originals])
    if len(other_class):
        example = ' and '.join(samples.names[x[other_class[0]]] for x in (originals, copies))
        notes.append(f'{len(other_class)} of them are in another class than their original: for example {example}')
    return notes


def split_dataset(folder: Path, output: Path, fraction: float, seed: int = 0, workers: int = 0) -> dict[str, int]:
    """Copy class folders to `output/train/<class>/` and `output/val/<class>/`; `output` appears when it is complete.

    Args:
        folder: of class folders.
        output: a folder that does not exist yet.
        fraction: see `split_classes`.
        seed: see `split_classes`.
        workers: see `split_classes`.

    Returns:
        Images copied, by split.

    Raises:
        DataError: see `split_classes`; or `output` exists, or is in `folder`.
        UserError: `output` cannot be written.
    """
    folder, output = folder.resolve(), output.resolve()
    if not os.path.isdir(folder):
        raise DataError(f'{folder} is not a folder: give the one that holds a folder of images for each class')
    if folder in (output, *output.parents):
        raise DataError(f'--output {output} is in {folder}, with the pictures: write another')
    if output.exists():
        raise DataError(f'{output} exists: write another --output, or remove it')
    samples = ClassFolders(folder.parent, folder.name)
    splits = split_classes(samples, fraction, seed, workers)
    with report_write_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f'.{output.name}.', dir=output.parent))
        try:
            for split, indices in splits.items():
                for index in indices:
                    target = partial / split / samples.names[index]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    if target.exists():  # on a file system for which the names are equal
                        raise DataError(
                            f'{samples.describe(index)} has the name of another image in {output}: rename it'
                        )
                    shutil.copyfile(samples.describe(index), target)
            partial.chmod(0o755)
            partial.rename(output)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    for note in samples.notes:
        print(printable(note), file=sys.stderr)
    return {split: len(indices) for split, indices in splits.items()}


def main() -> None:
    """Read the command line and split."""
    parser = argparse.ArgumentParser(
        'python -m tools.split_dataset',
        description=f'{__doc__.splitlines()[0]} Copies of an image go to the same split.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='example: python -m tools.split_dataset pictures --output output/pictures --val 0.2',
    )
    add = parser.add_argument
    add('folder', type=home_path, metavar='DIR', help='folder that holds a folder of images for each class')
    add('--output', type=home_path, required=True, metavar='DIR', help='new folder to write train/ and val/ in')
    add('--val', type=fraction, default=0.2, metavar='F', help='fraction of each class that goes to val/ (0.2)')
    add('--seed', type=int, default=0, metavar='N', help='random seed of the split (0)')
    add(
        '--workers',
        type=non_negative_int,
        default=0,
        metavar='N',
        help='DataLoader workers; 0 reads in the main process (0)',
    )
    args = parser.parse_args()
    with exit_on_user_error():
        written = split_dataset(args.folder, args.output, args.val, args.seed, args.workers)
        counts = f'{written["train"]} training and {written["val"]} validation images'
        print(printable(f'{args.output}: {counts}'))


if __name__ == '__main__':
    main()
