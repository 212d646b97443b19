"""Loaders, transforms, Mixup and the loss that matches its targets."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup, create_transform
from timm.data.transforms import str_to_interp_mode
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms
from torchvision.datasets import ImageFolder
from yacs.config import CfgNode

from data.image_folder import DataError, open_folder
from data.samplers import ShardSampler, TrainSampler
from data.seeding import SeededDataset

# PIL mode, mean and standard deviation of the pixels by number of channels; grey is the mean over ImageNet's colours.
_CHANNELS = {
    3: ('RGB', IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    1: ('L', (sum(IMAGENET_DEFAULT_MEAN) / 3,), (sum(IMAGENET_DEFAULT_STD) / 3,)),
}


def build_loaders(config: CfgNode, rank: int = 0, world_size: int = 1) -> tuple[DataLoader, DataLoader]:
    """Batches of this process's share of `train/` and of `val/`: images (B, C, H, W) and class indices (B,).

    Training batches are shuffled, augmented and full (the rest of an epoch is left out); call the training loader's
    `sampler.set_epoch` before each epoch. They are the same for any `DATA.NUM_WORKERS`. For evaluation batches see
    `build_eval_loader`.

    Raises:
        DataError: the data cannot be used, or is too little for one batch a process.
    """
    size = config.DATA.BATCH_SIZE
    if uses_mixup(config) and size % 2:
        raise DataError(
            f'DATA.BATCH_SIZE is {size}, but Mixup and CutMix pair the images of a batch: '
            f'write an even --batch-size, or --opts AUG.MIXUP 0 AUG.CUTMIX 0'
        )
    dataset = _open_split(config, 'train', build_transform(config, is_train=True))
    eval_loader = build_eval_loader(config, rank, world_size)
    if different := set(dataset.classes) ^ set(eval_loader.dataset.classes):
        raise DataError(
            f'train/ and val/ in {config.DATA.DATA_PATH} have different class folders: '
            f'{", ".join(sorted(different)[:3])} is in one of them only'
        )
    sampler = TrainSampler(len(dataset), rank, world_size, config.SEED)
    return build_train_loader(config, dataset, sampler), eval_loader


def build_eval_loader(config: CfgNode, rank: int = 0, world_size: int = 1) -> DataLoader:
    """Batches of this process's share of `val/`, in order; all processes together see each image once.

    Raises:
        DataError: the data cannot be used.
    """
    dataset = _open_split(config, 'val', build_transform(config, is_train=False))
    return build_loader(config, dataset, ShardSampler(len(dataset), rank, world_size), config.DATA.BATCH_SIZE)


def build_transform(config: CfgNode, is_train: bool) -> Callable:
    """From a PIL image to a normalised tensor (C, H, W): augmented for training, cropped or resized for evaluation."""
    size, interpolation = config.DATA.IMG_SIZE, config.DATA.INTERPOLATION
    _, mean, std = _channels(config)
    if is_train:
        aug = config.AUG
        try:
            return create_transform(
                input_size=size,
                is_training=True,
                scale=tuple(aug.SCALE),
                ratio=tuple(aug.RATIO),
                hflip=aug.HFLIP,
                color_jitter=aug.COLOR_JITTER or None,
                auto_augment=None if aug.AUTO_AUGMENT in ('', 'none') else aug.AUTO_AUGMENT,
                interpolation=interpolation,
                re_prob=aug.REPROB,
                re_mode=aug.REMODE,
                re_count=aug.RECOUNT,
                mean=mean,
                std=std,
            )
        except (AssertionError, KeyError, ValueError) as error:  # of timm's parser, the only part that takes any text
            raise DataError(
                f'AUG.AUTO_AUGMENT is {aug.AUTO_AUGMENT!r}, which timm cannot read: '
                f'write none, or a policy such as rand-m9-mstd0.5-inc1'
            ) from error
    mode = str_to_interp_mode(interpolation)
    if config.TEST.CROP:
        resize = [transforms.Resize(int(256 / 224 * size), mode), transforms.CenterCrop(size)]
    else:
        resize = [transforms.Resize((size, size), mode)]
    return transforms.Compose([*resize, transforms.ToTensor(), transforms.Normalize(mean, std)])


def build_mixup(config: CfgNode) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A function from images and class indices to images and the targets that `build_criterion` takes."""
    aug = config.AUG
    if not uses_mixup(config):
        return lambda images, targets: (images, targets)
    return Mixup(
        mixup_alpha=aug.MIXUP,
        cutmix_alpha=aug.CUTMIX,
        cutmix_minmax=aug.CUTMIX_MINMAX,
        prob=aug.MIXUP_PROB,
        switch_prob=aug.MIXUP_SWITCH_PROB,
        mode=aug.MIXUP_MODE,
        label_smoothing=config.MODEL.LABEL_SMOOTHING,
        num_classes=config.MODEL.NUM_CLASSES,
    )


