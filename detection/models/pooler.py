"""RoIAlign: pool the features of RoIs from the pyramid level that suits their size."""

from collections.abc import Sequence
from math import log2

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from detection.models.torchvision_private import LevelMapper


class AlignedPooler(nn.Module):
    """RoIAlign with half-pixel centres and as many samples per bin as it has pixels.

    torchvision's `MultiScaleRoIAlign` has no `aligned`; its rule for the level is used here (Lin et al.,
    arXiv:1612.03144, eq. 1).

    Args:
        size: size of a RoI's features.
        strides: stride of each level in pixels: powers of 2, finest first.
    """

    def __init__(self, size: int, strides: Sequence[int]):
        super().__init__()
        self.size, self.strides = size, list(strides)
        self.map_levels = LevelMapper(int(log2(strides[0])), int(log2(strides[-1])))

    def forward(self, feature_maps: Sequence[Tensor], boxes: list[Tensor]) -> Tensor:
        """Pool RoIs.

        Args:
            feature_maps: a feature map per level, (B, C, H, W); further levels are ignored.
            boxes: RoIs of each image, (n, 4), x1 y1 x2 y2 in pixels.

        Returns:
            Features (n of all images, C, size, size), in channels-last layout, in which heads are faster.
        """
        image_index = [torch.full((len(x), 1), float(i), device=x.device) for i, x in enumerate(boxes)]
        rois = torch.cat((torch.cat(image_index), torch.cat(boxes).float()), dim=1)  # (n, 5)
        levels = self.map_levels(boxes)
        shape = len(rois), feature_maps[0].shape[1], self.size, self.size
        pooled = feature_maps[0].new_zeros(shape).contiguous(memory_format=torch.channels_last)
        for level, (features, stride) in enumerate(zip(feature_maps, self.strides, strict=False)):
            selected = torch.where(levels == level)[0]
            # In fp32: coordinates in half precision are off by pixels.
            x = roi_align(features.float(), rois[selected], self.size, 1 / stride, sampling_ratio=0, aligned=True)
            pooled[selected] = x.to(pooled.dtype)
        return pooled
