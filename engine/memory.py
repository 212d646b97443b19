"""Peak memory of a process."""

import resource
import sys

import torch


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory of this process in MB (2^20 bytes): of the GPU (on Apple's, memory in use), or of the host."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2**20
    if device.type == 'mps':
        return torch.mps.driver_allocated_memory() / 2**20
    unit = 1 if sys.platform == 'darwin' else 2**10  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
