"""Compare checkpoints and metrics bit for bit: what a run has recorded with what its replay computes."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from logger import parse_record
from utils import shortened

# Metrics that depend on how long an update took, and on the memory of the process
_MEASURED = {'seconds', 'data_s', 'images_per_s', 'memory_mb'}

# Metrics of an epoch that do not depend on its evaluation
_TRAINING = {'updates', 'train_loss', 'lr'}

# Entries that depend on the evaluation: which images share a batch there depends on the number of processes
EVALUATION_ENTRIES = ('scores', 'max_accuracy', 'progress.stale_evaluations')

# Epoch, and number of updates in it that were made before; infinity is the end of the epoch
Place = tuple[int, float]


def entries(value: Any, name: str = '') -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every entry of a checkpoint; a list of numbers is one entry."""
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple) and any(isinstance(x, Mapping | Tensor | list | tuple) for x in value):
        items = enumerate(value)
    else:
        yield name, value
        return
    for key, item in items:
        yield from entries(item, f'{name}.{key}' if name else str(key))


def is_identical(one: Any, other: Any) -> bool:
    """Whether two entries are the same to the bit: 0.0 differs from -0.0, and a NaN is the same as itself."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(_bytes(one), _bytes(other))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(is_identical, one, other))
    return one.hex() == other.hex() if isinstance(one, float) else one == other


def _bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor of N elements, (N, bytes per element)."""
    return tensor.reshape(-1).contiguous().view(torch.uint8).reshape(tensor.numel(), tensor.element_size())


def describe_difference(recorded: Any, recomputed: Any) -> str:
    """Describe how two entries differ; of tensors of the same shape, the first element and the number of elements."""
    values = recorded, recomputed
    if all(isinstance(x, Tensor) for x in values):
        kinds = [f'{x.dtype} {tuple(x.shape)}'.removeprefix('torch.') for x in values]
        if kinds[0] != kinds[1]:
            return 'recorded {}, recomputed {}'.format(*kinds)
        changed = (_bytes(recorded) != _bytes(recomputed)).any(dim=1).nonzero().flatten()
        first = int(changed[0])
        one, other = (int.from_bytes(_bytes(x)[first].numpy().tobytes(), 'little') for x in values)
        index = [int(i) for i in torch.unravel_index(changed[0], recorded.shape)]
        shown = 'recorded {!r}, recomputed {!r}'.format(*(x.reshape(-1)[first].item() for x in values))
        bits = (one ^ other).bit_count()
        return f'element {index}: {shown} ({bits} bit(s)); {len(changed):,} of {recorded.numel():,} element(s) differ'
    return 'recorded {}, recomputed {}'.format(*(shortened(repr(x), 80) for x in values))


def differing_entries(recorded: Mapping[str, Any], recomputed: Mapping[str, Any]) -> list[str]:
    """Name and describe the entries, from `entries`, in which two checkpoints differ; those of the weights first."""
    names = sorted({**recorded, **recomputed}, key=lambda name: not name.startswith('model'))
    differences = []
    for name in names:
        if name not in recorded or name not in recomputed:
            differences.append(f'{name}: only {"recorded" if name in recorded else "recomputed"}')
        elif not is_identical(recorded[name], recomputed[name]):
            differences.append(f'{name}: {describe_difference(recorded[name], recomputed[name])}')
    return differences


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; none if there is no such file. Lines that are no records are left out."""
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            records.append(parse_record(line))
    return records


def place_of(record: Mapping[str, Any]) -> Place:
    """Epoch, and update within it, at which a record was written."""
    return record['epoch'], record.get('step', math.inf)


class Records(NamedTuple):
    """Result of `compare_records`.

    Attributes:
        counts: number of records that were compared, by kind.
        first: the first one that deviates, in words; '' if none does.
        unmatched: number of records that only the run or only the replay has.
    """

    counts: dict[str, int]
    first: str
    unmatched: int


def compare_records(
    recorded: list[dict[str, Any]],
    recomputed: list[dict[str, Any]],
    start: Place,
    end: Place,
    has_same_evaluation: bool = True,
) -> Records:
    """Compare the records of a part of a run with those of its replay.

    Args:
        recorded: of the run.
        recomputed: of the replay.
        start: where the part begins.
        end: where it ends; records from there on are not of the part.
        has_same_evaluation: whether metrics of the evaluation are compared too.
    """
    runs = [{(place_of(x), x['kind']): x for x in records} for records in (recorded, recomputed)]
    keys = {key for run in runs for key in run if start <= key[0] < end}
    common = {key for key in keys if all(key in run for run in runs)}
    counts, last_equal = {'train': 0, 'hash': 0, 'epoch': 0}, ''
    for place, kind in sorted(common, key=lambda key: (key[0], list(counts).index(key[1]))):
        one, other = (run[place, kind] for run in runs)
        counts[kind] += 1
        label = f'epoch {place[0]}' + (f', update {place[1]}' if kind != 'epoch' else '')
        for name in {**one, **other}:
            is_compared = has_same_evaluation or kind != 'epoch' or name in _TRAINING
            if name not in _MEASURED and is_compared and not is_identical(one.get(name), other.get(name)):
                after = f'; the record before it, of {last_equal}, is equal' if last_equal else ''
                text = f'{label}: {name} recorded {one.get(name)!r}, recomputed {other.get(name)!r}{after}'
                return Records(counts, text, len(keys - common))
        last_equal = label
    return Records(counts, '', len(keys - common))
