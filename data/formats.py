"""The formats of `DATA.DATASET`."""

import os
import unicodedata
from pathlib import Path

from data.huggingface import HuggingFaceDataset
from data.image_folder import ClassFolders
from data.images import DataError
from data.samples import Samples
from data.shards import INDEX, Shards
from data.table import Table, find_table
from data.webdataset import WebDataset, find_tars
from data.zip_archive import ZipArchive

FORMATS: dict[str, type[Samples]] = {
    'imagenet': ClassFolders,
    'shards': Shards,
    'zip': ZipArchive,
    'table': Table,
    'webdataset': WebDataset,
    'huggingface': HuggingFaceDataset,
}


def open_samples(name: str, folder: Path, split: str) -> Samples:
    """Open `train` or `val`; if the dataset has both, they must have the same classes.

    Args:
        name: of the format: a value of `DATA.DATASET`.
        folder: of the dataset.
        split: `train` or `val`.

    Raises:
        DataError: there is no such split, it cannot be read, a class is empty, or its classes differ from the other's.
    """
    if name == 'imagenet' and (found := find_format(folder)) != name:
        raise DataError(f'{folder} has the format {found}: write --opts DATA.DATASET {found}')
    check_same_classes(name, folder)
    samples = FORMATS[name](folder, split)
    if empty := samples.empty_classes():
        raise DataError(empty[0])
    return samples


def find_format(folder: Path) -> str:
    """Detect the format of a dataset's folder; class folders if there is no sign of another one."""
    if os.path.isfile(folder / 'dataset_dict.json'):
        return 'huggingface'
    splits = ('train', 'val')
    if any(os.path.isfile(folder / split / INDEX) for split in splits):
        return 'shards'
    if any(ClassFolders.find_classes(folder, split) for split in splits):  # other files in the folder do not matter
        return 'imagenet'
    if any(os.path.isfile(folder / f'{split}_map.txt') for split in splits):
        return 'zip'
    if any(find_table(folder, split) for split in splits):
        return 'table'
    return 'webdataset' if any(find_tars(folder, split) for split in splits) else 'imagenet'


def check_same_classes(name: str, folder: Path) -> None:
    """Check that `train` and `val`, if there are both, have the same classes.

    Raises:
        DataError: their classes differ, or are numbered differently.
    """
    train, val = (FORMATS[name].find_classes(folder, split) for split in ('train', 'val'))
    if not train or not val or train == val:
        return
    if sorted(train) == sorted(val):
        raise DataError(f'train and val in {folder} number the same classes differently: write them again')
    texts = []
    for split, missing, others in (('val', {*train} - {*val}, val), ('train', {*val} - {*train}, train)):
        if missing:
            look = {_look(name) for name in others}
            shown = [ascii(name) if _look(name) in look else name for name in sorted(missing)[:3]]
            more = f' and {len(missing) - 3} more' if len(missing) > 3 else ''
            texts.append(f'{split}/ has no {", ".join(shown)}{more}')
    if texts:
        raise DataError(
            f'train/ and val/ in {folder} have different class folders: {", ".join(texts)}: '
            f'add what is missing, or remove it from the other'
        )


def _look(name: str) -> str:
    """Reduce a name to what a reader sees: no spaces or invisible characters, and one form of similar letters."""
    folded = unicodedata.normalize('NFKC', name).casefold()
    return ''.join(char for char in folded if char.isprintable() and not char.isspace())
