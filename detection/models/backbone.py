"""The classifier's network as a backbone: images of any size in, one normed feature map per stage out."""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from models import MSGTransformer


class MSGBackbone(MSGTransformer):
    """The network without its head, and a norm for each stage's feature map.

    `norm`, for the last feature map, is the classifier's; `out_norms`, for the others, are new.

    Args:
        **options: of `MSGTransformer`, but for the image size, the classes and `ape`.
    """

    def __init__(self, **options: Any):
        super().__init__(img_size=None, num_classes=0, **options)
        self.out_channels = [info['num_chs'] for info in self.feature_info]
        self.out_norms = nn.ModuleList(type(self.norm)(channels) for channels in self.out_channels[:-1])

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Images (B, 3, height, width) to feature maps (B, C, H, W), finest first, named '0', '1', ..."""
        feature_maps = self.forward_intermediates(images, output_fmt='NHWC', intermediates_only=True)
        normed = [norm(x) for norm, x in zip((*self.out_norms, self.norm), feature_maps, strict=True)]
        # A copy in any case: `contiguous` would ask for the size, which an exported graph may leave open.
        copies = (x.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format) for x in normed)
        return OrderedDict((str(i), x) for i, x in enumerate(copies))
