"""Check every image of a dataset: list what is broken, empty, in both train and val, or in two classes.

    python -m tools.check_dataset <imagenet>

PATH may have any format that DATA.DATASET knows. Images are decoded as in training; the checksums of shards are
verified too. Copies of a picture are found if the files are equal and, with the package imagehash, if the picture was
encoded again or resized. The exit code is 1 where there is anything to list.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from data.formats import FORMATS, check_same_classes, find_format
from data.images import DataError, decode_image
from data.samples import Samples
from data.shards import read_index, shard_name
from data.workers import WorkerLoader
from tools.duplicates import CheckedImage, can_compare_pictures, content_hash, perceptual_hash, similar_pairs
from tools.output_files import shown
from tools.pack_dataset import verify
from utils import exit_on_user_error, home_path, positive_int, report_write_errors


class Problem(NamedTuple):
    """Something wrong with a dataset: its kind and what it is, in words.

    The kinds are 'broken', 'empty', 'same' (a file is in train and in val), 'classes' (a file is in two classes of a
    split) and 'similar' (a picture is in train and in val, or in two classes, encoded again or resized).
    """

    kind: str
    text: str


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
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                image = decode_image(data, self.samples.describe(index))
        except DataError as error:
            return CheckedImage(0, b'', 'empty' if data == b'' else 'broken', str(error))
        return CheckedImage(content_hash(data), perceptual_hash(image), '', '')


def check_split(samples: Samples, workers: int, name: str = '') -> list[CheckedImage]:
    """Read and decode all images of a split.

    Args:
        samples: the split.
        workers: processes.
        name: of the split, for the progress bar.

    Returns:
        What is known of each image, in order.
    """
    loader = WorkerLoader(_CheckedSamples(samples), batch_size=32, num_workers=workers, collate_fn=list)
    images = []
    with tqdm(total=len(samples), desc=f'check {name}', unit='image', disable=None) as bar:
        for batch in loader:
            images += batch
            bar.update(len(batch))
    return images


def find_copies(splits: Mapping[str, Samples], images: Mapping[str, Sequence[CheckedImage]]) -> list[Problem]:
    """Pictures that are in two splits or in two classes: the same file, or encoded again or resized."""
    places = [(split, index) for split, samples in splits.items() for index in range(len(samples))]
    checked = [image for split in splits for image in images[split]]

    def group(position: int) -> tuple[str, str]:
        """Split and class of an image."""
        split, index = places[position]
        return split, splits[split].classes[splits[split].targets[index]]

    def problem(kind: str, first: int, second: int, verb: str) -> Problem:
        one, other = (splits[split].describe(index) for split, index in (places[first], places[second]))
        classes = group(first)[1], group(second)[1]
        differ = '' if classes[0] == classes[1] else f', in the classes {classes[0]} and {classes[1]}'
        return Problem(kind, f'{one} {verb} {other}{differ}')

    contents = np.array([image.content for image in checked], np.uint64)
    values, counts = np.unique(contents, return_counts=True)
    problems, firsts = [], {}  # content -> the first image of each split and class that has it
    for position in np.flatnonzero(np.isin(contents, values[(counts > 1) & (values != 0)])).tolist():
        others = firsts.setdefault(contents[position], {})
        split = group(position)[0]
        in_other_split = next((first for (other, _), first in others.items() if other != split), None)
        if in_other_split is not None:
            problems.append(problem('same', in_other_split, position, 'is'))
        elif others and group(position) not in others:
            problems.append(problem('classes', next(iter(others.values())), position, 'is'))
        others.setdefault(group(position), position)
    reported = set()
    for first, second in similar_pairs([image.picture for image in checked]).tolist():
        is_new = contents[first] != contents[second] and second not in reported
        if is_new and group(first) != group(second):
            reported.add(second)
            problems.append(problem('similar', first, second, 'looks like'))
    return problems


def check_shards(root: Path) -> list[Problem]:
    """Shards whose checksums differ from those in the index."""
    problems = []
    index = read_index(root)
    for number, recorded in enumerate(index['shards'] if index else []):
        try:
            verify(root / shard_name(number), recorded)
        except DataError as error:
            problems.append(Problem('broken', str(error)))
    return problems


def check_dataset(folder: Path, format_name: str, workers: int) -> tuple[dict[str, int], list[Problem]]:
    """Check `train` and `val`.

    Returns:
        The number of images of each split, and all problems.

    Raises:
        DataError: there are neither of them.
    """
    splits, images, problems = {}, {}, []
    for split in ('train', 'val'):
        if not FORMATS[format_name].find_classes(folder, split):
            continue
        try:
            splits[split] = FORMATS[format_name](folder, split)
        except DataError as error:  # such as an archive cut short
            problems.append(Problem('broken', str(error)))
            continue
        problems += [Problem('empty', text) for text in splits[split].empty_classes()]
        if format_name == 'shards':
            problems += check_shards(folder / split)
        images[split] = check_split(splits[split], workers, split)
        problems += [Problem(image.kind, image.text) for image in images[split] if image.kind]
    if not splits and not problems:
        raise DataError(f'{folder} holds neither train nor val of the format {format_name}')
    try:
        check_same_classes(format_name, folder)
    except DataError as error:
        problems.append(Problem('broken', str(error)))
    return {split: len(samples) for split, samples in splits.items()}, problems + find_copies(splits, images)


def main() -> None:
    """Read the command line, check and print one line per problem."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument('path', type=home_path, metavar='PATH', help='folder of the dataset')
    parser.add_argument('--format', choices=sorted(FORMATS), help='default: what PATH looks like')
    parser.add_argument('--workers', type=positive_int, default=os.cpu_count(), metavar='N', help='default: all cores')
    parser.add_argument(
        '--json', type=home_path, metavar='FILE', help='write the numbers and problems to this file too'
    )
    args = parser.parse_args()
    with exit_on_user_error():
        if not os.path.isdir(args.path):
            raise DataError(f'{args.path} does not exist: give the folder of a dataset')
        images, problems = check_dataset(args.path, args.format or find_format(args.path), args.workers)
        if args.json:
            with report_write_errors(args.json):
                text = json.dumps({'images': images, 'problems': [x._asdict() for x in problems]}, indent=1)
                args.json.write_text(text, encoding='utf-8')
        counts = Counter(problem.kind for problem in problems)
        for problem in problems:
            print(f'{problem.kind}\t{shown(problem.text)}')
        numbers = ', '.join(f'{count:,} in {split}' for split, count in images.items())
        copies = [f', {counts[kind]} {text}' for kind, text in _COPIES.items() if counts[kind]]
        print(
            f'images: {numbers}; {counts["broken"]} broken, {counts["empty"]} empty, {counts["same"]} in train and val'
            + ''.join(copies)
        )
        if any(counts[kind] for kind in ('same', *_COPIES)):
            print(_ADVICE, file=sys.stderr)
        if not can_compare_pictures():
            print('copies that were encoded again are not looked for: pip install imagehash', file=sys.stderr)
    sys.exit(bool(problems))


# What the last line calls the kinds of copies, where there are any
_COPIES = {'classes': 'in two classes', 'similar': 'encoded again or resized'}

_ADVICE = (
    'Keep each picture in one class, and in train or val only: remove the other copies, or split the images again with '
    'python -m tools.split_dataset, which keeps copies together. Look at similar ones before: a hash finds them.'
)


if __name__ == '__main__':
    main()
