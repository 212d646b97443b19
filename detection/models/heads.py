"""The heads of one stage: class and box of a RoI, and its mask.

Letters: n RoIs, K classes (without the background), C channels.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from detection.models.norm import SyncBatchNorm


class BoxHead(nn.Module):
    """Class and box of a RoI: 3 x 3 convolutions, linear layers, and one linear layer for each of the two.

    Each class has its own box, and the background none (torchvision's `FastRCNNPredictor` regresses that too).

    Args:
        channels: channels C of the features.
        pool_size: size of a RoI's features.
        convs: channels of the convolutions.
        linears: channels of the linear layers.
        classes: K.
    """

    def __init__(self, channels: int, pool_size: int, convs: Sequence[int], linears: Sequence[int], classes: int):
        super().__init__()
        size = (channels, pool_size, pool_size)
        self.trunk = FastRCNNConvFCHead(size, list(convs), list(linears), norm_layer=SyncBatchNorm)
        self.logits = nn.Linear(linears[-1], classes + 1)
        self.box_deltas = nn.Linear(linears[-1], 4 * classes)
        for layer, std in ((self.logits, 0.01), (self.box_deltas, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Features (n, C, size, size) to logits (n, K + 1), background first, and box deltas (n, K, 4), in fp32."""
        x = self.trunk(pooled)
        return self.logits(x).float(), self.box_deltas(x).unflatten(1, (-1, 4)).float()


class MaskHead(nn.Sequential):
    """A mask for each class: 3 x 3 convolutions, a deconvolution to twice the size, a 1 x 1 convolution.

    Args:
        channels: channels C of the features.
        convs: channels of the convolutions.
        upsampled: channels after the deconvolution.
        classes: K.
    """

    def __init__(self, channels: int, convs: Sequence[int], upsampled: int, classes: int):
        super().__init__(
            MaskRCNNHeads(channels, list(convs), dilation=1), MaskRCNNPredictor(convs[-1], upsampled, classes)
        )

    def forward(self, pooled: Tensor, labels: Tensor | None = None) -> Tensor:
        """Features (n, C, size, size) to logits (n, K, 2 size, 2 size), in fp32.

        With labels, 1 to K, (n,): only those of the RoI's label, (n, 1, 2 size, 2 size), which is less work.
        """
        if labels is None:
            return super().forward(pooled).float()
        trunk, predictor = self
        x = predictor.relu(predictor.conv5_mask(trunk(pooled)))
        last = predictor.mask_fcn_logits
        weight, bias = last.weight[labels - 1, :, 0, 0], last.bias[labels - 1]  # (n, channels), (n,)
        logits = (weight[:, None] @ x.flatten(2)).unflatten(2, x.shape[2:])
        return logits.float() + bias.view(-1, 1, 1, 1)
