"""Images in, batches out: loaders, augmentation, Mixup with its matching loss."""

from data.build import build_eval_loader, build_loaders
from data.images import DataError
from data.mixup import build_criterion, build_mixup

__all__ = ['DataError', 'build_criterion', 'build_eval_loader', 'build_loaders', 'build_mixup']
