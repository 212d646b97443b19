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
    """Batches of this process's share of the training and of the evaluation images: lists of images and of targets.

    Training batches are shuffled, augmented, full, and of images that are all wide or all high; see `CocoDataset` for
    an image and a target, and `data.build_loaders` for what else they keep to.

    Raises:
        DataError: the data cannot be used, or is too little for one batch a process.
    """
    dataset = _open_split(config, config.DATA.TRAIN_SPLIT, TrainTransform(config), is_train=True)
    eval_loader = build_eval_loader(config, rank, world_size)
    names, eval_names = ([each['name'] for each in data.categories] for data in (dataset, eval_loader.dataset))
    if names != eval_names:
        raise DataError(
            f'{dataset.annotation_file} and {eval_loader.dataset.annotation_file} have different categories: '
            f'write the same ones in the same order into both'
        )
    groups = [int(image['height'] > image['width']) for image in dataset.images]
    sampler = GroupedTrainSampler(groups, config.DATA.BATCH_SIZE, rank, world_size, config.SEED)
    return build_train_loader(config, dataset, sampler, collate), eval_loader


def build_eval_loader(config: CfgNode, rank: int = 0, world_size: int = 1) -> DataLoader:
    """This process's share of the evaluation images, one a batch; all processes together see each image once.

    What a detector finds on an image depends a little on how far the largest of its batch pads it, and must not depend
    on which images those are.

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
    """The images of a split, with as many categories as the network has classes."""
    if not config.DATA.DATA_PATH:
        raise DataError('no data: give --data-path the folder that holds annotations/ and the folders of images')
    dataset = CocoDataset(Path(config.DATA.DATA_PATH), split, transform, is_train)
    count = len(dataset.categories)
    if count != config.MODEL.NUM_CLASSES:
        raise DataError(
            f'{dataset.annotation_file} has {count} categories, but MODEL.NUM_CLASSES is {config.MODEL.NUM_CLASSES}: '
            f'write --opts MODEL.NUM_CLASSES {count}, or give another --data-path'
        )
    return dataset
