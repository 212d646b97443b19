"""Timing: the median and quartiles of callables, alone or interleaved."""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch

Name = TypeVar('Name', bound=Hashable)


class Quartiles(NamedTuple):
    """Median, lower and upper quartile."""

    median: float
    low: float
    high: float

    @classmethod
    def from_values(cls, values: Sequence[float]) -> 'Quartiles':
        """Quartiles of one value per round."""
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
        return cls(median, low, high)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    elif device.type == 'mps':
        torch.mps.synchronize()


def time_interleaved(
    callables: Mapping[Name, Callable[[], object]], rounds: int, device: torch.device, min_seconds: float = 0.05
) -> dict[Name, list[float]]:
    """Time callables in turns, since a machine's speed changes from minute to minute.

    Args:
        callables: by name, each called before.
        rounds: how often each is timed. Every round begins with the next one.
        device: that they run on.
        min_seconds: a shorter callable is repeated within its turn.

    Returns:
        By name, seconds per call in each round.
    """

    def seconds(function: Callable[[], object], repeats: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        synchronize(device)
        return (time.perf_counter() - start) / repeats

    repeats = {name: max(1, round(min_seconds / seconds(function, 1))) for name, function in callables.items()}
    times: dict[Name, list[float]] = {name: [] for name in callables}
    names = list(callables)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(seconds(callables[name], repeats[name]))
    return times


def time_callable(function: Callable[[], object], device: torch.device) -> Quartiles:
    """Seconds per call over ten rounds of half a second, or of one call that takes longer."""
    return Quartiles.from_values(time_interleaved({'': function}, 10, device, min_seconds=0.5)[''])
