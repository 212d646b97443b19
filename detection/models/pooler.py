"""Features of regions, from the level of the pyramid that suits their size."""

from collections.abc import Sequence
from math import log2

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align
from torchvision.ops.poolers import LevelMapper


class AlignedPooler(nn.Module):
    """RoIAlign with half-pixel centres and as many samples a bin as it has pixels.

    torchvision's `MultiScaleRoIAlign` has no `aligned`; its rule for the level (Lin et al., arXiv:1612.03144, eq. 1) is
    used here.

    Args:
        size: side of a region's features.
        strides: pixels of the image a step of each level: powers of 2, finest first.
    """

    def __init__(self, size: int, strides: Sequence[int]):
        super().__init__()
        self.size, self.strides = size, list(strides)
        self.levels = LevelMapper(int(log2(strides[0])), int(log2(strides[-1])))

    def forward(self, maps: Sequence[Tensor], boxes: list[Tensor]) -> Tensor:
        """Pool regions.

        Args:
            maps: of each level, (B, C, H, W); further levels are left alone.
            boxes: regions of each image, (n, 4), x1 y1 x2 y2 in pixels.

        Returns:
            Features (n of all images, C, size, size).
        """
        images = [torch.full((len(of_image), 1), float(i), device=of_image.device) for i, of_image in enumerate(boxes)]
        rois = torch.cat((torch.cat(images), torch.cat(boxes).float()), dim=1)  # (n, 5)
        level_of = self.levels(boxes)
        pooled = maps[0].new_zeros(len(rois), maps[0].shape[1], self.size, self.size)
        for level, (features, stride) in enumerate(zip(maps, self.strides, strict=False)):
            here = torch.where(level_of == level)[0]
            # In fp32: positions in half precision are off by pixels.
            found = roi_align(features.float(), rois[here], self.size, 1 / stride, sampling_ratio=0, aligned=True)
            pooled[here] = found.to(pooled.dtype)
        return pooled
