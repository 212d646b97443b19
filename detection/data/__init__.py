"""Images and annotations in COCO's format: reader, augmentation, loaders."""

from detection.data.build import build_eval_loader, build_loaders, open_split, with_classes_of_data
from detection.data.coco import CocoDataset

__all__ = ['CocoDataset', 'build_eval_loader', 'build_loaders', 'open_split', 'with_classes_of_data']
