"""Training losses of classification, by name."""

from collections.abc import Callable

from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn
from yacs.config import CfgNode

from data.images import PartError, kind_of_value
from data.mixup import uses_mixup
from extensions import Registry


def cross_entropy(config: CfgNode) -> nn.Module:
    """Cross entropy: for soft targets where batches are mixed, else with label smoothing, else plain."""
    if uses_mixup(config):
        return SoftTargetCrossEntropy()
    if config.MODEL.LABEL_SMOOTHING > 0:
        return LabelSmoothingCrossEntropy(config.MODEL.LABEL_SMOOTHING)
    return nn.CrossEntropyLoss()


# Values of TRAIN.LOSS
LOSSES = Registry('loss', cross_entropy=cross_entropy)


def register_loss(name: str) -> Callable[[Callable], Callable]:
    """Make a training loss available as `TRAIN.LOSS name`.

    The decorated class or function is called with the config and gives a module, which maps logits (B, classes) and
    targets to the mean loss. Targets are class indices (B,) or, with Mixup or CutMix, probabilities (B, classes) that
    include label smoothing.

    Raises:
        ValueError: the name belongs to another loss.
    """
    return LOSSES.register(name)


def build_criterion(config: CfgNode) -> nn.Module:
    """Build the training loss of `TRAIN.LOSS`.

    Raises:
        PartError: the loss is no module, or has parameters, which would not be trained.
    """
    criterion = LOSSES[config.TRAIN.LOSS](config)
    if not isinstance(criterion, nn.Module):
        raise PartError(f'the loss {config.TRAIN.LOSS} is {kind_of_value(criterion)}: return a torch.nn.Module')
    if any(True for _ in criterion.parameters()):
        raise PartError(f'the loss {config.TRAIN.LOSS} has parameters, which are not trained: register buffers')
    return criterion
