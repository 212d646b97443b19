"""Fine-tuning: fit pretrained weights to the network's shapes, and freeze stages."""

from collections import Counter

from torch import Tensor

from .resize import resize_bias_table, resize_position_embedding, square_side, tile_msg_tokens


class FineTuneMethods:
    """Methods of `MSGTransformer` for fine-tuning."""

    # Frozen modules; they stay in evaluation mode.
    frozen = ()

    def fit_state_dict(self, state_dict: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Fit weights from a different window size, shuffle region size or image size to this network's shapes.

        Bias tables and the position embedding, which must come from a square image, are interpolated bicubically; MSG
        tokens are repeated or cropped. All other weights are returned unchanged.

        Args:
            state_dict: weights; the mapping is not changed.

        Returns:
            The weights in this network's shapes, and a note on each kind of change; no notes if nothing changed.

        Raises:
            ValueError: a bias table, the MSG tokens or the position embedding belong to a grid that is not square.
        """
        own, fitted = self.state_dict(), dict(state_dict)
        windows, notes = Counter(), []
        for name, value in state_dict.items():
            if name not in own or own[name].shape == value.shape:
                continue
            if name.endswith('relative_position_index'):
                fitted[name] = own[name]
            if own[name].ndim != value.ndim or own[name].shape[-1] != value.shape[-1]:
                continue  # other heads or channels: loading reports the shape mismatch
            if name.endswith('relative_position_bias_table'):
                old, new = ((square_side(len(table)) + 1) // 2 for table in (value, own[name]))
                fitted[name] = resize_bias_table(value, new)
                windows[old, new] += 1
            elif name == 'msg_tokens':
                old, new = (square_side(tokens.shape[1]) for tokens in (value, own[name]))
                fitted[name] = tile_msg_tokens(value, new)
                verb = 'cropped' if new < old else 'repeated'
                notes.append(f'msg_tokens of a shuffle region of {old} x {old} windows {verb} to {new} x {new}')
            elif name == 'absolute_pos_embed':
                side = square_side(value.shape[1])
                fitted[name] = resize_position_embedding(value, self.patch_grid, (side, side))
                notes.append(f'{name} of {side} x {side} patches interpolated to {self.patch_grid}')
        for (old, new), count in windows.items():
            notes.append(
                f'position bias of {count} block(s) interpolated from windows of {old} x {old} to {new} x {new}'
            )
        return fitted, notes

    def freeze_stages(self, count: int) -> None:
        """Freeze the embedding and the first stages. Build optimizers and DDP afterwards.

        Args:
            count: 0 freezes the patch embedding, MSG tokens and position embedding; n also freezes the first n stages,
                and the norm before the head if these are all stages; -1 freezes nothing.

        Raises:
            ValueError: the network has fewer stages.
        """
        if count > len(self.layers):
            raise ValueError(f'{count} stages cannot be frozen: the network has {len(self.layers)}')
        if count < 0:
            return
        self.frozen = (self.patch_embed, self.pos_drop, *self.layers[:count])
        if count == len(self.layers):
            self.frozen += (self.norm,)
        for module in self.frozen:
            module.requires_grad_(False).eval()
        for parameter in (self.msg_tokens, self.absolute_pos_embed):
            if parameter is not None:
                parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> 'FineTuneMethods':
        """Switch to training mode, except for frozen modules, or to evaluation mode."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self
