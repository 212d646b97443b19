"""Policy for losses and gradient norms that are not finite."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from utils import UserError

_REMEDY = 'write a smaller TRAIN.BASE_LR or TRAIN.CLIP_GRAD, or AMP_DTYPE bfloat16, and start again'


class NonFiniteError(UserError, FloatingPointError):
    """A loss or gradient norm is not finite; the weights are those of before that update."""


class HostCopy:
    """An asynchronous copy of a device tensor to the host, which begins now."""

    def __init__(self, tensor: Tensor):
        self._copy, self._done = tensor.to('cpu', non_blocking=tensor.is_cuda), None
        if tensor.is_cuda:
            self._done = torch.cuda.Event()
            self._done.record()

    def tolist(self) -> list:
        """The values. Waits for the copy, but not for work that was queued later."""
        if self._done is not None:
            self._done.synchronize()
        return self._copy.tolist()


class BufferBackup:
    """A copy of a network's floating-point buffers, such as batch-norm statistics.

    A forward pass changes batch-norm statistics before it is known whether its loss is finite.
    """

    def __init__(self, model: nn.Module):
        self._copies = [(buffer, buffer.clone()) for buffer in model.buffers() if buffer.is_floating_point()]

    def __bool__(self) -> bool:
        return bool(self._copies)

    def restore_if(self, skipped: Tensor) -> None:
        """Restore the buffers if a boolean on the device is true, without waiting for it."""
        for buffer, copy in self._copies:
            buffer.copy_(torch.where(skipped, copy, buffer))


class NonFinitePolicy(NamedTuple):
    """What a run does about a loss or gradient norm that is not finite.

    With `stops`, the device skips the first such update and all later ones. The host notices when it next reads the
    losses, and raises on every rank, since every rank has the same flags. With `stops` False, or where scaled float16
    gradients overflow occasionally, the host reads one flag per update, so that schedule and EMA skip the update too.

    Attributes:
        stops: whether `TRAIN.NONFINITE` is stop.
        limit: updates in a row that may be skipped (`TRAIN.NONFINITE_LIMIT`).
        may_overflow: whether scaled gradients overflow occasionally, which is not an error.
    """

    stops: bool
    limit: int
    may_overflow: bool

    @classmethod
    def from_config(cls, config: CfgNode, may_overflow: bool) -> 'NonFinitePolicy':
        """Create the policy from the config."""
        return cls(config.TRAIN.NONFINITE == 'stop', config.TRAIN.NONFINITE_LIMIT, may_overflow)

    @property
    def reads_every_update(self) -> bool:
        """Whether the host has to read after each update whether it was skipped."""
        return self.may_overflow or not self.stops

    def stops_at(self, nonfinite_ranks: Tensor, grad_norm: Tensor) -> Tensor:
        """Whether an update stops the run, as a boolean on the device.

        Args:
            nonfinite_ranks: number of ranks whose loss is not finite; a scalar on the device.
            grad_norm: gradient norm, the same on every rank; a scalar on the device.
        """
        if not self.stops:
            return torch.zeros_like(nonfinite_ranks, dtype=torch.bool)
        return nonfinite_ranks > 0 if self.may_overflow else (nonfinite_ranks > 0) | ~grad_norm.isfinite()

    def check_skipped(self, skipped_in_a_row: int, label: str) -> None:
        """Check the number of consecutive skipped updates, the last of which is `label`.

        Raises:
            NonFiniteError: there are too many.
        """
        if skipped_in_a_row > self.limit:
            raise NonFiniteError(
                f'{skipped_in_a_row} updates in a row were skipped, up to {label}, because the loss or the gradient '
                f'norm was not finite: {_REMEDY}'
            )


def update_label(epoch: int, step: float, lr: float) -> str:
    """Format an update for messages."""
    return f'epoch {epoch}, update {step:.0f}, learning rate {lr:.3g}'


def check_first_bad(epoch: int, step: float, lr: float) -> None:
    """Check the values of `TrainingState.first_bad`.

    Raises:
        NonFiniteError: there was an update that stops the run.
    """
    if step >= 0:
        raise NonFiniteError(
            f'the loss or the gradient norm is not finite at {update_label(epoch, step, lr)}: nothing was updated '
            f'since. {_REMEDY[0].upper()}{_REMEDY[1:]}'
        )
