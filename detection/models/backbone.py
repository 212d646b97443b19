"""The classifier as a backbone: images of any size in, one normalised map a stage out.

Letters: B images, H x W the patch grid, w window side, nH x nW = ceil(H/w) x ceil(W/w) the window grid (also the grid
of MSG tokens), s side of a shuffle region in windows, G = s^2 windows in a region, C channels.

The network and its weights are the classifier's. What any size adds: inside each block, after its first norm, the patch
grid is padded with zeros, to the right and below, to whole windows, and cropped again before the MLP; an odd grid is
padded with zeros before it is merged. One MSG token a window, padded ones too, keeps the grids of patches and of MSG
tokens aligned, since ceil(ceil(H/2) / w) = ceil(ceil(H/w) / 2). Where windows and regions tile, a stage is computed as
the classifier does, to the bit.

Source: Fang et al., arXiv:2105.15168, section 4.2. How it pads is not published: of five ways tried, only this one has
the published multiply-adds.
"""

from collections import OrderedDict
from collections.abc import Sequence
from math import lcm
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models import MSGTransformer
from models.embedding import OverlapPatchMerging
from models.msg_block import MSGBlock, RegionDropPath
from models.msg_transformer import MSGStage
from models.windows import join_windows, shuffle_msg_tokens, split_windows


