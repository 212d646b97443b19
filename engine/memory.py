"""Peak memory of a call."""

from collections.abc import Callable

import numpy as np
import torch
from torch.profiler import profile


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
