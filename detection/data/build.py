"""Loaders of images with their objects, from a folder in COCO's layout."""

import sys
from collections.abc import Callable
from pathlib import Path

from torch import Tensor
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from data import DataError
from data.build import build_loader, build_train_loader, images_of_epoch
from data.samplers import ShardSampler
from detection.data.annotation_cache import Log
from detection.data.annotations import read_class_names
from detection.data.coco import CocoDataset, Selection, SplitFiles, Target
from detection.data.repeat_factors import describe_repeats, repeat_factors
from detection.data.samplers import GroupedTrainSampler
from detection.data.transforms import TrainTransform
from engine.distributed import once_per_node
from logger import get_logger
from utils import printable


def build_loaders(config: CfgNode, rank: int = 0, world_size: int = 1) -> tuple[DataLoader, DataLoader]:
    """Build loaders of this process's share of the training and evaluation images: lists of images and of targets.

    Training batches are shuffled, augmented, full, and all landscape or all portrait; see `CocoDataset` for images and
    targets, and `data.build_loaders` for the rest.

    Raises:
        DataError: the data cannot be used, or one batch per process needs more images.
    """
    log = get_logger(rank).info
    dataset = once_per_node(lambda: open_split(config, 'TRAIN', TrainTransform(config), log).share())
    eval_loader = build_eval_loader(config, rank, world_size)
    if dataset.classes != eval_loader.dataset.classes:
        raise DataError(
            f'{dataset.annotation_file} and {eval_loader.dataset.annotation_file} have different categories: '
            f'write the same ones in the same order into both, as python -m detection.tools.convert_dataset does'
        )
    if not eval_loader.dataset.is_labelled:
        raise DataError(f'{eval_loader.dataset.annotation_file} has no annotations to evaluate with: it is for --eval')
    if not eval_loader.dataset.num_objects:
        raise DataError(
            f'{eval_loader.dataset.annotation_file} has no objects in the images to evaluate on, so AP is undefined: '
            f'annotate them, or give other images as DATA.VAL_SPLIT'
        )
    widths, heights = dataset.images.sizes.T
    is_portrait = (heights > widths).astype(int).tolist()
    factors = None
    if config.DATA.REPEAT_FACTOR:
        factors = repeat_factors(dataset, config.DATA.REPEAT_FACTOR)
    sampler = GroupedTrainSampler(
        is_portrait,
        config.DATA.BATCH_SIZE,
        rank,
        world_size,
        config.SEED,
        factors,
        config.TRAIN.VIRTUAL_RANKS,
        images_of_epoch(config, len(dataset) if factors is None else int(factors.sum())),
    )
    if factors is not None:
        dataset.notes.append(describe_repeats(factors, sampler.length))
    return build_train_loader(config, dataset, sampler, collate), eval_loader


def build_eval_loader(config: CfgNode, rank: int = 0, world_size: int = 1) -> DataLoader:
    """Build the loader of this process's shard of the evaluation images, one per batch.

    Together, processes see each image once. Detections depend slightly on how much padding the largest image of a batch
    causes, and must not depend on which images share a batch.

    Raises:
        DataError: the data cannot be used.
    """
    dataset = once_per_node(lambda: open_split(config, 'VAL', log=get_logger(rank).info).share())
    sampler = ShardSampler(len(dataset), rank, world_size)
    return build_loader(config, dataset, sampler, batch_size=1, collate_fn=collate)


def collate(samples: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """Collate samples into a list of images, which differ in size, and a list of targets."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


def split_files(config: CfgNode, split: str) -> SplitFiles:
    """Paths of a split: its annotation file and its folder of images.

    Args:
        config: the config tree; `DATA` is read.
        split: `TRAIN` or `VAL`.

    Raises:
        DataError: there is no data path.
    """
    data = config.DATA
    if not data.DATA_PATH:
        raise DataError('no data: give --data-path the folder that holds annotations/ and the folders of images')
    root, name = Path(data.DATA_PATH), data[f'{split}_SPLIT']
    annotations = data[f'{split}_ANNOTATIONS'] or f'annotations/instances_{name}.json'
    return SplitFiles(root / annotations, root / (data[f'{split}_IMAGES'] or name))


def with_classes_of_data(config: CfgNode, split: str | None = None) -> CfgNode:
    """Set `MODEL.NUM_CLASSES`, if it is None, to the number of classes in the annotation file; returns the config.

    Args:
        config: the config tree.
        split: `TRAIN` or `VAL`; by default the one that the run begins with.

    Raises:
        DataError: the file cannot be read.
    """
    if config.MODEL.NUM_CLASSES is not None:
        return config
    files = split_files(config, split or ('VAL' if config.EVAL_MODE else 'TRAIN'))
    config = config.clone()
    config.defrost()
    config.MODEL.NUM_CLASSES = len(read_class_names(files.annotations, list(filter(None, config.DATA.CLASSES))))
    config.freeze()
    return config


def log_to_stderr(text: str) -> None:
    """Print a line about reading a large file, in a program without a log."""
    print(printable(text), file=sys.stderr, flush=True)


def open_split(config: CfgNode, split: str, transform: Callable | None = None, log: Log = log_to_stderr) -> CocoDataset:
    """Open a split, which must have as many categories as the network has classes.

    Args:
        config: the config tree.
        split: `TRAIN` or `VAL`.
        transform: takes and returns an image and its target; None for none.
        log: gets lines about reading a large file.

    Raises:
        DataError: the data cannot be used.
    """
    data, is_train = config.DATA, split == 'TRAIN'
    selection = Selection(list(filter(None, data.CLASSES)), data[f'{split}_LIMIT'], data.EMPTY_IMAGES)
    dataset = CocoDataset(
        Path(data.DATA_PATH),
        data[f'{split}_SPLIT'],
        transform,
        is_train,
        config.MODEL.MASK.ENABLED,
        split_files(config, split),
        selection,
        data.EXIF,
        config.INPUT.COPY_PASTE if transform else 0.0,
        log,
    )
    count = len(dataset.categories)
    if count != config.MODEL.NUM_CLASSES:
        raise DataError(
            f'{dataset.annotation_file} has {count} categories, but MODEL.NUM_CLASSES is {config.MODEL.NUM_CLASSES}: '
            f'write --opts MODEL.NUM_CLASSES {count}, or give another --data-path'
        )
    return dataset
