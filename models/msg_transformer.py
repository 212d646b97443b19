"""MSG-Transformer, versions 1 and 2.

Letters: B images, H x W the patch grid, w window side, nH x nW = H/w x W/w the window grid (also the grid of
MSG tokens), s side of a shuffle region in windows, C channels.

Between stages, patches (B, H, W, C) and MSG tokens (B, nH, nW, C) are apart; inside a stage they are windows
(B, nH, nW, w*w + 1, C). Unlike the published layout, one tensor of regions from end to end, torch.compile can take
this in as one graph, and it gives dense tasks their feature maps.

Source: Fang et al., MSG-Transformer: Exchanging Local Spatial Information by Manipulating Messenger Tokens,
arXiv:2105.15168. State-dict names and shapes are the published ones.
"""

from collections.abc import Callable, Sequence
from math import gcd, lcm

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.embedding import EMBED_TYPES, MERGE_TYPES, PatchEmbed
from models.msg_block import MSGBlock
from models.pyramid import PyramidError, Size, StageLayout, plan_pyramid
from models.windows import join_windows, split_windows

MANIP_TYPES = ('shuf', 'none')


class MSGStage(nn.Module):
    """Blocks on one grid, then the merging into the next.

    Args:
        layout: the stage's grid, window and region.
        blocks: the blocks, first to last.
        downsample: halves a token grid and doubles its channels; None in the last stage.
        use_checkpoint: recompute each block in the backward pass in place of keeping its activations.
    """

    def __init__(
        self, layout: StageLayout, blocks: list[MSGBlock], downsample: nn.Module | None, use_checkpoint: bool = False
    ):
        super().__init__()
        self.layout = layout
        self.use_checkpoint = use_checkpoint
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, patches: Tensor, msg: Tensor, msg_only: bool = False) -> tuple[Tensor | None, Tensor]:
        """Transform and merge.

        Args:
            patches: (B, H, W, C).
            msg: MSG tokens (B, nH, nW, C).
            msg_only: in the last stage, give no patches, and leave out the work for them alone: in its last block they
                are keys and values only, since nothing reads what they attend to, nor their MLP.

        Returns:
            Patches (B, H/2, W/2, 2C) and MSG tokens (B, nH/2, nW/2, 2C); in the last stage, of the shapes that came in.
        """
        x = join_windows(patches, msg)  # (B, nH, nW, N, C)
        for i, block in enumerate(self.blocks):
            arguments = x, msg_only and i == len(self.blocks) - 1
            if self.use_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x = block(*arguments)
        if msg_only:
            return None, x.squeeze(3)
        patches, msg = split_windows(x, self.layout.window)
        if self.downsample is not None:
            patches, msg = self.downsample(patches), self.downsample(msg)
        return patches, msg

    def flops(self) -> int:
        """Multiply-adds of one image, by the authors' formula."""
        flops = sum(block.flops() for block in self.blocks)
        if self.downsample is not None:
            flops += self.downsample.flops(self.layout.grid) + self.downsample.flops(self.layout.msg_grid)
        return flops


