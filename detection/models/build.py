"""The detector from the config tree."""

import re
from collections import OrderedDict
from collections.abc import Mapping

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool
from yacs.config import CfgNode

from detection.models.backbone import Backbone, build_backbone
from detection.models.cascade import CascadeHeads
from detection.models.masks import BoxMasks
from detection.models.rpn import build_rpn
from detection.models.transform import DetectorTransform
from engine.config_tree import ConfigError


class FeaturePyramid(nn.Module):
    """The backbone and a feature pyramid on its feature maps, with one more level by subsampling.

    Args:
        body: the backbone.
        channels: channels of every level.
    """

    def __init__(self, body: Backbone, channels: int):
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(body.out_channels, channels, LastLevelMaxPool())

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Images (B, 3, height, width) to feature maps by level, finest first."""
        return self.fpn(self.body(images))


class Detector(GeneralizedRCNN):
    """torchvision's `GeneralizedRCNN`, with what the optimizer and checkpoints need to know.

    In training it takes images at their size and returns weighted losses by name. In evaluation it resizes images, and
    returns `boxes`, `labels`, `scores` and, with mask heads, `masks` of each image, in the image's own pixels. Masks
    are boolean, (n, 1, H, W); `detect` keeps them within their boxes, which takes a fraction of the memory.

    It takes the arguments of `GeneralizedRCNN`: `backbone`, `rpn`, `roi_heads` and `transform`.
    """

    # Names of the weights that depend on the classes.
    HEAD = r'roi_heads\..*(logits|box_deltas)\.'

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses in training, detections of each image in evaluation; images (3, H, W) are in [0, 1]."""
        if self.training:
            return super().forward(images, targets)
        return [
            {key: x.dense() if isinstance(x, BoxMasks) else x for key, x in detections.items()}
            for detections in self.detect(images)
        ]

    def detect(self, images: list[Tensor], short: int | None = None) -> list[dict[str, Tensor | BoxMasks]]:
        """Detections of each image, in evaluation, with their `masks` as `BoxMasks`.

        Args:
            images: (3, H, W), in [0, 1].
            short: short side to resize them to, in pixels; None for that of the config.
        """
        with self.transform.resizing_to(short):
            return super().forward(images)

    def losses(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Compute the training losses by name, for a network that is and stays in evaluation mode.

        Norms use their running statistics, which do not change, and no path is dropped. Anchors and RoIs are sampled
        with random numbers, as in training.

        Args:
            images: (3, H, W), in [0, 1], at the size at which the network sees them.
            targets: objects of each image, see `CascadeHeads.forward`.
        """
        # Their parts, such as norms, stay in evaluation mode.
        containers = (self, self.transform, self.rpn, self.roi_heads)
        for module in containers:
            module.training = True
        try:
            return super().forward(images, targets)
        finally:
            for module in containers:
                module.training = False

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay."""
        return {f'backbone.body.{name}' for name in self.backbone.body.no_weight_decay()}

    def no_weight_decay_keywords(self) -> set[str]:
        """Parts of names of parameters without weight decay."""
        return self.backbone.body.no_weight_decay_keywords()

    def fit_state_dict(self, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Fit the backbone's weights to this one's windows, and leave out the mask heads of a detector of boxes."""
        prefix = 'backbone.body.'
        body = {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}
        fitted, notes = self.backbone.body.fit_state_dict(body)
        weights = weights | {prefix + name: x for name, x in fitted.items()}
        masks = [name for name in weights if name.startswith('roi_heads.mask_heads.')]
        if masks and self.roi_heads.mask_heads is None:
            weights = {name: x for name, x in weights.items() if name not in masks}
            notes.append('its mask heads are left out')
        return weights, notes

    @staticmethod
    def upgrade_state_dict(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights under their current names; older checkpoints call `box_deltas` `offsets`."""
        return {re.sub(r'(box_heads\.\d+)\.offsets\.', r'\1.box_deltas.', name): x for name, x in weights.items()}


def build_detector(config: CfgNode) -> Detector:
    """Build the detector described by `config.MODEL`, `INPUT` and `TRAIN`.

    Raises:
        ValueError: see `MSGTransformer`.
        ConfigError: `MODEL.NUM_CLASSES` is None, and no annotation file has been read.
    """
    if config.MODEL.NUM_CLASSES is None:
        raise ConfigError('MODEL.NUM_CLASSES is None, which is for training and evaluation: write a number')
    body = build_backbone(config)
    strides = [*body.strides, 2 * body.strides[-1]]
    return Detector(
        FeaturePyramid(body, config.MODEL.FPN_CHANNELS),
        build_rpn(config, strides),
        CascadeHeads(config, strides[:-1]),
        build_detector_transform(config, strides[-2]),
    )


def build_detector_transform(config: CfgNode, multiple: int) -> DetectorTransform:
    """Build the transform of `INPUT`, which pads to multiples of the coarsest feature map's stride."""
    return DetectorTransform(
        min_size=config.INPUT.TEST_SHORT,
        max_size=config.INPUT.MAX_LONG,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
        size_divisible=multiple,
    )
