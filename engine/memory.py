"""Memory of processes."""

import contextlib
import resource
import sys
from pathlib import Path

import torch


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory of this process in MB (2^20 bytes): of the GPU (on Apple's, memory in use), or of the host."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2**20
    if device.type == 'mps':
        return torch.mps.driver_allocated_memory() / 2**20
    unit = 1 if sys.platform == 'darwin' else 2**10  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def reset_peak_memory() -> None:
    """Measure the host's peak memory from now on: without this, training would report what its start has taken.

    Linux only: elsewhere, the peak stays that of the whole process.
    """
    with contextlib.suppress(OSError):
        Path('/proc/self/clear_refs').write_text('5', encoding='ascii')


def read_kb(process: int | str, file: str, key: str) -> int:
    """A value that Linux reports of a process, in KiB.

    Args:
        process: its number, or `self`.
        file: of its folder in `/proc`: `status` or `smaps_rollup`.
        key: start of the line, such as `VmHWM:`.
    """
    lines = Path('/proc', str(process), file).read_text(encoding='utf-8').splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))
