"""Training losses of classification, by name."""

from collections.abc import Callable

from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from yacs.config import CfgNode

from data.images import PartError, kind_of_value
from data.mixup import uses_mixup
from extensions import Registry


class WeightedCrossEntropy(nn.CrossEntropyLoss):
    """Cross entropy with class weights, averaged over the batch.

    `nn.CrossEntropyLoss` divides by the sum of the batch's weights instead: the gradient of several ranks or
    accumulated batches would not be that of one large batch.

    Args:
        weight: class weights, (classes,).
        label_smoothing: label smoothing for class indices; soft targets are not changed.
    """

    def __init__(self, weight: Tensor, label_smoothing: float = 0.0):
        super().__init__(weight, reduction='none', label_smoothing=label_smoothing)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean of the images' losses; targets are class indices (B,) or probabilities (B, classes)."""
        return super().forward(logits, targets).mean()


def cross_entropy(config: CfgNode, class_weights: Tensor | None = None) -> nn.Module:
    """Cross entropy: for soft targets where batches are mixed, else with label smoothing, else plain."""
    smoothing = config.MODEL.LABEL_SMOOTHING
    if class_weights is not None:
        return WeightedCrossEntropy(class_weights, 0.0 if uses_mixup(config) else smoothing)
    if uses_mixup(config):
        return SoftTargetCrossEntropy()
    if smoothing > 0:
        return LabelSmoothingCrossEntropy(smoothing)
    return nn.CrossEntropyLoss()


class FullPrecisionBCE(BinaryCrossEntropy):
    """timm's binary cross entropy, of logits in float32 under autocast too, as the cross entropy is."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean loss; targets are class indices (B,) or values from 0 to 1 (B, classes)."""
        return super().forward(logits.float(), targets)


def bce(config: CfgNode, class_weights: Tensor | None = None) -> nn.Module:
    """Binary cross entropy of each class, of timm; class weights multiply the loss of the classes that are present."""
    return FullPrecisionBCE(
        config.MODEL.LABEL_SMOOTHING,
        config.TRAIN.BCE_THRESHOLD,
        sum_classes=config.TRAIN.BCE_SUM,
        pos_weight=class_weights,
        smooth_dense=config.DATA.MULTI_LABEL,
    )


# Values of TRAIN.LOSS
LOSSES = Registry('loss', cross_entropy=cross_entropy, bce=bce)

# Values of TRAIN.LOSS that take class weights
WEIGHTED_LOSSES = ('cross_entropy', 'bce')


def register_loss(name: str) -> Callable[[Callable], Callable]:
    """Make a training loss available as `TRAIN.LOSS name`.

    The decorated class or function is called with the config and gives a module, which maps logits (B, classes) and
    targets to the mean loss. Targets are class indices (B,) or, with Mixup or CutMix, probabilities (B, classes) that
    include label smoothing, or, with `DATA.MULTI_LABEL`, vectors (B, classes) of 0 and 1.

    Raises:
        ValueError: the name belongs to another loss.
    """
    return LOSSES.register(name)


def build_criterion(config: CfgNode, class_weights: Tensor | None = None) -> nn.Module:
    """Build the training loss of `TRAIN.LOSS`.

    Args:
        config: the config tree.
        class_weights: weight of each class, (classes,), for the losses in `WEIGHTED_LOSSES`; None for none.

    Raises:
        PartError: the loss is no module, or has parameters, which would not be trained.
    """
    options = {} if class_weights is None else {'class_weights': class_weights}
    criterion = LOSSES[config.TRAIN.LOSS](config, **options)
    if not isinstance(criterion, nn.Module):
        raise PartError(f'the loss {config.TRAIN.LOSS} is {kind_of_value(criterion)}: return a torch.nn.Module')
    if any(True for _ in criterion.parameters()):
        raise PartError(f'the loss {config.TRAIN.LOSS} has parameters, which are not trained: register buffers')
    return criterion
