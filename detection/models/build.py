"""Detectors from the config tree."""

from collections import OrderedDict

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool
from yacs.config import CfgNode

from detection.models.backbone import MSGBackbone
from detection.models.cascade import CascadeHeads
from detection.models.rpn import build_rpn
from detection.models.transform import DetectorTransform
from models.build import network_options


class FeaturePyramid(nn.Module):
    """The network and the feature pyramid on its maps, with one more level by subsampling.

    Args:
        body: gives one map a stage.
        channels: of every level.
    """

    def __init__(self, body: MSGBackbone, channels: int):
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(body.out_channels, channels, LastLevelMaxPool())

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Images (B, 3, height, width) to maps by level, finest first."""
        return self.fpn(self.body(images))


class Detector(GeneralizedRCNN):
    """torchvision's `GeneralizedRCNN`, which says what of its backbone is not decayed.

    In training it takes images as they are and gives weighted losses by name; in evaluation it resizes them, and gives
    `boxes`, `labels`, `scores` and `masks` of each image, in its own pixels.

    Args:
        backbone, rpn, roi_heads, transform: see `GeneralizedRCNN`.
    """

    def no_weight_decay_keywords(self) -> set[str]:
        """Parts of the names of parameters that weight decay leaves alone."""
        return self.backbone.body.no_weight_decay_keywords()


def build_detector(config: CfgNode) -> Detector:
    """Build the detector that `config.MODEL`, `INPUT` and `TRAIN.USE_CHECKPOINT` describe.

    Raises:
        ValueError: the channels do not divide, or the lists differ in length.
    """
    msg = config.MODEL.MSG
    body = MSGBackbone(**network_options(config))
    strides = [msg.PATCH_SIZE * 2**i for i in range(len(msg.DEPTHS) + 1)]
    return Detector(
        FeaturePyramid(body, config.MODEL.FPN_CHANNELS),
        build_rpn(config, strides),
        CascadeHeads(config, strides[:-1]),
        build_transform(config, strides[-2]),
    )


def build_transform(config: CfgNode, multiple: int) -> DetectorTransform:
    """What `INPUT` says of evaluation, with sides padded to a multiple of the coarsest map's stride."""
    return DetectorTransform(
        min_size=config.INPUT.TEST_SHORT,
        max_size=config.INPUT.MAX_LONG,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
        size_divisible=multiple,
    )
