"""Loaders of training and evaluation batches."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from yacs.config import CfgNode

from data.image_folder import ClassFolders, list_classes
from data.images import DataError
from data.mixup import uses_mixup
from data.samplers import ShardSampler, TrainSampler
from data.seeding import SeededDataset
from data.transforms import build_transform, image_mode


def build_loaders(config: CfgNode, rank: int = 0, world_size: int = 1) -> tuple[DataLoader, DataLoader]:
    """Build loaders of this process's share of `train/` and `val/`: images (B, C, H, W) and class indices (B,).

    Training batches are shuffled, augmented and full: the remainder of an epoch is dropped. Call the training loader's
    `sampler.set_epoch` before each epoch. They are the same for any `DATA.NUM_WORKERS`. For evaluation batches, see
    `build_eval_loader`.

    Raises:
        DataError: the data cannot be used, or one batch per process needs more images.
    """
    size = config.DATA.BATCH_SIZE
    if uses_mixup(config) and size % 2:
        raise DataError(
            f'DATA.BATCH_SIZE is {size}, but Mixup and CutMix pair the images of a batch: '
            f'write an even --batch-size, or --opts AUG.MIXUP 0 AUG.CUTMIX 0'
        )
    dataset = _open_split(config, 'train', build_transform(config, is_train=True))
    eval_loader = build_eval_loader(config, rank, world_size)
    sampler = TrainSampler(len(dataset), rank, world_size, config.SEED)
    return build_train_loader(config, dataset, sampler), eval_loader


def build_eval_loader(config: CfgNode, rank: int = 0, world_size: int = 1) -> DataLoader:
    """Build the loader of this process's shard of `val/`, in order; together, processes see each image once.

    Raises:
        DataError: the data cannot be used.
    """
    dataset = _open_split(config, 'val', build_transform(config, is_train=False))
    return build_loader(config, dataset, ShardSampler(len(dataset), rank, world_size), config.DATA.BATCH_SIZE)


def _open_split(config: CfgNode, split: str, transform: Callable) -> ClassFolders:
    """Open `train` or `val`, which must have the classes of the other, if there is one, and as many as the network."""
    if not config.DATA.DATA_PATH:
        raise DataError('no data: give --data-path the folder that holds train/<class>/ and val/<class>/')
    if config.DATA.DATASET != 'imagenet':
        raise DataError(f'DATA.DATASET is {config.DATA.DATASET!r}: write imagenet')
    folder = Path(config.DATA.DATA_PATH)
    _compare_classes(folder)
    root = folder / split
    dataset = ClassFolders(root, transform, image_mode(config))
    if len(dataset.classes) != config.MODEL.NUM_CLASSES:
        raise DataError(
            f'{root} has {len(dataset.classes)} class folders, but MODEL.NUM_CLASSES is {config.MODEL.NUM_CLASSES}: '
            f'write --opts MODEL.NUM_CLASSES {len(dataset.classes)}, or give another --data-path'
        )
    return dataset


def _compare_classes(folder: Path) -> None:
    """Check that `train` and `val`, if there are both, have the same classes."""
    train, val = (set(list_classes(folder / split)) for split in ('train', 'val'))
    if not train or not val:
        return
    texts = []
    for split, missing in (('val', sorted(train - val)), ('train', sorted(val - train))):
        if missing:
            more = f' and {len(missing) - 3} more' if len(missing) > 3 else ''
            texts.append(f'{split}/ has no {", ".join(missing[:3])}{more}')
    if texts:
        raise DataError(
            f'train/ and val/ in {folder} have different class folders: {", ".join(texts)}: '
            f'add what is missing, or remove it from the other'
        )


def build_train_loader(
    config: CfgNode, dataset: Dataset, sampler: TrainSampler, collate_fn: Callable | None = None
) -> DataLoader:
    """Build the loader of full batches, with augmentation that depends on seed, epoch and index alone.

    Args:
        config: the config tree.
        dataset: indexed by sample.
        sampler: draws its samples.
        collate_fn: makes a batch of a list of samples; None stacks them.

    Raises:
        DataError: one batch per process needs more images.
    """
    size, world_size = config.DATA.BATCH_SIZE, sampler.world_size
    if len(dataset) < size * world_size:
        raise DataError(
            f'{len(dataset)} training images make no full batch: DATA.BATCH_SIZE {size} on {world_size} '
            f'process(es) needs {size * world_size}: write a smaller --batch-size'
        )
    return build_loader(config, SeededDataset(dataset, config.SEED), sampler, size, collate_fn, drop_last=True)


def build_loader(
    config: CfgNode,
    dataset: Dataset,
    sampler: Sampler,
    batch_size: int,
    collate_fn: Callable | None = None,
    drop_last: bool = False,
) -> DataLoader:
    """Build a loader with the workers of `DATA`; see `build_train_loader` for the arguments."""
    workers = config.DATA.NUM_WORKERS
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate_fn,
        multiprocessing_context='fork' if workers and sys.platform == 'linux' else None,  # not Python 3.14's default
        pin_memory=config.DATA.PIN_MEMORY and torch.cuda.is_available(),
        drop_last=drop_last,
        persistent_workers=workers > 0,
        worker_init_fn=_ignore_launcher_signals,
        generator=torch.Generator(),  # its own, so creating an iterator draws no number from the run's
    )


def _ignore_launcher_signals(worker: int) -> None:
    """End a loader process only on a SIGTERM from its training process.

    Launchers signal all processes of a job, and the training process still needs batches to finish its update.
    """
    signal.set_wakeup_fd(-1)  # inherited from the training process by a fork
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_exit_on_sigterm_from, args=(os.getppid(),), daemon=True).start()


def _exit_on_sigterm_from(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)
