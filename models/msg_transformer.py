"""MSG-Transformer, versions 1 and 2.

Letters: B images, H x W the patch grid, w window size, nH x nW = ceil(H/w) x ceil(W/w) the window grid (also the grid
of MSG tokens), N = w^2 + 1 tokens in a window, s size of a shuffle region in windows, C channels.

Between stages, patches (B, H, W, C) and MSG tokens (B, nH, nW, C) are separate grids; within a stage they are windows
(B, nH, nW, N, C). The published code keeps one tensor of regions throughout; this layout computes the same, compiles to
one graph, and gives dense tasks their feature maps.

Images may have any size. A grid that windows do not tile is padded, right and bottom, and padding is zero after the
first norm of every block; where everything tiles, as at 224 x 224, nothing is padded.

Source: Fang et al., MSG-Transformer: Exchanging Local Spatial Information by Manipulating Messenger Tokens,
arXiv:2105.15168. State-dict names and shapes are the published ones.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .exchange import ManipType, stage_exchanges
from .finetune import FineTuneMethods
from .layers import EMBED_TYPES, MERGE_TYPES, NormLayer, init_linear, make_head
from .msg_block import MSGBlock, MSGStage
from .pyramid import Size, ceil_div, patch_grids, plan_pyramid
from .resize import resize_grid
from .symbolic import crop
from .timm_methods import GLOBAL_POOLS, TimmMethods, stage_indices

HEAD_TOKENS = ('msg', 'patches')


class MSGTransformer(TimmMethods, FineTuneMethods, nn.Module):
    """A hierarchical vision transformer whose windows exchange information through messenger tokens.

    Args:
        img_size: image size in pixels, or (height, width). The network takes images of any size; this size decides
            where windows shrink to fit (see `plan_pyramid`), the grid of the absolute position embedding, and what
            `flops` counts. None if no size is preferred.
        patch_size: patch size, in pixels.
        in_chans: image channels.
        num_classes: classes; 0 for no head.
        embed_dim: channels of the first stage; they double with each stage.
        depths: blocks per stage.
        num_heads: attention heads per stage.
        window_size: window size, in patches.
        mlp_ratio: hidden channels of the MLPs, relative to the stage's channels.
        qkv_bias: add a learned bias to query, key and value.
        qk_scale: factor on q.k; None for (channels per head)^-0.5.
        drop_rate: dropout after the patch embedding, the attention's projection and in the MLPs.
        attn_drop_rate: dropout after the softmax.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0 at the first.
        norm_layer: called with a number of channels.
        ape: add a learned absolute position embedding to the patches.
        patch_norm: norm after the patch embedding.
        shuffle_size: size of a shuffle region per stage, in windows.
        manip_type: exchange of MSG tokens in every block: 'shuf' (published), 'none', another name or class of
            `models.exchange`, or a list with one for each stage.
        embed_type: 'patch' (v1), 'overlap' (v2) or 'conv' (see `models.layers.ConvStem`).
        merge_type: 'patch' (v1) or 'overlap' (v2).
        use_checkpoint: recompute blocks in the backward pass, which trades time for memory.
        recompute_mlp: recompute only GELU in the backward pass: saves less memory than `use_checkpoint`, and is faster.
        global_pool: 'avg' averages the tokens before the head, '' does not pool.
        use_msg_tokens: False builds windows without MSG tokens; the classifier input is then the patch tokens.
        head_tokens: classifier input: 'msg' for the MSG tokens, or 'patches' for the patch tokens.

    Raises:
        ValueError: channels do not divide, the lists differ in length, the image is smaller than a patch, or an
            option is unknown.
    """

    output_fmt = 'NHWC'  # timm's name for the layout that `forward_features` returns

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = 224,
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
        norm_layer: NormLayer = nn.LayerNorm,
        ape: bool = False,
        patch_norm: bool = True,
        shuffle_size: Sequence[int] = (4, 4, 2, 1),
        manip_type: ManipType | Sequence[ManipType] = 'shuf',
        embed_type: str = 'patch',
        merge_type: str = 'patch',
        use_checkpoint: bool = False,
        recompute_mlp: bool = False,
        global_pool: str = 'avg',
        use_msg_tokens: bool = True,
        head_tokens: str = 'msg',
    ):
        super().__init__()
        for name, value, choices in (
            ('embed_type', embed_type, tuple(EMBED_TYPES)),
            ('merge_type', merge_type, tuple(MERGE_TYPES)),
            ('global_pool', global_pool, GLOBAL_POOLS),
            ('head_tokens', head_tokens, HEAD_TOKENS),
        ):
            if value not in choices:
                raise ValueError(f'{name} is {value!r}: write one of {", ".join(map(repr, choices))}')
        if img_size is None and ape:
            raise ValueError('an absolute position embedding needs an img_size')
        self.img_size = None if img_size is None else Size.of(img_size)
        self.window_size = window_size
        exchanges = stage_exchanges(manip_type, len(depths))
        self.plan = partial(  # called again by `set_input_size`
            plan_pyramid,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depths=depths,
            num_heads=num_heads,
            shuffle_size=shuffle_size,
            channel_multiples=[exchange.channel_multiple for exchange in exchanges] if use_msg_tokens else None,
        )
        layouts = self.plan(self.img_size, window_size=window_size)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = layouts[-1].dim
        self.global_pool = global_pool
        self.feature_info = [
            {'num_chs': layout.dim, 'reduction': patch_size * 2**i, 'module': f'layers.{i}'}
            for i, layout in enumerate(layouts)
        ]

        embedding = EMBED_TYPES[embed_type]
        self.patch_embed = embedding(patch_size, in_chans, embed_dim, norm_layer if patch_norm else None)
        self.msg_tokens = None
        self.head_reads_msg = use_msg_tokens and head_tokens == 'msg'
        if use_msg_tokens:
            # One token for each window position in a region, in row-major order; all regions start from the same.
            self.msg_tokens = nn.Parameter(torch.empty(1, layouts[0].shuffle_size ** 2, 1, embed_dim))
            nn.init.trunc_normal_(self.msg_tokens, std=0.02)
        self.absolute_pos_embed = None
        if ape:
            H, W = self.patch_grid
            self.absolute_pos_embed = nn.Parameter(torch.empty(1, H * W, embed_dim))
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)
        self.pos_drop = nn.Dropout(drop_rate)

        drop_path = iter(torch.linspace(0, drop_path_rate, sum(depths), device='cpu').tolist())  # not on meta
        self.layers = nn.ModuleList()
        for layout, exchange in zip(layouts, exchanges, strict=True):
            blocks = [
                MSGBlock(
                    dim=layout.dim,
                    window_size=layout.window_size,
                    shuffle_size=layout.shuffle_size,
                    num_heads=layout.num_heads,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    qk_scale=qk_scale,
                    drop=drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=next(drop_path),
                    norm_layer=norm_layer,
                    exchange=exchange,
                    recompute_mlp=recompute_mlp and not use_checkpoint,
                    use_msg_tokens=use_msg_tokens,
                )
                for _ in range(layout.depth)
            ]
            downsample = MERGE_TYPES[merge_type](layout.dim, norm_layer) if layout is not layouts[-1] else None
            self.layers.append(MSGStage(blocks, downsample, use_checkpoint))

        self.norm = norm_layer(self.num_features)
        self.head = make_head(self.num_features, num_classes)
        self.apply(init_linear)

    @property
    def patch_grid(self) -> Size | None:
        """The patch grid H x W of the first stage at `img_size`; None without one."""
        return None if self.img_size is None else self.img_size.divided_by(self.patch_embed.patch_size)

    @property
    def pool_size(self) -> tuple[int, int] | None:
        """The grid of tokens that `forward_head` averages at `img_size`; None without one."""
        if self.img_size is None:
            return None
        last_grid = patch_grids(self.img_size, self.patch_embed.patch_size, len(self.layers))[-1]
        return tuple(last_grid.divided_by(self.layers[-1].window_size) if self.head_reads_msg else last_grid)

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Embed images (B, in_chans, height, width) as patches (B, H, W, C) and MSG tokens (B, nH, nW, C), if any."""
        patches = self.patch_embed(images)
        B, H, W, C = patches.shape
        if self.absolute_pos_embed is not None:
            patches = patches + self._position_embedding(H, W)
        if self.msg_tokens is None:
            return self.pos_drop(patches), None
        w, s = self.layers[0].window_size, self.layers[0].shuffle_size
        nH, nW = ceil_div(H, w), ceil_div(W, w)
        region = self.msg_tokens.view(1, s, s, C)
        regions = region.repeat(1, ceil_div(nH, s), ceil_div(nW, s), 1)
        msg = crop(regions, (nH, nW)).expand(B, -1, -1, -1)  # (B, nH, nW, C)
        return self.pos_drop(patches), msg

    def _position_embedding(self, H: int, W: int) -> Tensor:
        """The absolute position embedding, resized to a patch grid, (1, H, W, C)."""
        return resize_grid(self.absolute_pos_embed.unflatten(1, self.patch_grid), (H, W))

    def forward_features(self, images: Tensor) -> Tensor:
        """Compute the last stage's normed tokens, MSG (B, nH, nW, C) or patches (B, H, W, C), of images.

        Args:
            images: (B, in_chans, height, width).
        """
        patches, msg = self.embed(images)
        *stages, last = self.layers
        for stage in stages:
            patches, msg = stage(patches, msg)
            patches, msg = stage.merge(patches, msg)
        patches, msg = last(patches, msg, msg_only=self.head_reads_msg)
        return self.norm(msg if self.head_reads_msg else patches)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify the tokens of `forward_features`.

        Args:
            features: tokens (B, nH, nW, C) or (B, H, W, C).
            pre_logits: return the pooled features (B, C).

        Returns:
            Logits (B, num_classes), or the features if there are no classes.
        """
        if self.global_pool == 'avg':
            features = features.mean(dim=(1, 2))
        return features if pre_logits else self.head(features)

    def forward(self, images: Tensor) -> Tensor:
        """Classify images (B, in_chans, height, width): logits (B, num_classes), or features (B, C) without classes."""
        return self.forward_head(self.forward_features(images))

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Compute the features and the feature map of each stage, taken before patch merging.

        Args:
            images: (B, in_chans, height, width).
            indices: stages whose feature maps to return: their indices, a number n for the last n, None for all.
            norm: apply the network's final norm to the last stage's feature map.
            stop_early: stop after the last selected stage; features are then that stage's tokens.
            output_fmt: 'NCHW' for feature maps (B, C, H, W), 'NHWC' for (B, H, W, C).
            intermediates_only: return only the feature maps.

        Returns:
            Features as returned by `forward_features`, and the feature maps, finest first.

        Raises:
            ValueError: `output_fmt` is unknown, or a stage does not exist.
        """
        if output_fmt not in ('NCHW', 'NHWC'):
            raise ValueError(f'output_fmt is {output_fmt!r}: write NCHW or NHWC')
        count = len(self.layers)
        taken = stage_indices(indices, count)
        patches, msg = self.embed(images)
        feature_maps = []
        for i, stage in enumerate(self.layers[: taken[-1] + 1] if stop_early else self.layers):
            if i > 0:
                patches, msg = self.layers[i - 1].merge(patches, msg)
            patches, msg = stage(patches, msg)
            if i in taken:
                x = self.norm(patches) if norm and i == count - 1 else patches
                feature_maps.append(x.permute(0, 3, 1, 2).contiguous() if output_fmt == 'NCHW' else x)
        if intermediates_only:
            return feature_maps
        features = msg if self.head_reads_msg else patches
        return (self.norm(features) if i == count - 1 else features), feature_maps

    def flops(self, img_size: tuple[int, int] | None = None) -> int:
        """Count multiply-adds for one image by the authors' formula.

        With H x W patches, nW windows and N = w^2 + 1 tokens per window, it counts: embedding H*W*C*in*k^2 (+ H*W*C for
        its norm), or see `ConvStem.flops`; block 2C(HW + nW) for the norms + nW(3NC^2 + 2N^2*C + NC^2) for attention +
        2(HW + nW)C^2*ratio for the MLP; merging HWC + (H/2)(W/2)*4C*2C, and the same for the MSG grid (v2: 9C*2C); the
        end C(H0*W0 // 4^(stages-1) + 1) + C*classes. Biases, softmax, GELU and dropout count nothing.
        `python -m tools.summary` also prints what PyTorch counts for the executed operators.

        Args:
            img_size: (height, width) in pixels; None for the network's `img_size`.

        Raises:
            ValueError: neither the argument nor the network has an image size.
        """
        size = self.img_size if img_size is None else Size(*img_size)
        if size is None:
            raise ValueError('the network was built without an image size: give img_size')
        grids = patch_grids(size, self.patch_embed.patch_size, len(self.layers))
        stages = sum(stage.flops(grid) for stage, grid in zip(self.layers, grids, strict=True))
        last_patches = grids[0].height * grids[0].width // 4 ** (len(self.layers) - 1)
        return self.patch_embed.flops(grids[0]) + stages + self.num_features * (last_patches + 1 + self.num_classes)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay.

        `msg_tokens` is decayed: the published list misspells it, and the published results come from that.
        """
        return {'absolute_pos_embed'}

    def no_weight_decay_keywords(self) -> set[str]:
        """Parts of names of parameters without weight decay."""
        return {'relative_position_bias_table', 'rel_pos_msg'}
