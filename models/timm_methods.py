"""timm's model interface, except for the forward pass: classifier, image size, checkpointing, pruning, groups.

With it, timm's public tools work on the network: `create_model`, layer-wise learning rates, `features_only`, the
Hugging Face hub.
"""

from collections.abc import Sequence

import torch
from torch import nn

from .layers import init_linear, make_head
from .pyramid import Size
from .resize import resize_position_embedding, tile_msg_tokens

GLOBAL_POOLS = ('avg', '')


class TimmMethods:
    """Methods of `MSGTransformer` that timm's tools call."""

    @property
    def head_hidden_size(self) -> int:
        """Channels of the classifier's input."""
        return self.num_features

    def get_classifier(self) -> nn.Module:
        """Return the head: a linear layer, or the identity without classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head with a new one. Build optimizers afterwards.

        Args:
            num_classes: classes; 0 for no head.
            global_pool: see `MSGTransformer`; None to keep the present setting.

        Raises:
            ValueError: `global_pool` is unknown, or the number of classes is negative.
        """
        if global_pool is not None:
            if global_pool not in GLOBAL_POOLS:
                raise ValueError(f'global_pool is {global_pool!r}: write one of {", ".join(map(repr, GLOBAL_POOLS))}')
            self.global_pool = global_pool
        if num_classes < 0:
            raise ValueError(f'num_classes is {num_classes}: write 0 for no head, or more')
        self.num_classes = num_classes
        weight = next(self.parameters())
        head = make_head(self.num_features, num_classes)
        init_linear(head)
        self.head = head.to(device=weight.device, dtype=weight.dtype).train(self.training)

    @torch.no_grad()
    def set_input_size(self, img_size: int | Sequence[int] | None = None, window_size: int | None = None) -> None:
        """Change the image size or window size. Build optimizers afterwards.

        The network takes images of any size without this call: see `img_size` of `MSGTransformer` for what the size
        decides. Weights whose shapes change are resized: see `models.resize`.

        Args:
            img_size: image size in pixels, or (height, width); None to keep the present size.
            window_size: window size, in patches; None to keep the present size.

        Raises:
            ValueError: the image is smaller than one patch, channels do not divide, or an exchange has weights for
                regions of another size.
        """
        size = self.img_size if img_size is None else Size.of(img_size)
        window_size = self.window_size if window_size is None else window_size
        layouts = self.plan(size, window_size=window_size)
        for stage, layout in zip(self.layers, layouts):  # noqa: B905 (a pruned network has fewer stages)
            exchange = stage.blocks[0].exchange
            if not exchange.is_resizable and exchange.region_size != layout.shuffle_size:
                raise ValueError(
                    f'{type(exchange).__name__} exchanges MSG tokens in regions of {exchange.region_size} windows, and '
                    f'this size needs regions of {layout.shuffle_size}: choose another size, or another manip_type'
                )
        for stage, layout in zip(self.layers, layouts):  # noqa: B905 (a pruned network has fewer stages)
            stage.set_windows(layout.window_size, layout.shuffle_size)
        if self.msg_tokens is not None:
            self.msg_tokens = _replaced(self.msg_tokens, tile_msg_tokens(self.msg_tokens, layouts[0].shuffle_size))
        source = self.patch_grid
        self.img_size, self.window_size = size, window_size
        if self.absolute_pos_embed is not None:
            embedding = resize_position_embedding(self.absolute_pos_embed, self.patch_grid, source)
            self.absolute_pos_embed = _replaced(self.absolute_pos_embed, embedding)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable activation checkpointing of blocks (`use_checkpoint`)."""
        for stage in self.layers:
            stage.use_checkpoint = enable

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages, norm and head that `forward_intermediates` does not need.

        Args:
            indices: stages whose feature maps are wanted: see `forward_intermediates`.
            prune_norm: also remove the final norm; it is always removed with the last stage.
            prune_head: also remove the head; it is always removed with the last stage.

        Returns:
            The wanted stages, counted from 0.

        Raises:
            ValueError: a stage does not exist.
        """
        wanted = stage_indices(indices, len(self.layers))
        is_cut = wanted[-1] < len(self.layers) - 1
        self.layers = self.layers[: wanted[-1] + 1]
        self.layers[-1].downsample = None
        self.num_features = self.feature_info[wanted[-1]]['num_chs']
        if prune_norm or is_cut:
            self.norm = nn.Identity()
        if prune_head or is_cut:
            self.reset_classifier(0, '')
        return wanted

    def group_matcher(self, coarse: bool = False) -> dict:
        """Regular expressions that group parameters: the stem, and each block or, if `coarse`, each stage."""
        blocks = [
            (r'^layers\.(\d+)\.blocks\.(\d+)', None),
            (r'^layers\.(\d+)\.downsample', (99999,)),  # timm's code for the preceding group: the stage's last block
            (r'^norm', (99999,)),
        ]
        return {
            'stem': r'^patch_embed|^msg_tokens|^absolute_pos_embed',
            'blocks': r'^layers\.(\d+)' if coarse else blocks,
        }


def stage_indices(indices: int | Sequence[int] | None, count: int) -> list[int]:
    """Resolve timm's argument `indices` to stages, counted from 0, in ascending order.

    Args:
        indices: indices, negative ones counted from the end; a number n for the last n; None for all.
        count: stages of the network.

    Raises:
        ValueError: a stage does not exist, or no stage is selected.
    """
    if indices is None:
        indices = count
    selected = range(-indices, 0) if isinstance(indices, int) else indices  # a number selects the last ones
    if not selected or not all(-count <= i < count for i in selected):
        raise ValueError(f'indices is {indices!r}: the network has {count} stages, 0 to {count - 1}')
    return sorted({i % count for i in selected})


def _replaced(parameter: nn.Parameter, value: torch.Tensor) -> nn.Parameter:
    """Return the parameter if the shape is unchanged, else a new one with the same `requires_grad`."""
    if value.shape == parameter.shape:
        return parameter
    return nn.Parameter(value, requires_grad=parameter.requires_grad)
