"""Loaders of training and evaluation batches."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import cv2
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from yacs.config import CfgNode

from data.class_balance import draw_weights
from data.dataset import ImageDataset
from data.fast_transforms import FastEvalTransform, FastTrainTransform
from data.formats import open_samples
from data.images import AnyImage, DataError, read_header
from data.mixup import uses_mixup
from data.python_dataset import DATASETS, PythonDataset
from data.samplers import ShardSampler, TrainSampler, VirtualRankSampler
from data.samples import Samples
from data.seeding import SeededDataset
from data.transforms import PublishedTransform
from data.workers import WorkerLoader

# Images whose headers are read when a split is opened
SAMPLED_HEADERS = 100

Result = TypeVar('Result')
OncePerNode = Callable[[Callable[[], Result]], Result]


def call(function: Callable[[], Result]) -> Result:
    """Call a function: the `OncePerNode` of a single process."""
    return function()


def build_loaders(
    config: CfgNode, rank: int = 0, world_size: int = 1, once_per_node: OncePerNode = call
) -> tuple[DataLoader, DataLoader]:
    """Build loaders of this process's share of `train/` and `val/`: images (B, C, H, W) and targets.

    Training batches are shuffled, augmented and full: the remainder of an epoch is dropped. Call the training loader's
    `batch_sampler.sampler.set_epoch` before each epoch. They are the same for any `DATA.NUM_WORKERS`. With
    `TRAIN.VIRTUAL_RANKS`, see `VirtualRankSampler`. For evaluation batches, see `build_eval_loader`.

    Args:
        config: the config tree.
        rank: this process's rank.
        world_size: number of processes.
        once_per_node: calls a function on one process of each node, such as `engine.distributed.once_per_node`; then
            one process lists the samples, and the others map its list.

    Raises:
        DataError: the data cannot be used, or one batch per process needs more images.
    """
    if not config.DATA.IMG_SIZES:  # with several sizes, the batch size of each phase is checked
        check_pairs(config)
    dataset = open_dataset(config, 'train', once_per_node)
    eval_loader = build_eval_loader(config, rank, world_size, once_per_node)
    if dataset.classes != eval_loader.dataset.classes:  # a user's dataset; formats are checked when they are opened
        raise DataError(f'train and val of {config.DATA.DATASET} have different classes: give both the same')
    weights = draw_weights(config, dataset)
    sampler = TrainSampler(
        len(dataset),
        rank,
        world_size,
        config.SEED,
        weights,
        config.AUG.REPEATS,
        virtual_ranks=config.TRAIN.VIRTUAL_RANKS,
        images_per_epoch=images_of_epoch(config, len(dataset)),
    )
    return build_train_loader(config, dataset, sampler), eval_loader


def images_of_epoch(config: CfgNode, images: int) -> int:
    """Get the number of samples of a training epoch from `DATA.IMAGES_PER_EPOCH`; 0 for all.

    Args:
        config: the config tree.
        images: number of training images.

    Raises:
        DataError: the key asks for more images than there are.
    """
    asked = config.DATA.IMAGES_PER_EPOCH
    if asked > images:
        raise DataError(
            f'DATA.IMAGES_PER_EPOCH is {asked}, but an epoch has {images} training images: write at most {images}, or '
            f'0 for all'
        )
    return asked


def _flag_of(key: str) -> str:
    """Flag or option that sets a batch-size key, for messages."""
    return '--batch-size' if key == 'DATA.BATCH_SIZE' else key


def check_pairs(config: CfgNode, key: str = 'DATA.BATCH_SIZE') -> None:
    """Refuse batches whose images Mixup and CutMix cannot pair.

    Args:
        config: the config tree.
        key: the key that sets the batch size, for messages.

    Raises:
        DataError: their size is odd.
    """
    size = config.DATA.BATCH_SIZE
    if uses_mixup(config) and size % 2:
        raise DataError(
            f'{key} is {size}, but Mixup and CutMix pair the images of a batch: '
            f'write an even {_flag_of(key)}, or --opts AUG.MIXUP 0 AUG.CUTMIX 0'
        )


def build_eval_loader(
    config: CfgNode, rank: int = 0, world_size: int = 1, once_per_node: OncePerNode = call
) -> DataLoader:
    """Build the loader of this process's shard of `val/`, in order; together, processes see each image once.

    For the arguments, see `build_loaders`.

    Raises:
        DataError: the data cannot be used.
    """
    dataset = open_dataset(config, 'val', once_per_node)
    return build_loader(config, dataset, ShardSampler(len(dataset), rank, world_size), config.DATA.BATCH_SIZE)


def open_dataset(config: CfgNode, split: str, once_per_node: OncePerNode = call) -> ImageDataset:
    """Open `train` or `val`, its samples in shared memory, with the transform of the config's pipeline.

    Raises:
        DataError: the data cannot be used, or have other classes than the network.
    """
    if not config.DATA.DATA_PATH and config.DATA.DATASET not in DATASETS:
        raise DataError('no data: give --data-path the folder that holds train/<class>/ and val/<class>/')
    is_train = split == 'train'
    transform = build_sample_transform(config, is_train)
    folder = Path(config.DATA.DATA_PATH)
    samples = once_per_node(lambda: _open_samples(config, folder, split).share())
    if len(samples.classes) != config.MODEL.NUM_CLASSES and config.TEST.CLASSES == 'all':
        remedy = f'write --opts MODEL.NUM_CLASSES {len(samples.classes)}'
        if config.EVAL_MODE and len(samples.classes) < config.MODEL.NUM_CLASSES:
            remedy = "if they are some of the network's, write --opts TEST.CLASSES subset"
        raise DataError(
            f'{samples.where} has {len(samples.classes)} classes, but MODEL.NUM_CLASSES is '
            f'{config.MODEL.NUM_CLASSES}: {remedy}, or give another --data-path'
        )
    if samples.is_multi_label and not config.DATA.MULTI_LABEL:
        raise DataError(
            f'{samples.where} has images of several classes, or of none: write --opts DATA.MULTI_LABEL True TRAIN.LOSS '
            f'bce AUG.MIXUP 0 AUG.CUTMIX 0'
        )
    on_error = 'stop' if config.DATA.ON_ERROR == 'stop' else 'replace' if is_train else 'ignore'
    return ImageDataset(samples, transform, on_error, config.DATA.MULTI_LABEL)


def open_for_evaluation(config: CfgNode, split: str) -> ImageDataset:
    """Open `train` or `val` with the evaluation transform, without a check of its classes.

    Raises:
        DataError: the data cannot be used.
    """
    samples = _open_samples(config, Path(config.DATA.DATA_PATH), split).share()
    on_error = 'stop' if config.DATA.ON_ERROR == 'stop' else 'ignore'
    return ImageDataset(samples, build_sample_transform(config, is_train=False), on_error, samples.is_multi_label)


def _open_samples(config: CfgNode, folder: Path, split: str) -> Samples | PythonDataset:
    """Open a split, and add a note if it has images with an EXIF orientation."""
    if config.DATA.DATASET in DATASETS:
        return PythonDataset.of_config(config, split)
    samples = open_samples(config.DATA.DATASET, folder, split)
    samples.notes += rotation_notes(samples, config.DATA.EXIF)
    return samples


def rotation_notes(samples: Samples, upright: bool) -> list[str]:
    """Note how many sampled images have an EXIF orientation, and what `DATA.EXIF` does about it; empty if none has one.

    The headers of at most `SAMPLED_HEADERS` images, evenly chosen, are read; unreadable ones are left out.

    Args:
        samples: the split.
        upright: whether its images are turned upright.
    """
    indices = range(0, len(samples), max(-(-len(samples) // SAMPLED_HEADERS), 1))
    rotated = 0
    for index in indices:
        with contextlib.suppress(DataError):
            rotated += read_header(samples.describe(index), samples.read(index)).orientation != 1
    if not rotated:
        return []
    effect = 'and turned upright' if upright else 'and read as stored; DATA.EXIF True turns them upright'
    return [f'{rotated} of {len(indices)} sampled images are rotated by their EXIF tag {effect}']


def build_sample_transform(config: CfgNode, is_train: bool) -> Callable[[AnyImage, str], tuple[Tensor, Tensor]]:
    """Build the transform of an `ImageDataset`, for the config's pipeline.

    Raises:
        DataError: see `data.transforms.build_transform`.
    """
    if config.DATA.PIPELINE == 'published':
        return PublishedTransform(config, is_train)
    return FastTrainTransform(config) if is_train else FastEvalTransform(config)


class EvalTransform:
    """Evaluation transform: maps an encoded image and its name to a tensor, `data.dataset.Sample.image`.

    All tools prepare images with it, so they see what `main.py --eval` sees. It can be pickled.

    Args:
        config: the config tree.

    Raises:
        DataError: see `data.transforms.build_transform`.
    """

    def __init__(self, config: CfgNode):
        self.transform = build_sample_transform(config, is_train=False)

    def __call__(self, data: bytes, name: str) -> Tensor:
        """The image.

        Raises:
            DataError: it cannot be decoded.
        """
        return self.transform(data, name)[0]


def build_train_loader(
    config: CfgNode,
    dataset: Dataset,
    sampler: TrainSampler,
    collate_fn: Callable | None = None,
    key: str = 'DATA.BATCH_SIZE',
) -> DataLoader:
    """Build the loader of full batches, with augmentation that depends on the seed and on the keys of the sampler.

    Args:
        config: the config tree.
        dataset: indexed by sample.
        sampler: draws its samples; if it has virtual ranks, the batches are in the order of a `VirtualRankSampler`.
        collate_fn: makes a batch of a list of samples; None stacks them.
        key: the key that sets the batch size, for messages.

    Raises:
        DataError: one batch per process, or per virtual rank, needs more images.
    """
    size, world_size = config.DATA.BATCH_SIZE, sampler.world_size
    if sampler.length < size * world_size:
        raise DataError(
            f'{sampler.length} training images make no full batch: {key} {size} on {world_size} '
            f'{"virtual ranks" if sampler.virtual_ranks else "process(es)"} needs {size * world_size}: write a '
            f'smaller {_flag_of(key)}'
        )
    dataset = SeededDataset(dataset, config.SEED)
    if sampler.virtual_ranks:
        batches = VirtualRankSampler(sampler, size, batches_per_update=max(config.TRAIN.ACCUMULATION_STEPS, 1))
        return build_loader(config, dataset, collate_fn=collate_fn, batch_sampler=batches)
    return build_loader(config, dataset, sampler, size, collate_fn, drop_last=True)


def build_loader(
    config: CfgNode,
    dataset: Dataset,
    sampler: Sampler | None = None,
    batch_size: int = 1,
    collate_fn: Callable | None = None,
    drop_last: bool = False,
    workers: int | None = None,
    batch_sampler: Sampler | None = None,
) -> DataLoader:
    """Build a loader; see `build_train_loader` for the arguments.

    `workers` None takes `DATA.NUM_WORKERS`. A `batch_sampler` replaces `sampler`, `batch_size` and `drop_last`.
    """
    workers = config.DATA.NUM_WORKERS if workers is None else workers
    cv2.setNumThreads(1)  # as in a worker
    return WorkerLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate_fn,
        pin_memory=config.DATA.PIN_MEMORY and torch.cuda.is_available(),
        drop_last=drop_last,
        batch_sampler=batch_sampler,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # a separate one: creating an iterator draws a number
    )
