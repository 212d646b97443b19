"""Memory that a network keeps from call to call, and memory that a call allocates."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import profile


def resident_bytes(network: nn.Module, optimizer: Optimizer | None, *others: Tensor) -> int:
    """Bytes of weights, buffers, the optimizer's moments and other tensors."""
    tensors = [*network.parameters(), *network.buffers(), *others]
    if optimizer is not None:
        tensors += [value for state in optimizer.state.values() for value in state.values()]
    return sum(tensor.nbytes for tensor in tensors)


def peak_allocation(function: Callable[[], object], device: torch.device) -> int:
    """Peak bytes that a call has allocated, in addition to what there was; it has been called before."""
    if device.type == 'cuda':
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(profile_memory=True, acc_events=True) as run:
        function()
    events = [e for e in run.profiler.kineto_results.events() if e.name() == '[memory]']
    events.sort(key=lambda event: event.start_ns())
    changes = np.array([event.nbytes() for event in events])
    return int(max(0, changes.cumsum().max(initial=0)))
