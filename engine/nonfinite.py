"""Policy for losses and gradient norms that are not finite, without waiting for the GPU."""

import logging

import torch
from torch import Tensor
from yacs.config import CfgNode

from utils import UserError

_REMEDY = 'write a smaller TRAIN.BASE_LR or TRAIN.CLIP_GRAD, or AMP_DTYPE bfloat16, and start again'


class NonFiniteError(UserError, FloatingPointError):
    """A loss or gradient norm is not finite; nothing was updated since."""


class HostCopy:
    """A device tensor's values, of which a copy to the host begins now."""

    def __init__(self, tensor: Tensor):
        self._copy, self._done = tensor.to('cpu', non_blocking=tensor.is_cuda), None
        if tensor.is_cuda:
            self._done = torch.cuda.Event()
            self._done.record()

    def tolist(self) -> list:
        """The values. Waits for the copy, but for no later work on the device."""
        if self._done is not None:
            self._done.synchronize()
        return self._copy.tolist()


class NonFiniteCheck:
    """Stops a run, or skips updates, before a nonfinite loss or gradient norm reaches the weights.

    With `stop`, the first one skips its update and all later ones on the device, and the host finds out where it reads
    the losses anyway: `check` raises there, on every rank, since every rank has the same flags. With `skip`, or where
    float16 overflows occasionally, the host reads one flag per update, so that schedule and EMA skip the update too:
    by `updated`, which the trainer calls when the next update's gradients are on their way.

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
        self._flags: HostCopy | None = None  # `first_bad` and whether the weights are as they were, after an update

    @property
    def skip_update(self) -> Tensor:
        """Whether an earlier update has stopped the run: a boolean on the device."""
        return self.first_bad >= 0

    def record(
        self, nonfinite_ranks: Tensor, grad_norm: Tensor, skipped: Tensor, epoch: int, step: int, lr: float
    ) -> None:
        """Record an update; on an NVIDIA GPU, the host waits for nothing.

        Args:
            nonfinite_ranks: number of ranks with a nonfinite loss; a scalar on the device, like the next two.
            grad_norm: the same on every rank.
            skipped: whether the weights were left as they are.
            epoch: for messages, like the next two.
            step: update within the epoch.
            lr: learning rate.
        """
        self.update_labels.append(f'epoch {epoch}, update {step}, learning rate {lr:.3g}')
        if self.stops:
            is_bad = nonfinite_ranks > 0 if self.may_overflow else (nonfinite_ranks > 0) | ~grad_norm.isfinite()
            self.first_bad = torch.where((self.first_bad < 0) & is_bad, len(self.update_labels) - 1, self.first_bad)
        if self.may_overflow or not self.stops:
            self._flags = HostCopy(torch.stack((self.first_bad, skipped.to(self.first_bad.dtype))))

    def updated(self) -> bool:
        """Whether the last update has changed the weights, as far as the host needs to know.

        Call it between two `record`s. It waits for the update, but for no later work on the device.

        Raises:
            NonFiniteError: the loss is not finite, or too many updates in a row were skipped.
        """
        if self._flags is None:
            return True
        (first_bad, is_skipped), self._flags = self._flags.tolist(), None
        self._raise_if_bad(first_bad)
        label = self.update_labels[-1]
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
