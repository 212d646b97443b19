"""Policy for losses and gradient norms that are not finite, without waiting for the GPU."""

import logging

import torch
from torch import Tensor
from yacs.config import CfgNode

from utils import UserError

_REMEDY = 'write a smaller TRAIN.BASE_LR or TRAIN.CLIP_GRAD, or AMP_DTYPE bfloat16, and start again'


class NonFiniteError(UserError, FloatingPointError):
    """A loss or gradient norm is not finite; nothing was updated since."""


class NonFiniteCheck:
    """Stops a run, or skips updates, before a nonfinite loss or gradient norm reaches the weights.

    With `stop`, the first one skips its update and all later ones on the device, and the host finds out where it reads
    the losses anyway: `check` raises there, on every rank, since every rank has the same flags. With `skip`, or where
    float16 overflows occasionally, the host reads one flag per update, so that schedule and EMA skip the update too.

    Args:
        config: the config tree; `TRAIN.NONFINITE` and `TRAIN.NONFINITE_LIMIT` are read.
        may_overflow: scaled gradients overflow occasionally, which is not an error.
        device: the losses' device.
        logger: for skipped updates.
    """

    def __init__(self, config: CfgNode, may_overflow: bool, device: torch.device, logger: logging.Logger):
        self.stops = config.TRAIN.NONFINITE == 'stop'
        self.limit = config.TRAIN.NONFINITE_LIMIT
        self.may_overflow = may_overflow
        self.logger = logger
        self.skipped_in_a_row = 0
        self.first_bad = torch.tensor(-1, device=device)  # index into `update_labels`; -1 for none
        self.update_labels: list[str] = []  # of the updates since the last check

    @property
    def skip_update(self) -> Tensor:
        """Whether an earlier update has stopped the run: a boolean on the device."""
        return self.first_bad >= 0

    def record(
        self, nonfinite_ranks: Tensor, grad_norm: Tensor, skipped: Tensor, epoch: int, step: int, lr: float
    ) -> bool:
        """Record an update.

        Args:
            nonfinite_ranks: number of ranks with a nonfinite loss; a scalar on the device, like the next two.
            grad_norm: the same on every rank.
            skipped: whether the weights were left as they are.
            epoch: for messages, like the next two.
            step: update within the epoch.
            lr: learning rate.

        Returns:
            Whether the weights have changed, as far as the host needs to know.

        Raises:
            NonFiniteError: too many updates in a row were skipped.
        """
        label = f'epoch {epoch}, update {step}, learning rate {lr:.3g}'
        self.update_labels.append(label)
        if self.stops:
            is_bad = nonfinite_ranks > 0 if self.may_overflow else (nonfinite_ranks > 0) | ~grad_norm.isfinite()
            self.first_bad = torch.where((self.first_bad < 0) & is_bad, len(self.update_labels) - 1, self.first_bad)
            if not self.may_overflow:
                return True
        first_bad, is_skipped = torch.stack((self.first_bad, skipped.to(self.first_bad.dtype))).tolist()
        self._raise_if_bad(first_bad)
        self.update_labels.clear()
        if not is_skipped:
            self.skipped_in_a_row = 0
            return True
        self.skipped_in_a_row += 1
        self.logger.warning(f'update skipped at {label}: the loss or the gradient norm is not finite')
        if self.skipped_in_a_row > self.limit:
            raise NonFiniteError(
                f'{self.skipped_in_a_row} updates in a row were skipped, up to {label}, because the loss or the '
                f'gradient norm was not finite: {_REMEDY}'
            )
        return False

    def check(self) -> None:
        """Read the device's flag.

        Raises:
            NonFiniteError: the loss or the gradient norm of an update since the last check was not finite.
        """
        self._raise_if_bad(self.first_bad.item())
        self.update_labels.clear()

    def _raise_if_bad(self, first_bad: int) -> None:
        if first_bad >= 0:
            raise NonFiniteError(
                f'the loss or the gradient norm is not finite at {self.update_labels[first_bad]}: nothing was updated '
                f'since. {_REMEDY[0].upper()}{_REMEDY[1:]}'
            )
