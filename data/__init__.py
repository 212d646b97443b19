"""Images in, batches out: loaders, augmentation, Mixup with its matching loss."""

from data.build import build_criterion, build_eval_loader, build_loaders, build_mixup
from data.image_folder import DataError

__all__ = ['DataError', 'build_criterion', 'build_eval_loader', 'build_loaders', 'build_mixup']