class MSGTransformer(nn.Module):
    """A hierarchical vision transformer whose windows exchange information through messenger tokens.

    Args:
        img_size: side of the images in pixels, or (height, width).
        patch_size: side of a patch, in pixels.
        in_chans: image channels.
        num_classes: classes; 0 leaves the head out and gives features.
        embed_dim: channels of the first stage; they double with each stage.
        depths: blocks per stage.
        num_heads: attention heads per stage.
        window_size: side of a window, in patches.
        mlp_ratio: hidden channels of the MLPs, over the stage's channels.
        qkv_bias: add a learned bias to query, key and value.
        qk_scale: factor on q.k; None for (channels a head)^-0.5.
        drop_rate: dropout after the position embedding, the attention's projection and in the MLPs.
        attn_drop_rate: dropout after the softmax.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0 at the first.
        norm_layer: called with a number of channels.
        ape: add a learned absolute position embedding to the patches.
        patch_norm: norm after the patch embedding.
        shuffle_size: side of a shuffle region in windows, per stage.
        manip_type: 'shuf' exchanges MSG tokens in every block, 'none' leaves every window to itself.
        embed_type: 'patch' (v1) or 'overlap' (v2).
        merge_type: 'patch' (v1) or 'overlap' (v2).
        use_checkpoint: recompute blocks in the backward pass, for memory.

    Raises:
        PyramidError: windows or regions do not tile the image, channels do not divide, or the lists describe
            different numbers of stages (a ValueError).
        ValueError: an unknown type.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        ape: bool = False,
        patch_norm: bool = True,
        shuffle_size: Sequence[int] = (4, 4, 2, 1),
        manip_type: str = 'shuf',
        embed_type: str = 'patch',
        merge_type: str = 'patch',
        use_checkpoint: bool = False,
    ):
        super().__init__()
        for name, value, known in (
            ('manip_type', manip_type, MANIP_TYPES),
            ('embed_type', embed_type, EMBED_TYPES),
            ('merge_type', merge_type, MERGE_TYPES),
        ):
            if value not in known:
                raise ValueError(f'{name} is {value!r}: write one of {", ".join(known)}')
        if not len(depths) == len(num_heads) == len(shuffle_size) > 0 or min(depths) < 1:
            raise PyramidError(
                f'depths {list(depths)}, num_heads {list(num_heads)} and shuffle_size {list(shuffle_size)} '
                f'describe different numbers of stages, or one without blocks: write one entry a stage in each'
            )
        self.img_size = Size(img_size, img_size) if isinstance(img_size, int) else Size(*img_size)
        layouts = plan_pyramid(self.img_size, patch_size, window_size, list(shuffle_size))
        shuffle = manip_type == 'shuf'
        _check_channels(embed_dim, num_heads, [layout.region if shuffle else 1 for layout in layouts])
        dims = [embed_dim * 2**i for i in range(len(depths))]
        self.num_classes = num_classes
        self.num_features = dims[-1]

        self.patch_embed = PatchEmbed(
            patch_size, in_chans, embed_dim, norm_layer if patch_norm else None, EMBED_TYPES[embed_type]
        )
        # One MSG token for each window position in a region; every region starts from the same.
        self.msg_tokens = nn.Parameter(torch.empty(1, layouts[0].region ** 2, 1, embed_dim))
        nn.init.trunc_normal_(self.msg_tokens, std=0.02)
        self.absolute_pos_embed = None
        if ape:
            height, width = layouts[0].grid
            self.absolute_pos_embed = nn.Parameter(torch.empty(1, height * width, embed_dim))
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)
        self.pos_drop = nn.Dropout(drop_rate)

        drop_path = iter(torch.linspace(0, drop_path_rate, sum(depths), device='cpu').tolist())  # not on meta
        self.layers = nn.ModuleList()
        for dim, layout, depth, heads in zip(dims, layouts, depths, num_heads, strict=True):
            blocks = [
                MSGBlock(
                    dim=dim,
                    layout=layout,
                    num_heads=heads,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    qk_scale=qk_scale,
                    drop=drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=next(drop_path),
                    norm_layer=norm_layer,
                    shuffle=shuffle,
                )
                for _ in range(depth)
            ]
            downsample = MERGE_TYPES[merge_type](dim, norm_layer) if layout is not layouts[-1] else None
            self.layers.append(MSGStage(layout, blocks, downsample, use_checkpoint))

        self.norm = norm_layer(self.num_features)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.apply(_init_linear)

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, in_chans, height, width) to patches (B, H, W, C) and MSG tokens (B, nH, nW, C)."""
        height, width = images.shape[-2:]
        if height != self.img_size.height or width != self.img_size.width:
            raise ValueError(f'images are {height} x {width}, but the network was built for {self.img_size}')
        patches = self.patch_embed(images)
        B, H, W, C = patches.shape
        if self.absolute_pos_embed is not None:
            patches = patches + self.absolute_pos_embed.view(1, H, W, C)
        layout = self.layers[0].layout
        s, (nH, nW) = layout.region, layout.msg_grid
        region = self.msg_tokens.view(1, s, s, C)
        msg = region.repeat(1, nH // s, nW // s, 1).expand(B, -1, -1, -1)  # (B, nH, nW, C)
        return self.pos_drop(patches), msg

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, height, width) to features (B, C): the normed MSG tokens, averaged over windows."""
        patches, msg = self.embed(images)
        *layers, last = self.layers
        for layer in layers:
            patches, msg = layer(patches, msg)
        _, msg = last(patches, msg, msg_only=not _has_hooks(last))
        return self.norm(msg).mean(dim=(1, 2))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, height, width) to logits (B, num_classes), or features if there are no classes."""
        return self.head(self.forward_features(images))

    def flops(self) -> int:
        """Multiply-adds of one image, by the authors' formula.

        With H x W patches, nW windows and N = w^2 + 1 tokens a window, it counts: embedding
        H*W*C*in*k^2 (+ H*W*C for its norm); block 2C(HW + nW) for the norms + nW(3NC^2 + 2N^2*C + NC^2)
        for attention + 2(HW + nW)C^2*ratio for the MLP; merging HWC + (H/2)(W/2)*4C*2C, and the same over
        the MSG grid (v2: 9C*2C); end C(H0*W0 // 4^(stages-1) + 1) + C*classes. Biases, softmax, GELU and
        dropout count nothing. `python -m tools.complexity` prints beside it what the operators really do.
        """
        grid = self.layers[0].layout.grid
        end = self.num_features * (grid.height * grid.width // 4 ** (len(self.layers) - 1) + 1 + self.num_classes)
        return self.patch_embed.flops(grid) + sum(layer.flops() for layer in self.layers) + end

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay leaves alone.

        `msg_tokens` is decayed: the published list misspells it, and the published results come from that.
        """
        return {'absolute_pos_embed'}

    def no_weight_decay_keywords(self) -> set[str]:
        """Parts of the names of parameters that weight decay leaves alone."""
        return {'relative_position_bias_table', 'rel_pos_msg'}


def _check_channels(embed_dim: int, num_heads: Sequence[int], regions: Sequence[int]) -> None:
    """Every stage's heads and MSG chunks must divide its channels; says which `embed_dim` works."""
    needed = 1
    for i, (heads, region) in enumerate(zip(num_heads, regions, strict=True)):
        parts = lcm(heads, region**2)
        needed = lcm(needed, parts // gcd(parts, 2**i))
    if embed_dim % needed:
        raise PyramidError(
            f'embed_dim {embed_dim}: its channels, doubling with each stage, must divide into the heads '
            f'{list(num_heads)} and into one chunk for each of the {[region**2 for region in regions]} windows of a '
            f'shuffle region: choose a multiple of {needed}'
        )


def _has_hooks(module: nn.Module) -> bool:
    """Whether somebody listens to a part of this module, and so to all its tokens."""
    hooks = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')
    return any(getattr(part, kind) for part in module.modules() for kind in hooks)


def _init_linear(module: nn.Module) -> None:
    """Linears from a truncated normal of 0.02; norms and convolutions keep PyTorch's default, as published."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
