"""Mixup and CutMix."""

from collections.abc import Callable

from timm.data import Mixup
from torch import Tensor
from yacs.config import CfgNode


def build_mixup(config: CfgNode) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Build Mixup and CutMix: a function from images and class indices to mixed images and soft targets.

    If both are off, the function returns its arguments unchanged.
    """
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


def uses_mixup(config: CfgNode) -> bool:
    """Whether training batches are mixed, by Mixup or CutMix, and so have soft targets."""
    return config.AUG.MIXUP > 0 or config.AUG.CUTMIX > 0 or config.AUG.CUTMIX_MINMAX is not None
