"""The layers around window attention: MLP, drop path, patch embedding and patch merging.

Letters: B images, H x W the patch grid, nH x nW the window grid, s size of a shuffle region in windows, N tokens in a
window, C channels.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .linear import apply_linear
from .pyramid import ceil_div
from .symbolic import contiguous_copy, is_known_multiple, pad_to_multiple, padding_to_multiple, to_convolution_input

NormLayer = Callable[[int], nn.Module]


class Mlp(nn.Module):
    """Linear, exact GELU, linear, with dropout after the last two.

    Args:
        dim: channels C in and out.
        hidden_dim: channels between.
        drop: dropout rate.
        recompute: recompute GELU in the backward pass instead of keeping its output.
    """

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0, recompute: bool = False):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens (..., C)."""
        x = apply_linear(self.fc1, x)
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._project, x, use_reentrant=False, preserve_rng_state=self.drop.p > 0)
        return self._project(x)

    def _project(self, hidden: Tensor) -> Tensor:
        return self.drop(apply_linear(self.fc2, self.drop(self.act(hidden))))


class RegionDropPath(nn.Module):
    """Drop path (stochastic depth) per shuffle region of each image, as in the published code.

    Args:
        rate: probability of dropping a region's branch, in [0, 1); the others are divided by 1 - rate.
        shuffle_size: size s of a shuffle region, in windows.
    """

    def __init__(self, rate: float, shuffle_size: int):
        super().__init__()
        self.rate = rate
        self.shuffle_size = shuffle_size

    def forward(self, x: Tensor) -> Tensor:
        """Drop regions of windows (B, nH, nW, N, C) in training; regions at the border may be incomplete."""
        if not self.training or self.rate == 0.0:
            return x
        B, nH, nW = x.shape[:3]
        s, keep = self.shuffle_size, 1.0 - self.rate
        rows, columns = ceil_div(nH, s), ceil_div(nW, s)
        mask = x.new_empty(B, rows, 1, columns, 1).bernoulli_(keep).div_(keep)
        mask = mask.expand(B, rows, s, columns, s).reshape(B, rows * s, columns * s)
        return x * mask[:, :nH, :nW, None, None]

    def extra_repr(self) -> str:
        """Arguments shown by `print(model)`."""
        return f'rate={self.rate:.3f}, shuffle_size={self.shuffle_size}'


class PatchEmbed(nn.Module):
    """Embed an image as patch tokens: a strided convolution, then an optional norm.

    Args:
        patch_size: patch size in pixels: the stride.
        in_chans: image channels.
        embed_dim: channels C of a token.
        norm_layer: called with `embed_dim`; None for no norm.
        overlap: False for kernel size = stride (v1), True for kernel size 7 (v2).
    """

    def __init__(
        self, patch_size: int, in_chans: int, embed_dim: int, norm_layer: NormLayer | None, overlap: bool = False
    ):
        super().__init__()
        self.patch_size = patch_size
        kernel_size, padding = patch_size, 0
        if overlap:
            # Published for patch size 4: padding 2. Below 3, H / patch_size tokens per side need padding 3.
            kernel_size, padding = 7, 2 if patch_size >= 3 else 3
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size, stride=patch_size, padding=padding)
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Embed images (B, in_chans, height, width), padded with zeros to whole patches, as tokens (B, H, W, C).

        Raises:
            ValueError: the images are smaller than one patch.
        """
        return self.norm(self.proj(pad_to_patches(images, self.patch_size)).permute(0, 2, 3, 1))

    def flops(self, grid: tuple[int, int]) -> int:
        """Multiply-adds for a patch grid (H, W), by the authors' formula."""
        tokens = grid[0] * grid[1]
        flops = tokens * self.proj.weight.numel()  # C * in_chans * kernel_size^2
        if not isinstance(self.norm, nn.Identity):
            flops += tokens * self.proj.out_channels
        return flops


