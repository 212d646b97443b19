"""Load image files in batches for inference, in DataLoader workers; unreadable files are reported."""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm
from yacs.config import CfgNode

from data.build import EvalTransform, build_loader
from data.images import DataError, read_file
from data.packed_lists import NameList
from utils import printable

# Exit code of a program that has finished, but could not read some images
SOME_UNREADABLE = 3


def print_above_bar(text: str, end: str = '\n') -> None:
    """Print a result on stdout, above the loader's progress bar if both are on a terminal."""
    (tqdm.write if sys.stdout.isatty() else print)(text, end=end)


class LoadedImage(NamedTuple):
    """An image file by its index: the transformed image, or the error if it could not be read."""

    index: int
    image: Tensor | None
    error: str


class ImageBatch(NamedTuple):
    """Consecutive image files.

    Attributes:
        indices: indices of the files that could be read, in order.
        images: the transformed images, (B, ...); None if no file could be read.
        errors: errors of the other files, by index.
    """

    indices: list[int]
    images: Tensor | None
    errors: dict[int, str]


class ImageFiles(Dataset):
    """Image files by index.

    Args:
        paths: the files.
        transform: from an encoded image and its name to a tensor.
    """

    def __init__(self, paths: Sequence[Path], transform: Callable[[bytes, str], Tensor]):
        self.paths = NameList.of(map(str, paths)).share()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> LoadedImage:
        path = self.paths[index]
        try:
            return LoadedImage(index, self.transform(read_file(path), path), '')
        except DataError as error:
            return LoadedImage(index, None, str(error))


def collate(samples: Sequence[LoadedImage]) -> ImageBatch:
    """Stack images of one shape into a batch, in the worker: each tensor that a worker sends takes an open file."""
    good = [sample for sample in samples if not sample.error]
    images = torch.stack([sample.image for sample in good]) if good else None
    errors = {sample.index: sample.error for sample in samples if sample.error}
    return ImageBatch([sample.index for sample in good], images, errors)


class InferenceLoader:
    """Iterates over batches of image files, in order, with a progress bar where stderr is a terminal.

    Files that cannot be read are reported on stderr and counted.

    Args:
        config: the config tree of any task.
        paths: the files.
        transform: from an encoded image and its name to a tensor; of one shape, unless `batch_size` is 1.
        batch_size: images per batch.
        workers: number of DataLoader workers; 0 loads in this process, as does a single batch.
    """

    def __init__(
        self,
        config: CfgNode,
        paths: Sequence[Path],
        transform: Callable[[bytes, str], Tensor],
        batch_size: int = 1,
        workers: int = 0,
    ):
        self.paths, self.unreadable = paths, 0
        workers = workers if len(paths) > batch_size else 0
        files = ImageFiles(paths, transform)
        self._loader = build_loader(config, files, range(len(paths)), batch_size, collate, workers=workers)

    def __iter__(self) -> Iterator[ImageBatch]:
        self.unreadable = 0
        with tqdm(total=len(self.paths), unit=' images', leave=False, disable=None) as bar:
            for batch in self._loader:
                for error in batch.errors.values():
                    tqdm.write(f'error: {printable(error)}', file=sys.stderr)
                self.unreadable += len(batch.errors)
                yield batch
                bar.update(len(batch.indices) + len(batch.errors))

    def exit_if_unreadable(self) -> None:
        """Exit with the code `SOME_UNREADABLE` if files could not be read."""
        exit_if_unreadable(self.unreadable, len(self.paths))


def exit_if_unreadable(unreadable: int, images: int) -> None:
    """Exit with the code `SOME_UNREADABLE` if files could not be read; called at the end of a program."""
    if unreadable:
        print(f'error: {unreadable} of {images} images cannot be read: see above', file=sys.stderr)
        sys.exit(SOME_UNREADABLE)


def evaluation_loader(
    config: CfgNode, paths: Sequence[Path], batch_size: int = 64, workers: int = 0
) -> InferenceLoader:
    """The loader of image files as evaluation of a classifier reads them; see `InferenceLoader`."""
    return InferenceLoader(config, paths, EvalTransform(config), batch_size, workers)
