"""Time callables, one at a time or interleaved: seconds per call over several rounds, and their quartiles."""

import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from engine.distributed import on_main_process

Name = TypeVar('Name', bound=Hashable)


class Quartiles(NamedTuple):
    """Median, lower and upper quartile; `f'{quartiles:.2f}'` is such as '1.04 (1.02 to 1.05)'."""

    median: float
    low: float
    high: float

    @classmethod
    def from_values(cls, values: Sequence[float]) -> 'Quartiles':
        """Quartiles of one value per round."""
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
        return cls(median, low, high)

    @classmethod
    def of_ratios(cls, times: Sequence[float], others: Sequence[float]) -> 'Quartiles':
        """Quartiles of the ratios of times to other times of the same rounds."""
        return cls.from_values([a / b for a, b in zip(times, others, strict=True)])

    def __format__(self, spec: str) -> str:
        return f'{self.median:{spec}} ({self.low:{spec}} to {self.high:{spec}})'


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    elif device.type == 'mps':
        torch.mps.synchronize()


def seconds_per_call(function: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Mean seconds of calls on a device."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def time_interleaved(
    callables: Mapping[Name, Callable[[], object]], rounds: int, device: torch.device, min_seconds: float = 0.05
) -> dict[Name, list[float]]:
    """Time callables in turns, since a machine's speed changes from minute to minute.

    Every process of a run calls this at the same point. All of them then make the same calls, as training steps need,
    in which processes wait for each other.

    Args:
        callables: by name, each called before.
        rounds: how often each is timed. Every round begins with the next one.
        device: that they run on.
        min_seconds: a shorter callable is repeated within its turn.

    Returns:
        By name, seconds per call in each round.
    """
    seconds = {name: seconds_per_call(function, device) for name, function in callables.items()}
    repeats = on_main_process(lambda: {name: max(1, round(min_seconds / seconds[name])) for name in callables})
    times: dict[Name, list[float]] = {name: [] for name in callables}
    names = list(callables)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(seconds_per_call(callables[name], device, repeats[name]))
    return times


def time_callable(function: Callable[[], object], device: torch.device, max_seconds: float = 60) -> Quartiles:
    """Time a callable over ten rounds of half a second, or of one call that takes longer; see `time_interleaved`.

    Args:
        function: called before.
        device: that it runs on.
        max_seconds: fewer rounds, but at least three, where ten would take longer.

    Returns:
        Seconds per call.
    """
    seconds = seconds_per_call(function, device)
    rounds = on_main_process(lambda: min(10, max(3, int(max_seconds / seconds))))
    return Quartiles.from_values(time_interleaved({'': function}, rounds, device, min_seconds=0.5)[''])


def seconds_per_batch(batches: Iterable[object], warm_up: int, min_seconds: float = 10) -> float:
    """Time a loader: mean seconds until its next batch, with nothing else to do meanwhile.

    Args:
        batches: as many as are needed, at least `warm_up` + 2.
        warm_up: batches that may be ready before they are asked for, and are not timed.
        min_seconds: for which to load.
    """
    start = time.perf_counter()
    for number, _ in enumerate(batches, start=1):
        now = time.perf_counter()
        if number == warm_up + 1:
            start = now
        elif number > warm_up + 1 and now - start >= min_seconds:
            break
    return (now - start) / (number - warm_up - 1)