class ConvStem(nn.Module):
    """Embed an image as patch tokens: 3 x 3 convolutions of stride 2, a 1 x 1 convolution, then an optional norm.

    There is one 3 x 3 convolution for each factor of two in the patch size, each with batch norm and ReLU. The last one
    has C channels, and each earlier one half as many as the next: C/2 and C for patches of 4 pixels.

    Source: Xiao et al., Early Convolutions Help Transformers See Better, arXiv:2106.14881.

    Args:
        patch_size: patch size in pixels, a power of two.
        in_chans: image channels.
        embed_dim: channels C of a token.
        norm_layer: called with `embed_dim`; None for no norm.

    Raises:
        ValueError: see `conv_stem_channels`.
    """

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int, norm_layer: NormLayer | None):
        super().__init__()
        self.patch_size = patch_size
        channels = (in_chans, *conv_stem_channels(patch_size, embed_dim))
        convs = [ConvNormAct(inputs, outputs, kernel_size=3, stride=2) for inputs, outputs in pairwise(channels)]
        self.convs = nn.Sequential(*convs, nn.Conv2d(embed_dim, embed_dim, kernel_size=1))
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Embed images (B, in_chans, height, width), padded with zeros to whole patches, as tokens (B, H, W, C).

        Raises:
            ValueError: the images are smaller than one patch.
        """
        # Channels last in memory, which is faster on CPUs
        x = contiguous_copy(pad_to_patches(images, self.patch_size).permute(0, 2, 3, 1))
        return self.norm(self.convs(to_convolution_input(x, self.patch_size)).permute(0, 2, 3, 1))

    def flops(self, grid: tuple[int, int]) -> int:
        """Multiply-adds for a patch grid (H, W): convolutions and the norm at the end; batch norms count nothing."""
        tokens = grid[0] * grid[1]
        *convs, last = self.convs
        flops = tokens * last.weight.numel()
        for factor, conv in enumerate(reversed(convs)):
            flops += tokens * 4**factor * conv.conv.weight.numel()
        if not isinstance(self.norm, nn.Identity):
            flops += tokens * last.out_channels
        return flops


def conv_stem_channels(patch_size: int, embed_dim: int) -> list[int]:
    """Channels of the convolutions of a `ConvStem`.

    Raises:
        ValueError: the patch size is not a power of two, or the channels cannot be halved as often as needed.
    """
    count = patch_size.bit_length() - 1
    if count < 1 or patch_size != 2**count:
        raise ValueError(f'patch_size is {patch_size}: embed_type conv needs a power of two, such as 2 or 4')
    if embed_dim % 2 ** (count - 1):
        raise ValueError(
            f'embed_dim is {embed_dim}: embed_type conv with patches of {patch_size} pixels needs a multiple of '
            f'{2 ** (count - 1)}'
        )
    return [embed_dim // 2**i for i in reversed(range(count))]


def pad_to_patches(images: Tensor, patch_size: int) -> Tensor:
    """Pad images (B, C, height, width) with zeros, right and bottom, to whole patches.

    Raises:
        ValueError: they are smaller than one patch.
    """
    height, width = images.shape[-2:]
    p = patch_size
    if height < p or width < p:
        raise ValueError(f'images of {height} x {width} pixels are smaller than one patch of {p} x {p}')
    if is_known_multiple((height, width), p):
        return images
    return F.pad(images, (0, padding_to_multiple(width, p), 0, padding_to_multiple(height, p)))


class PatchMerging(nn.Module):
    """Halve a token grid and double its channels (v1): concatenate 2 x 2 neighbours, norm, linear.

    The same weights serve a stage's patch grid and its MSG grid.

    Args:
        dim: input channels C.
        norm_layer: called with 4C.
    """

    def __init__(self, dim: int, norm_layer: NormLayer):
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = norm_layer(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Merge tokens (B, H, W, C) into (B, ceil(H/2), ceil(W/2), 2C); an odd grid is padded with zeros."""
        x = pad_to_multiple(x, 2)
        B, H, W, C = x.shape
        x = x.view(B, H // 2, 2, W // 2, 2, C)  # (B, H/2, row, W/2, column, C)
        x = x.permute(0, 1, 3, 4, 2, 5).reshape(B, H // 2, W // 2, 4 * C)  # neighbours (0,0), (1,0), (0,1), (1,1)
        return apply_linear(self.reduction, self.norm(x))

    def flops(self, grid: tuple[int, int]) -> int:
        """Multiply-adds for a token grid (H, W), by the authors' formula."""
        return merging_flops(grid, self.reduction.weight)


class OverlapPatchMerging(nn.Module):
    """Halve a token grid and double its channels (v2): a 3 x 3 convolution of stride 2, then norm.

    Args:
        dim: input channels C.
        norm_layer: called with 2C.
    """

    def __init__(self, dim: int, norm_layer: NormLayer):
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, kernel_size=3, stride=2, padding=1)
        self.norm = norm_layer(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Merge tokens (B, H, W, C) into (B, ceil(H/2), ceil(W/2), 2C)."""
        x = self.reduction(to_convolution_input(x, stride=2))  # (B, 2C, ceil(H/2), ceil(W/2))
        return self.norm(x.permute(0, 2, 3, 1))

    def flops(self, grid: tuple[int, int]) -> int:
        """Multiply-adds for a token grid (H, W), by the authors' formula."""
        return merging_flops(grid, self.reduction.weight)


# Values of MODEL.MSG.EMBED_TYPE and MERGE_TYPE
EMBED_TYPES = {'patch': PatchEmbed, 'overlap': partial(PatchEmbed, overlap=True), 'conv': ConvStem}
MERGE_TYPES = {'patch': PatchMerging, 'overlap': OverlapPatchMerging}


def merging_flops(grid: tuple[int, int], weight: Tensor) -> int:
    """Multiply-adds of patch merging by the authors' formula: a norm over C channels of all tokens, the reduction."""
    (H, W), dim = grid, weight.shape[0] // 2
    return H * W * dim + ceil_div(H, 2) * ceil_div(W, 2) * weight.numel()


def make_head(dim: int, num_classes: int) -> nn.Module:
    """Create the classifier of features (..., C): a linear layer, or the identity for 0 classes."""
    return nn.Linear(dim, num_classes) if num_classes > 0 else nn.Identity()


def init_linear(module: nn.Module) -> None:
    """Initialize a linear layer from a truncated normal; other layers keep PyTorch's default, as published."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
