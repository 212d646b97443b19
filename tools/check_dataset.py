"""Check every image of a dataset: list what is broken, empty, or the same in train and val.

    python -m tools.check_dataset <imagenet>

PATH may have any format that DATA.DATASET knows. Images are decoded as in training; the checksums of shards are
verified too. The exit code is 1 where there is anything to list.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
import hashlib
import json
import os
import sys
import warnings
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
from tools.pack_dataset import verify
from utils import exit_on_user_error, home_path, positive_int, report_write_errors


class Problem(NamedTuple):
    """Something wrong with a dataset: its kind, 'broken', 'empty' or 'same', and what it is, in words."""

    kind: str
    text: str


class _CheckedSamples(Dataset):
    """By index: a hash of a sample's file, or 0, and the kind and text of its problem, or two empty strings."""

    def __init__(self, samples: Samples):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[int, str, str]:
        data = None
        try:
            data = self.samples.read(index)
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                decode_image(data, self.samples.describe(index))
        except DataError as error:
            return 0, 'empty' if data == b'' else 'broken', str(error)
        return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), 'little'), '', ''


def check_split(samples: Samples, workers: int, name: str = '') -> tuple[np.ndarray, list[Problem]]:
    """Read and decode all images of a split.

    Args:
        samples: the split.
        workers: processes.
        name: of the split, for the progress bar.

    Returns:
        A hash of each image's file (N,) uint64, 0 for those with problems, and the problems.
    """
    loader = WorkerLoader(_CheckedSamples(samples), batch_size=32, num_workers=workers, collate_fn=list)
    hashes, problems = [], []
    with tqdm(total=len(samples), desc=f'check {name}', unit='image', disable=None) as bar:
        for batch in loader:
            for value, *problem in batch:
                hashes.append(value)
                if any(problem):
                    problems.append(Problem(*problem))
            bar.update(len(batch))
    return np.array(hashes, np.uint64), problems


def find_shared(splits: dict[str, Samples], hashes: dict[str, np.ndarray]) -> list[Problem]:
    """Images whose files are the same, byte for byte, in train and val."""
    if len(splits) < 2:
        return []
    (train, val), (train_hashes, val_hashes) = splits.values(), hashes.values()
    in_train = dict(zip(train_hashes.tolist(), range(len(train)), strict=True))
    return [
        Problem('same', f'{train.describe(in_train[value])} is {val.describe(j)}')
        for j, value in enumerate(val_hashes.tolist())
        if value in in_train and value != 0
    ]


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
    splits, hashes, problems = {}, {}, []
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
        hashes[split], found = check_split(splits[split], workers, split)
        problems += found
    if not splits and not problems:
        raise DataError(f'{folder} holds neither train nor val of the format {format_name}')
    try:
        check_same_classes(format_name, folder)
    except DataError as error:
        problems.append(Problem('broken', str(error)))
    return {split: len(samples) for split, samples in splits.items()}, problems + find_shared(splits, hashes)


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
        if not args.path.is_dir():
            raise DataError(f'{args.path} does not exist: give the folder of a dataset')
        images, problems = check_dataset(args.path, args.format or find_format(args.path), args.workers)
        if args.json:
            with report_write_errors(args.json):
                text = json.dumps({'images': images, 'problems': [x._asdict() for x in problems]}, indent=1)
                args.json.write_text(text, encoding='utf-8')
    for problem in problems:
        print(f'{problem.kind}\t{problem.text}')
    counts = {kind: sum(problem.kind == kind for problem in problems) for kind in ('broken', 'empty', 'same')}
    numbers = ', '.join(f'{count:,} in {split}' for split, count in images.items())
    print(f'images: {numbers}; {counts["broken"]} broken, {counts["empty"]} empty, {counts["same"]} in train and val')
    sys.exit(bool(problems))


if __name__ == '__main__':
    main()
