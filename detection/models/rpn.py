"""The region proposal network, from torchvision's parts."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from yacs.config import CfgNode

CPU = torch.device('cpu')


class StridedAnchors(AnchorGenerator):
    """Anchors at fixed strides, of exact sizes, in the precision of the images.

    torchvision derives strides from the sizes of the feature maps: 64 becomes 61 where the coarsest one was rounded up.
    It rounds anchors to whole pixels, and computes them in the feature map's dtype; in half precision, coordinates are
    off by pixels.

    Args:
        strides: stride of each level in pixels, finest first.
        scale: size of an anchor, relative to its level's stride.
        ratios: height over width of the anchors at each location.
    """

    def __init__(self, strides: Sequence[int], scale: int, ratios: Sequence[float]):
        super().__init__(tuple((scale * stride,) for stride in strides), (tuple(ratios),) * len(strides))
        self.strides = list(strides)

    def generate_anchors(
        self,
        scales: Sequence[int],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device = CPU,
    ) -> Tensor:
        """Anchors of one location, centred at 0, (n, 4): all ratios at the first scale, then at the next."""
        root = torch.tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        sizes = torch.stack((1 / root, root), dim=1)  # width and height
        halves = torch.cat([sizes * scale / 2 for scale in scales])
        return torch.cat((-halves, halves), dim=1)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Anchors of each image, (n, 4): of all levels, finest first."""
        pixels = image_list.tensors
        with torch.inference_mode(False):  # an evaluation may come first, and training cannot use its tensors
            self.set_cell_anchors(pixels.dtype, pixels.device)
        grids = [features.shape[-2:] for features in feature_maps]
        anchors = torch.cat(self.grid_anchors(grids, [(stride, stride) for stride in self.strides]))
        return [anchors] * len(image_list.image_sizes)


class Fp32RPNHead(RPNHead):
    """torchvision's head with fp32 outputs, also under autocast, since boxes are made of them."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Objectness (B, anchors, H, W) and box deltas (B, 4 anchors, H, W) of each feature map (B, C, H, W)."""
        objectness, box_deltas = super().forward(x)
        return [x.float() for x in objectness], [x.float() for x in box_deltas]


def build_rpn(config: CfgNode, strides: Sequence[int]) -> RegionProposalNetwork:
    """Build the network of `MODEL.RPN` on levels of these strides."""
    rpn = config.MODEL.RPN
    return RegionProposalNetwork(
        StridedAnchors(strides, rpn.ANCHOR_SCALE, rpn.ANCHOR_RATIOS),
        Fp32RPNHead(config.MODEL.FPN_CHANNELS, len(rpn.ANCHOR_RATIOS)),
        fg_iou_thresh=rpn.POSITIVE_IOU,
        bg_iou_thresh=rpn.NEGATIVE_IOU,
        batch_size_per_image=rpn.SAMPLES,
        positive_fraction=rpn.POSITIVE_FRACTION,
        pre_nms_top_n={'training': rpn.PRE_NMS_TRAIN, 'testing': rpn.PRE_NMS_TEST},
        post_nms_top_n={'training': rpn.POST_NMS_TRAIN, 'testing': rpn.POST_NMS_TEST},
        nms_thresh=rpn.NMS_IOU,
    )
