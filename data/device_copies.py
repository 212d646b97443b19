"""Copy batches to the device, on a separate CUDA stream."""

from collections import deque
from functools import cache
from typing import Any

import torch
from torch import Tensor

# How many batches the host may copy before the GPU has finished the first of them
_MAX_LEAD = 2


class DeviceCopies:
    """Copies batches to a device; copies to a GPU use a separate CUDA stream, and overlap with the batch before.

    To overlap, the host's memory must be pinned (`DATA.PIN_MEMORY`), and the host must be ahead of the GPU. The host
    waits when it is more than two batches ahead, since each batch occupies memory until the GPU has read it.

    Args:
        device: the target device.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = _copy_stream(device) if device.type == 'cuda' else None
        self._queued: deque[torch.cuda.Event] = deque()  # recorded before each of the last copies

    def __call__(self, batch: Any) -> Any:
        """The batch with its tensors on the device, in lists and dicts too; tuples become lists.

        Later work on the device's current stream waits for them.
        """
        if self.stream is None:
            return self._copy(batch, None)
        current = torch.cuda.current_stream(self.device)
        self._queued.append(current.record_event())
        if len(self._queued) > _MAX_LEAD:
            self._queued.popleft().synchronize()
        with torch.cuda.stream(self.stream):
            copies = self._copy(batch, current)
        current.wait_stream(self.stream)
        return copies

    def _copy(self, batch: Any, user: torch.cuda.Stream | None) -> Any:
        if isinstance(batch, dict):
            return {name: self._copy(value, user) for name, value in batch.items()}
        if isinstance(batch, (list, tuple)):
            return [self._copy(value, user) for value in batch]
        if not isinstance(batch, Tensor):
            return batch
        copy = batch.to(self.device, non_blocking=True)
        if user is not None:
            copy.record_stream(user)  # otherwise, its memory might be reused too early
        return copy


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Get the device's only stream for copies; PyTorch's allocator keeps separate memory for each stream."""
    return torch.cuda.Stream(device)