def build_criterion(config: CfgNode) -> nn.Module:
    """The training loss: for soft targets where batches are mixed, else with label smoothing, else plain."""
    if uses_mixup(config):
        return SoftTargetCrossEntropy()
    if config.MODEL.LABEL_SMOOTHING > 0:
        return LabelSmoothingCrossEntropy(config.MODEL.LABEL_SMOOTHING)
    return nn.CrossEntropyLoss()


def uses_mixup(config: CfgNode) -> bool:
    """Whether training batches are mixed, by Mixup or by CutMix, and so have soft targets."""
    return config.AUG.MIXUP > 0 or config.AUG.CUTMIX > 0 or config.AUG.CUTMIX_MINMAX is not None


def image_mode(config: CfgNode) -> str:
    """PIL mode that images are read in: RGB or L (grey)."""
    return _channels(config)[0]


def _channels(config: CfgNode) -> tuple[str, tuple[float, ...], tuple[float, ...]]:
    channels = config.MODEL.MSG.IN_CHANS
    if channels not in _CHANNELS:
        raise DataError(f'MODEL.MSG.IN_CHANS is {channels}, but images are read with 3 channels or 1: write 3 or 1')
    return _CHANNELS[channels]


def _open_split(config: CfgNode, split: str, transform: Callable) -> ImageFolder:
    """The images of `train` or `val`, with as many classes as the network."""
    if not config.DATA.DATA_PATH:
        raise DataError('no data: give --data-path the folder that holds train/<class>/ and val/<class>/')
    if config.DATA.DATASET != 'imagenet':
        raise DataError(f'DATA.DATASET is {config.DATA.DATASET!r}: write imagenet')
    root = Path(config.DATA.DATA_PATH) / split
    dataset = open_folder(root, transform, image_mode(config))
    if len(dataset.classes) != config.MODEL.NUM_CLASSES:
        raise DataError(
            f'{root} has {len(dataset.classes)} class folders, but MODEL.NUM_CLASSES is {config.MODEL.NUM_CLASSES}: '
            f'write --opts MODEL.NUM_CLASSES {len(dataset.classes)}, or give another --data-path'
        )
    return dataset


def build_train_loader(
    config: CfgNode, dataset: Dataset, sampler: TrainSampler, collate_fn: Callable | None = None
) -> DataLoader:
    """Full batches of a data set whose augmentation depends on seed, epoch and index alone.

    Args:
        config: the config tree.
        dataset: indexed by sample.
        sampler: of its samples.
        collate_fn: a batch from a list of samples; None stacks them.

    Raises:
        DataError: the data are too little for one batch a process.
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
    """Batches of a data set, loaded as `DATA` says; see `build_train_loader` for the arguments."""
    workers = config.DATA.NUM_WORKERS
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate_fn,
        multiprocessing_context='fork' if workers and sys.platform == 'linux' else None,  # Python 3.14 would not
        pin_memory=config.DATA.PIN_MEMORY and torch.cuda.is_available(),
        drop_last=drop_last,
        persistent_workers=workers > 0,
        worker_init_fn=_outlive_launcher,
        generator=torch.Generator(),  # of its own, so that making an iterator draws no number from the run's
    )


def _outlive_launcher(worker: int) -> None:
    """End a loader process on SIGTERM only where its training process sends it, and on no other signal to stop.

    Launchers signal all processes of a job, and the training process still needs batches to finish its step.
    """
    signal.set_wakeup_fd(-1)  # of the training process, where this one is a fork of it
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_wait_for_sigterm_of, args=(os.getppid(),), daemon=True).start()


def _wait_for_sigterm_of(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)
