"""Methods of timm's networks other than the forward pass: classifier, image size, checkpointing, pruning, groups.

They let timm's public tools work on the network: `create_model`, layer-wise learning rates, `features_only`, export to
the Hugging Face hub.
"""

from collections.abc import Sequence

import torch
from torch import nn

from .layers import init_linear, make_head
from .pyramid import Size
from .resize import resize_position_embedding, tile_msg_tokens

GLOBAL_POOLS = ('avg', '')


class TimmMethods:
    """What `MSGTransformer` has in common with timm's networks."""

    @property
    def head_hidden_size(self) -> int:
        """Channels that the classifier reads."""
        return self.num_features

    def get_classifier(self) -> nn.Module:
        """The head: a linear layer, or the identity without classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one; optimizers are to be built afterwards.

        Args:
            num_classes: classes; 0 for no head.
            global_pool: see `MSGTransformer`; None to leave it.

        Raises:
            ValueError: an unknown `global_pool`, or a negative number of classes.
        """
        if global_pool is not None:
            if global_pool not in GLOBAL_POOLS:
                raise ValueError(f'global_pool is {global_pool!r}: write one of {", ".join(map(repr, GLOBAL_POOLS))}')
            self.global_pool = global_pool
        if num_classes < 0:
            raise ValueError(f'num_classes is {num_classes}: write 0 for no head, or more')
        self.num_classes = num_classes
        weight = self.patch_embed.proj.weight
        head = make_head(self.num_features, num_classes)
        init_linear(head)
        self.head = head.to(device=weight.device, dtype=weight.dtype).train(self.training)

    @torch.no_grad()
    def set_input_size(self, img_size: int | Sequence[int] | None = None, window_size: int | None = None) -> None:
        """Lay the network out for another image size or window size; optimizers are to be built afterwards.

        Any size can be fed without this. It decides what `img_size` does in `MSGTransformer`. Weights whose shape
        changes are fitted: see `models.resize`.

        Args:
            img_size: image size in pixels, or (height, width); None to leave it.
            window_size: window size, in patches; None to leave it.

        Raises:
            ValueError: the image is smaller than one patch, or channels do not divide.
        """
        size = self.img_size if img_size is None else Size.of(img_size)
        window_size = self.window_size if window_size is None else window_size
        layouts = self.plan(size, window_size=window_size)
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
        """Recompute blocks in the backward pass (`use_checkpoint`), or keep their activations."""
        for stage in self.layers:
            stage.use_checkpoint = enable

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what `forward_intermediates` does not need.

        Args:
            indices: stages whose feature maps are wanted: see `forward_intermediates`.
            prune_norm: remove the final norm too; it goes with the last stage in any case.
            prune_head: remove the head too; it goes with the last stage in any case.

        Returns:
            The wanted stages, counted from 0.

        Raises:
            ValueError: a stage that does not exist.
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
        """Patterns that sort parameters, by name, into the stem, and a group per block or, if `coarse`, per stage."""
        blocks = [
            (r'^layers\.(\d+)\.blocks\.(\d+)', None),
            (r'^layers\.(\d+)\.downsample', (99999,)),  # timm's code for the group before: the stage's last block
            (r'^norm', (99999,)),
        ]
        return {
            'stem': r'^patch_embed|^msg_tokens|^absolute_pos_embed',
            'blocks': r'^layers\.(\d+)' if coarse else blocks,
        }


def stage_indices(indices: int | Sequence[int] | None, count: int) -> list[int]:
    """Stages selected by an argument `indices`, counted from 0, in ascending order.

    Args:
        indices: indices, negative ones counted from the end; a number n for the last n; None for all.
        count: stages of the network.

    Raises:
        ValueError: a stage that does not exist, or none.
    """
    if indices is None:
        indices = count
    selected = range(-indices, 0) if isinstance(indices, int) else indices  # a number selects the last ones
    if not selected or not all(-count <= i < count for i in selected):
        raise ValueError(f'indices is {indices!r}: the network has {count} stages, 0 to {count - 1}')
    return sorted({i % count for i in selected})


def _replaced(parameter: nn.Parameter, value: torch.Tensor) -> nn.Parameter:
    """The parameter itself where its shape stays, else a new one that is frozen if it was."""
    if value.shape == parameter.shape:
        return parameter
    return nn.Parameter(value, requires_grad=parameter.requires_grad)
