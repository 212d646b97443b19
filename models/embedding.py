"""Patch embedding and patch merging: the convolutions and linears that set each stage's grid and width.

Letters: B images, H x W the patch grid, C channels. Version 1 of the network cuts and merges patches that do not
overlap, version 2 ones that do.
"""

from collections.abc import Callable

from torch import Tensor, nn

from models.pyramid import Size


class PatchEmbed(nn.Module):
    """Image to patch tokens: a strided convolution, then an optional norm.

    Args:
        patch_size: side of a patch, in pixels: the stride.
        in_chans: image channels.
        embed_dim: channels C of a token.
        norm_layer: called with `embed_dim`; None for no norm.
        overlap: False for kernel = stride (v1); True for a kernel of 7 (v2).
    """

    def __init__(
        self,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        norm_layer: Callable[[int], nn.Module] | None,
        overlap: bool = False,
    ):
        super().__init__()
        kernel, padding = patch_size, 0
        if overlap:
            # Padding 2 is the published one, at patch size 4; below 3, H / patch_size tokens a side need 3.
            kernel, padding = 7, 2 if patch_size >= 3 else 3
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=kernel, stride=patch_size, padding=padding)
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Embed images (B, in_chans, height, width) as patch tokens (B, H, W, C)."""
        return self.norm(self.proj(images).permute(0, 2, 3, 1))

    def flops(self, grid: Size) -> int:
        """Multiply-adds of one image, by the authors' formula."""
        tokens = grid.height * grid.width
        flops = tokens * self.proj.weight.numel()  # C * in_chans * kernel^2
        if not isinstance(self.norm, nn.Identity):
            flops += tokens * self.proj.out_channels
        return flops


class PatchMerging(nn.Module):
    """Halve a token grid and double its channels (v1): concatenate 2 x 2 neighbours, norm, linear.

    One module, with one set of weights, serves a stage's patch grid and its MSG grid.

    Args:
        dim: channels C of the tokens that come in.
        norm_layer: called with 4C.
    """

    def __init__(self, dim: int, norm_layer: Callable[[int], nn.Module]):
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = norm_layer(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Merge tokens (B, H, W, C) into (B, H/2, W/2, 2C)."""
        B, H, W, C = x.shape
        x = x.view(B, H // 2, 2, W // 2, 2, C)  # (B, H/2, row, W/2, column, C)
        x = x.permute(0, 1, 3, 4, 2, 5).reshape(B, H // 2, W // 2, 4 * C)  # neighbours (0,0), (1,0), (0,1), (1,1)
        return self.reduction(self.norm(x))

    def flops(self, grid: Size) -> int:
        """Multiply-adds over a token grid of this size, by the authors' formula."""
        dim = self.reduction.out_features // 2
        return grid.height * grid.width * dim + (grid.height // 2) * (grid.width // 2) * self.reduction.weight.numel()


class OverlapPatchMerging(nn.Module):
    """Halve a token grid and double its channels (v2): a 3 x 3 convolution of stride 2, then norm.

    Args:
        dim: channels C of the tokens that come in.
        norm_layer: called with 2C.
    """

    def __init__(self, dim: int, norm_layer: Callable[[int], nn.Module]):
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, kernel_size=3, stride=2, padding=1)
        self.norm = norm_layer(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Merge tokens (B, H, W, C) into (B, H/2, W/2, 2C)."""
        x = self.reduction(x.permute(0, 3, 1, 2))  # (B, 2C, H/2, W/2)
        return self.norm(x.permute(0, 2, 3, 1))

    def flops(self, grid: Size) -> int:
        """Multiply-adds over a token grid of this size, by the authors' formula (9C * 2C in place of 4C * 2C)."""
        dim = self.reduction.in_channels
        return grid.height * grid.width * dim + (grid.height // 2) * (grid.width // 2) * self.reduction.weight.numel()


EMBED_TYPES = {'patch': False, 'overlap': True}
MERGE_TYPES: dict[str, type[nn.Module]] = {'patch': PatchMerging, 'overlap': OverlapPatchMerging}
