"""Batches of a loader, on their way to the device."""

from typing import Any

import torch
from torch import Tensor


class DeviceCopies:
    """Copies batches to a device: to a GPU on a stream of their own, while it still computes the batch before.

    For that, the host's memory must be pinned (`DATA.PIN_MEMORY`), and the host be ahead of the GPU.

    Args:
        device: where to.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == 'cuda' else None

    def __call__(self, batch: Any) -> Any:
        """The batch with its tensors on the device, in lists and dicts too; what its current stream does next waits."""
        if self.stream is None:
            return self._copy(batch, None)
        current = torch.cuda.current_stream(self.device)
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
            copy.record_stream(user)  # or its memory might be used again before that has read it
        return copy
