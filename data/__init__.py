"""Images in, batches out: formats, loaders, augmentation, Mixup with its matching loss."""

from data.build import build_eval_loader, build_loaders
from data.class_balance import class_weights
from data.dataset import IGNORED, ImageDataset, Sample
from data.images import DataError
from data.losses import build_criterion
from data.mixup import build_mixup
from data.preprocess import Preprocess
from data.sizes import size_phases
from data.skipped import SkippedImages

__all__ = [
    'IGNORED',
    'DataError',
    'ImageDataset',
    'Preprocess',
    'Sample',
    'SkippedImages',
    'build_criterion',
    'build_eval_loader',
    'build_loaders',
    'build_mixup',
    'class_weights',
    'size_phases',
]
