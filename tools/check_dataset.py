"""Check every image of a dataset: list broken images, empty classes, and duplicates between train and val or classes.

    python -m tools.check_dataset <imagenet>

PATH may have any format that DATA.DATASET knows. Images are decoded as in training; the checksums of shards are
verified too. Copies of a picture are found if the files are equal, or if the picture was encoded again or resized.
Problems are printed as they are found, so an interrupted check has listed those so far. The last line counts them, and
the images that are rotated by their EXIF tag. The exit code is 1 where there is anything to list.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset

from data.file_loader import print_above_bar
from data.formats import FORMATS, check_same_classes, find_format
from data.images import DataError
from data.samples import Samples
from data.shards import read_index, shard_name
from tools.duplicates import CheckedImage, check_image, check_images, similar_pairs
from tools.pack_dataset import verify
from utils import exit_on_user_error, home_path, orderly_termination, positive_int, printable, report_write_errors


class Problem(NamedTuple):
    """Something wrong with a dataset: its kind and what it is, in words.

    The kinds are 'broken', 'empty', 'same' (a file is in train and in val), 'classes' (a file is in two classes of a
    split) and 'similar' (a picture is in train and in val, or in two classes, encoded again or resized).
    """

    kind: str
    text: str


Report = Callable[[Problem], None]


class _CheckedSamples(Dataset):
    """A `CheckedImage` by index."""

    def __init__(self, samples: Samples):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> CheckedImage:
        data = None
        try:
            data = self.samples.read(index)
            return check_image(data, self.samples.describe(index))[0]
        except DataError as error:
            return CheckedImage(kind='empty' if data == b'' else 'broken', text=str(error))


def check_split(samples: Samples, workers: int, report: Report, name: str = '') -> list[CheckedImage]:
    """Read and decode all images of a split.

    Args:
        samples: the split.
        workers: processes.
        report: called with each problem when it is found.
        name: of the split, for the progress bar.

    Returns:
        What is known of each image, in order.
    """
    images = []
    for image in check_images(_CheckedSamples(samples), workers, name):
        images.append(image)
        if image.kind:
            report(Problem(image.kind, image.text))
    return images


def find_copies(splits: Mapping[str, Samples], images: Mapping[str, Sequence[CheckedImage]]) -> Iterator[Problem]:
    """Pictures that are in two splits or in two classes: the same file, or encoded again or resized."""
    places = [(split, index) for split, samples in splits.items() for index in range(len(samples))]
    checked = [image for split in splits for image in images[split]]

    def group(position: int) -> tuple[str, str]:
        """The split and the class of an image."""
        split, index = places[position]
        return split, splits[split].classes[splits[split].targets[index]]

    def problem(kind: str, first: int, second: int, verb: str) -> Problem:
        one, other = (splits[split].describe(index) for split, index in (places[first], places[second]))
        classes = group(first)[1], group(second)[1]
        differ = '' if classes[0] == classes[1] else f', in the classes {classes[0]} and {classes[1]}'
        return Problem(kind, f'{one} {verb} {other}{differ}')

    contents = np.array([image.content for image in checked], np.uint64)
    values, counts = np.unique(contents, return_counts=True)
    firsts = {}  # content -> the first image of each split and class that has it
    for position in np.flatnonzero(np.isin(contents, values[(counts > 1) & (values != 0)])).tolist():
        others = firsts.setdefault(contents[position], {})
        split = group(position)[0]
        in_other_split = next((first for (other, _), first in others.items() if other != split), None)
        if in_other_split is not None:
            yield problem('same', in_other_split, position, 'is the same file as')
        elif others and group(position) not in others:
            yield problem('classes', next(iter(others.values())), position, 'is the same file as')
        others.setdefault(group(position), position)
    reported = set()
    for first, second in similar_pairs([image.picture for image in checked]).tolist():
        is_new = contents[first] != contents[second] and second not in reported
        if is_new and group(first) != group(second):
            reported.add(second)
            yield problem('similar', first, second, 'looks like')


def check_shards(root: Path) -> Iterator[Problem]:
    """Shards whose checksums differ from those in the index."""
    index = read_index(root)
    for number, recorded in enumerate(index['shards'] if index else []):
        try:
            verify(root / shard_name(number), recorded)
        except DataError as error:
            yield Problem('broken', str(error))


def check_dataset(folder: Path, format_name: str, workers: int, report: Report) -> tuple[dict[str, int], int]:
    """Check `train` and `val`.

    Args:
        folder: of the dataset.
        format_name: of `FORMATS`.
        workers: processes.
        report: called with each problem when it is found.

    Returns:
        The number of images of each split, and of those that EXIF rotates.

    Raises:
        DataError: there are neither of them.
    """
    splits, images, is_found = {}, {}, False
    for split in ('train', 'val'):
        if not FORMATS[format_name].find_classes(folder, split):
            continue
        is_found = True
        try:
            splits[split] = FORMATS[format_name](folder, split)
        except DataError as error:  # such as an archive cut short
            report(Problem('broken', str(error)))
            continue
        for text in splits[split].empty_classes():
            report(Problem('empty', text))
        for problem in check_shards(folder / split) if format_name == 'shards' else ():
            report(problem)
        images[split] = check_split(splits[split], workers, report, split)
    if not is_found:
        raise DataError(f'{folder} holds neither train nor val of the format {format_name}')
    try:
        check_same_classes(format_name, folder)
    except DataError as error:
        report(Problem('broken', str(error)))
    for problem in find_copies(splits, images):
        report(problem)
    rotated = sum(image.is_rotated for split in images.values() for image in split)
    return {split: len(samples) for split, samples in splits.items()}, rotated


def summary(images: Mapping[str, int], problems: Sequence[Problem], rotated: int) -> str:
    """The line at the end: numbers of images and of problems of each kind."""
    counts = Counter(problem.kind for problem in problems)
    numbers = ', '.join(f'{count:,} in {split}' for split, count in images.items())
    line = f'images: {numbers}; {counts["broken"]} broken, {counts["empty"]} empty, {counts["same"]} in train and val'
    line += ''.join(f', {counts[kind]} {text}' for kind, text in _COPIES.items() if counts[kind])
    if rotated:
        line += f'; {rotated:,} rotated by their EXIF tag: DATA.EXIF True turns them upright'
    return line


def main() -> None:
    """Read the command line, check and print one line per problem."""
    parser = argparse.ArgumentParser(
        'python -m tools.check_dataset',
        description=__doc__.splitlines()[0],
        epilog='exit code: 0 nothing found, 1 something listed or an error',
        allow_abbrev=False,
    )
    parser.add_argument('path', type=home_path, metavar='PATH', help='folder of the dataset')
    parser.add_argument(
        '--format', choices=sorted(FORMATS), help='format of the dataset (default: recognised from its files)'
    )
    parser.add_argument(
        '--workers',
        type=positive_int,
        default=os.cpu_count(),
        metavar='N',
        help='processes that read the images (default: one per core)',
    )
    parser.add_argument('--json', type=home_path, metavar='FILE', help='also write the counts and the list as JSON')
    args = parser.parse_args()
    with exit_on_user_error(), orderly_termination():
        if not os.path.isdir(args.path):
            raise DataError(f'{args.path} does not exist: give the folder of a dataset')
        problems: list[Problem] = []

        def report(problem: Problem) -> None:
            problems.append(problem)
            print_above_bar(f'{problem.kind}\t{printable(problem.text)}')

        images, rotated = check_dataset(args.path, args.format or find_format(args.path), args.workers, report)
        if args.json:
            with report_write_errors(args.json):
                tree = {'images': images, 'rotated': rotated, 'problems': [x._asdict() for x in problems]}
                args.json.write_text(json.dumps(tree, indent=1), encoding='utf-8')
        print(summary(images, problems, rotated))
        if any(problem.kind in ('same', *_COPIES) for problem in problems):
            print(_ADVICE, file=sys.stderr)
    sys.exit(bool(problems))


# What the last line calls the kinds of copies, where there are any
_COPIES = {'classes': 'in two classes', 'similar': 'similar (encoded again or resized)'}

_ADVICE = (
    'Keep each picture in one class, and in train or val only: remove the other copies, or split the images again with '
    'python -m tools.split_dataset, which keeps copies together. Look at similar images before you '
    'remove them: a perceptual hash finds them, and can be wrong.'
)


if __name__ == '__main__':
    main()