class MSGBackbone(MSGTransformer):
    """The classifier without its head, for images of any size.

    `norm`, of the last map, is the classifier's; `out_norms`, of those before it, are not among a classifier's weights.

    Args:
        patch_size, window_size, shuffle_size: see `MSGTransformer`, as all others.
        **options: of `MSGTransformer`, but for the size of the images, the classes and `ape`.
    """

    def __init__(
        self,
        patch_size: int = 4,
        window_size: int = 7,
        shuffle_size: Sequence[int] = (4, 4, 2, 1),
        **options: Any,
    ):
        # The smallest size that every stage's windows and regions tile: it fixes both, not what goes in.
        size = patch_size * window_size * lcm(*(s * 2**i for i, s in enumerate(shuffle_size)))
        super().__init__(
            img_size=size,
            patch_size=patch_size,
            window_size=window_size,
            shuffle_size=shuffle_size,
            num_classes=0,
            **options,
        )
        self.patch_size = patch_size
        dims = [self.num_features // 2**i for i in reversed(range(len(self.layers)))]
        self.out_channels = dims
        self.out_norms = nn.ModuleList(type(self.norm)(dim) for dim in dims[:-1])

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Images (B, 3, height, width) to a map (B, C, H, W) of each stage, finest first, named '0', '1', ..."""
        patches, msg = self.embed(images)
        maps = OrderedDict()
        for i, (layer, norm) in enumerate(zip(self.layers, (*self.out_norms, self.norm), strict=True)):
            patches, msg = run_stage(layer, patches, msg)
            maps[str(i)] = norm(patches).permute(0, 3, 1, 2).contiguous()  # (B, C, H, W)
            if layer.downsample is not None:
                patches, msg = merge(layer.downsample, patches), merge(layer.downsample, msg)
        return maps

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, height, width) to patches (B, H, W, C) and MSG tokens (B, nH, nW, C).

        The images are padded with zeros to whole patches. Windows start with the slot of their position in a region.
        """
        height, width = images.shape[-2:]
        patches = self.patch_embed(F.pad(images, (0, -width % self.patch_size, 0, -height % self.patch_size)))
        B, H, W, C = patches.shape
        layout = self.layers[0].layout
        w, s = layout.window, layout.region
        nH, nW = -(-H // w), -(-W // w)
        region = self.msg_tokens.view(1, s, s, C)
        msg = region.repeat(1, -(-nH // s), -(-nW // s), 1)[:, :nH, :nW].expand(B, -1, -1, -1)  # (B, nH, nW, C)
        return self.pos_drop(patches), msg


def run_stage(stage: MSGStage, patches: Tensor, msg: Tensor) -> tuple[Tensor, Tensor]:
    """A stage's blocks, without its merging.

    Args:
        stage: the stage.
        patches: (B, H, W, C).
        msg: MSG tokens (B, nH, nW, C).

    Returns:
        Patches and MSG tokens of the shapes that came in.
    """
    H, W = patches.shape[1:3]
    w, s = stage.layout.window, stage.layout.region
    recompute = stage.use_checkpoint and torch.is_grad_enabled()
    if H % (w * s) or W % (w * s):
        for block in stage.blocks:
            if recompute:
                patches, msg = checkpoint(run_block_padded, block, patches, msg, use_reentrant=False)
            else:
                patches, msg = run_block_padded(block, patches, msg)
        return patches, msg
    x = join_windows(patches, msg)
    for block in stage.blocks:
        x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
    return split_windows(x, w)


def run_block_padded(block: MSGBlock, patches: Tensor, msg: Tensor) -> tuple[Tensor, Tensor]:
    """A block on patches (B, H, W, C) and MSG tokens (B, nH, nW, C) whose windows or regions do not tile."""
    H, W = patches.shape[1:3]
    w = block.layout.window

    normed = F.pad(block.norm1(patches), (0, 0, 0, -W % w, 0, -H % w))  # (B, nH*w, nW*w, C)
    attended = block.attn(join_windows(normed, block.norm1(msg)))
    of_patches, of_msg = split_windows(attended, w)
    patches, msg = add_branch(block.drop_path, w, patches, msg, of_patches[:, :H, :W], of_msg)
    if block.shuffle:
        msg = shuffle_any_grid(msg, block.layout.region)
    of_patches, of_msg = block.mlp(block.norm2(patches)), block.mlp(block.norm2(msg))
    return add_branch(block.drop_path, w, patches, msg, of_patches, of_msg)


def add_branch(
    drop_path: RegionDropPath, window: int, patches: Tensor, msg: Tensor, of_patches: Tensor, of_msg: Tensor
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream; while training, drop it in some regions, of which the last may be cut.

    Args:
        drop_path: with the rate and the side of a region.
        window: side w of a window, in patches.
        patches: of the stream, (B, H, W, C).
        msg: MSG tokens of the stream, (B, nH, nW, C).
        of_patches: of the branch, like `patches`.
        of_msg: of the branch, like `msg`.
    """
    if drop_path.training and drop_path.rate > 0:
        (B, nH, nW), (H, W), s = msg.shape[:3], patches.shape[1:3], drop_path.region_size
        keep = 1.0 - drop_path.rate
        mask = msg.new_empty(B, -(-nH // s), -(-nW // s), 1).bernoulli_(keep) / keep
        mask = _enlarge(mask, s)[:, :nH, :nW]  # (B, nH, nW, 1)
        of_patches, of_msg = of_patches * _enlarge(mask, window)[:, :H, :W], of_msg * mask
    return patches + of_patches, msg + of_msg


def _enlarge(grid: Tensor, times: int) -> Tensor:
    """Repeat the entries of (B, H, W, C) along H and W."""
    return grid.repeat_interleave(times, 1).repeat_interleave(times, 2)


def shuffle_any_grid(msg: Tensor, region_size: int) -> Tensor:
    """Exchange channel chunks among the MSG tokens of each region, of which the last may be cut.

    The grid is padded to whole regions, shuffled and cropped; where the partner is padding, a token keeps its own
    chunk. That is our choice, since the published one is not known.

    Args:
        msg: MSG tokens (B, nH, nW, C).
        region_size: side s of a region, in windows; C is a multiple of its square.

    Returns:
        Shuffled MSG tokens (B, nH, nW, C).
    """
    nH, nW, C = msg.shape[1:]
    padding = (0, 0, 0, -nW % region_size, 0, -nH % region_size)
    padded = F.pad(msg, padding)
    is_real = F.pad(msg.new_ones(1, nH, nW, C), padding)
    shuffled = shuffle_msg_tokens(padded, region_size)
    came_from_real = shuffle_msg_tokens(is_real, region_size) > 0
    return torch.where(came_from_real, shuffled, padded)[:, :nH, :nW]


def merge(downsample: nn.Module, x: Tensor) -> Tensor:
    """Merge tokens (B, H, W, C) into (B, ceil(H/2), ceil(W/2), 2C); an odd grid is padded with zeros."""
    if isinstance(downsample, OverlapPatchMerging):  # whose convolution pads by itself
        return downsample(x)
    H, W = x.shape[1:3]
    return downsample(F.pad(x, (0, 0, 0, W % 2, 0, H % 2)))
