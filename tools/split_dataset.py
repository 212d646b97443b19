"""Split class folders of your own pictures into train/ and val/, copying the files.

    python -m tools.split_dataset pictures --output output/pictures

DIR holds a folder of images for each class. Of every class, a random but fixed part goes to val/. Copies of one file,
whatever their names, stay together, so no picture is in both.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
import hashlib
import random
import shutil
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from data.image_folder import ClassFolders
from data.images import DataError
from utils import exit_on_user_error, home_path, report_write_errors


def split_classes(samples: ClassFolders, fraction: float, seed: int = 0) -> dict[str, list[int]]:
    """Choose the samples of each split, class by class.

    Args:
        samples: the class folders.
        fraction: part of each class's different images that goes to `val`: at least one, and not all.
        seed: of the choice.

    Returns:
        Indices of the samples, by split, in order.

    Raises:
        DataError: a class with fewer than two different images, or images that cannot be read.
    """
    rng, splits = random.Random(seed), {'train': [], 'val': []}
    by_class = defaultdict(lambda: defaultdict(list))  # class -> content -> indices
    for index, target in enumerate(samples.targets):
        content = hashlib.blake2b(samples.read(index)).digest()
        by_class[int(target)][content].append(index)
    for target, name in enumerate(samples.classes):
        copies = list(by_class[target].values())
        if len(copies) < 2:
            raise DataError(
                f'class {name} of {samples.root} has {len(copies)} different image(s): '
                f'give it two, one to train on and one to validate on, or remove it'
            )
        rng.shuffle(copies)
        count = min(max(round(fraction * len(copies)), 1), len(copies) - 1)
        splits['val'] += [index for group in copies[:count] for index in group]
        splits['train'] += [index for group in copies[count:] for index in group]
    return {split: sorted(indices) for split, indices in splits.items()}


def split_dataset(folder: Path, output: Path, fraction: float, seed: int = 0) -> dict[str, int]:
    """Copy class folders to `output/train/<class>/` and `output/val/<class>/`; `output` appears when it is complete.

    Args:
        folder: of class folders.
        output: a folder that does not exist yet.
        fraction: see `split_classes`.
        seed: see `split_classes`.

    Returns:
        Images copied, by split.

    Raises:
        DataError: see `split_classes`; or `output` exists, or is in `folder`.
        UserError: `output` cannot be written.
    """
    folder, output = folder.resolve(), output.resolve()
    if not folder.is_dir():
        raise DataError(f'{folder} is not a folder: give the one that holds a folder of images for each class')
    if folder in (output, *output.parents):
        raise DataError(f'--output {output} is in {folder}, with the pictures: write another')
    if output.exists():
        raise DataError(f'{output} exists: write another --output, or remove it')
    samples = ClassFolders(folder.parent, folder.name)
    splits = split_classes(samples, fraction, seed)
    with report_write_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f'.{output.name}.', dir=output.parent))
        try:
            for split, indices in splits.items():
                for index in indices:
                    target = partial / split / samples.names[index]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(samples.describe(index), target)
            partial.chmod(0o755)
            partial.rename(output)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    for note in samples.notes:
        print(note, file=sys.stderr)
    return {split: len(indices) for split, indices in splits.items()}


def val_fraction(text: str) -> float:
    """A number above 0 and below 1, as the `type` of an argument."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a number above 0 and below 1, such as 0.2')
    return value


def main() -> None:
    """Read the command line and split."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog='example: python -m tools.split_dataset pictures --output output/pictures --val 0.2',
    )
    add = parser.add_argument
    add('folder', type=home_path, metavar='DIR', help='folder that holds a folder of images for each class')
    add('--output', type=home_path, required=True, metavar='DIR', help='new folder to write train/ and val/ in')
    add('--val', type=val_fraction, default=0.2, metavar='F', help='part of each class that goes to val/ (0.2)')
    add('--seed', type=int, default=0, metavar='N', help='seed of the choice (0)')
    args = parser.parse_args()
    with exit_on_user_error():
        written = split_dataset(args.folder, args.output, args.val, args.seed)
    print(f'{args.output}: {written["train"]} training and {written["val"]} validation images')


if __name__ == '__main__':
    main()
