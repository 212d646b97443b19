"""Loaders of images with their objects, from a folder in COCO's layout."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from data import DataError
from data.build import build_loader, build_train_loader
from data.samplers import ShardSampler
from detection.data.coco import CocoDataset, Target
from detection.data.samplers import GroupedTrainSampler
from detection.data.transforms import TrainTransform


def build_loaders(config: CfgNode, rank: int = 0, world_size: int = 1) -> tuple[DataLoader, DataLoader]:
    """Build loaders of this process's share of the training and evaluation images: lists of images and of targets.

    Training batches are shuffled, augmented, full, and all landscape or all portrait; see `CocoDataset` for images and
    targets, and `data.build_loaders` for the rest.

    Raises:
        DataError: the data cannot be used, or one batch per process needs more images.
    """
    dataset = _open_split(config, config.DATA.TRAIN_SPLIT, TrainTransform(config), is_train=True)
    eval_loader = build_eval_loader(config, rank, world_size)
    if dataset.class_names != eval_loader.dataset.class_names:
        raise DataError(
            f'{dataset.annotation_file} and {eval_loader.dataset.annotation_file} have different categories: '
            f'write the same ones in the same order into both'
        )
    is_portrait = [int(image['height'] > image['width']) for image in dataset.images]
    sampler = GroupedTrainSampler(is_portrait, config.DATA.BATCH_SIZE, rank, world_size, config.SEED)
    return build_train_loader(config, dataset, sampler, collate), eval_loader


def build_eval_loader(config: CfgNode, rank: int = 0, world_size: int = 1) -> DataLoader:
    """Build the loader of this process's shard of the evaluation images, one per batch.

    Together, processes see each image once. Detections depend slightly on how much padding the largest image of a batch
    causes, and must not depend on which images share a batch.

    Raises:
        DataError: the data cannot be used.
    """
    dataset = _open_split(config, config.DATA.VAL_SPLIT)
    sampler = ShardSampler(len(dataset), rank, world_size)
    return build_loader(config, dataset, sampler, batch_size=1, collate_fn=collate)


def collate(samples: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """A list of images, which differ in size, and one of their targets."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


def _open_split(config: CfgNode, split: str, transform: Callable | None = None, is_train: bool = False) -> CocoDataset:
    """Open a split, which must have as many categories as the network has classes."""
    if not config.DATA.DATA_PATH:
        raise DataError('no data: give --data-path the folder that holds annotations/ and the folders of images')
    dataset = CocoDataset(Path(config.DATA.DATA_PATH), split, transform, is_train, config.MODEL.MASK.ENABLED)
    count = len(dataset.categories)
    if count != config.MODEL.NUM_CLASSES:
        raise DataError(
            f'{dataset.annotation_file} has {count} categories, but MODEL.NUM_CLASSES is {config.MODEL.NUM_CLASSES}: '
            f'write --opts MODEL.NUM_CLASSES {count}, or give another --data-path'
        )
    return dataset
