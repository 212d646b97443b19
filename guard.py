"""What is done about losses and gradient norms that are not finite, without waiting for the GPU."""

import logging

import torch
from torch import Tensor
from yacs.config import CfgNode


class NonFiniteGuard:
    """Stops a run, or skips updates, before a loss or gradient norm that is not finite reaches the weights.

    With `stop`, the first one vetoes its update and all after it on the device, and the host finds out where it reads
    the losses anyway: `check` raises there, on every rank, since every rank has the same flags. With `skip`, or where
    float16 overflows now and then, the host reads one flag an update, so that schedule and average stay behind too.

    Args:
        config: the config tree; `TRAIN.NONFINITE` and `TRAIN.NONFINITE_LIMIT` are read.
        may_overflow: updates are skipped where scaled gradients overflow, and that is no error.
        device: of the losses.
        logger: is told of what is skipped.
    """

    def __init__(self, config: CfgNode, may_overflow: bool, device: torch.device, logger: logging.Logger):
        self.stops = config.TRAIN.NONFINITE == 'stop'
        self.limit = config.TRAIN.NONFINITE_LIMIT
        self.may_overflow = may_overflow
        self.logger = logger
        self.skipped_in_a_row = 0
        self.tripped = torch.tensor(-1, device=device)  # which of `places` was not finite; -1 is none
        self.places: list[str] = []  # epoch, update and learning rate of each update since the last check

    @property
    def veto(self) -> Tensor:
        """Whether an earlier update has stopped the run, a truth value on the device."""
        return self.tripped >= 0

    def update(self, bad_losses: Tensor, norm: Tensor, skipped: Tensor, epoch: int, step: int, lr: float) -> bool:
        """Take in an update.

        Args:
            bad_losses: how many ranks had a loss that was not finite; a scalar on the device, like the next two.
            norm: of the gradient, the same on every rank.
            skipped: whether the weights were left as they are.
            epoch: of the update, for messages, like the next two.
            step: its number in the epoch.
            lr: its learning rate.

        Returns:
            Whether the weights have changed, as far as the host needs to know.

        Raises:
            FloatingPointError: too many updates in a row were skipped.
        """
        place = f'epoch {epoch}, update {step}, learning rate {lr:.3g}'
        self.places.append(place)
        if self.stops:
            bad = bad_losses > 0 if self.may_overflow else (bad_losses > 0) | ~norm.isfinite()
            self.tripped = torch.where((self.tripped < 0) & bad, len(self.places) - 1, self.tripped)
            if not self.may_overflow:
                return True
        tripped, is_skipped = torch.stack((self.tripped, skipped.to(self.tripped.dtype))).tolist()
        self._raise_if(tripped)
        self.places.clear()
        if not is_skipped:
            self.skipped_in_a_row = 0
            return True
        self.skipped_in_a_row += 1
        self.logger.warning(f'update skipped at {place}: the loss or the gradient norm is not finite')
        if self.skipped_in_a_row > self.limit:
            raise FloatingPointError(
                f'{self.skipped_in_a_row} updates in a row were skipped, up to {place}, '
                f'since the loss or the gradient norm was not finite: {_REMEDY}'
            )
        return False

    def check(self) -> None:
        """Read the device's flag.

        Raises:
            FloatingPointError: the loss or the gradient norm of an update since the last check was not finite.
        """
        self._raise_if(self.tripped.item())
        self.places.clear()

    def _raise_if(self, tripped: int) -> None:
        if tripped >= 0:
            raise FloatingPointError(
                f'the loss or the gradient norm is not finite at {self.places[tripped]}: nothing was updated since. '
                f'{_REMEDY[0].upper()}{_REMEDY[1:]}'
            )


_REMEDY = 'write a smaller TRAIN.BASE_LR or TRAIN.CLIP_GRAD, or AMP_DTYPE bfloat16, and start again'
