"""What the training loop needs of the outside world: processes, seeds, checkpoints."""

import collections
import os
import random
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from config import ConfigError
from data import DataError
from models.pyramid import PyramidError

# What torchrun tells each process.
LAUNCHER_VARIABLES = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or belongs to another network."""


@contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """Around a program: what a user can mend ends it with one line and exit code 1, anything else with a traceback."""
    try:
        yield
    except (ConfigError, PyramidError, DataError, CheckpointError, FloatingPointError) as mistake:
        sys.exit(f'error: {mistake}')


class Process(NamedTuple):
    """This process among those of the run.

    Attributes:
        rank: its number.
        world_size: how many there are.
        device: where it computes.
    """

    rank: int
    world_size: int
    device: torch.device


@contextmanager
def start_process(device: str, local_rank: int) -> Iterator[Process]:
    """Join the process group that a launcher's variables describe, or run alone where there is none.

    Args:
        device: auto, cuda or cpu.
        local_rank: GPU to use where there is no launcher.

    Raises:
        ConfigError: the device is not there, or a launcher's variables are set in part.
    """
    launched = 'RANK' in os.environ
    missing = [name for name in LAUNCHER_VARIABLES if name not in os.environ]
    if launched and missing:
        raise ConfigError(f'RANK is set but {", ".join(missing)} is not: start with torchrun, or unset RANK')
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    index = int(os.environ['LOCAL_RANK']) if launched else local_rank
    if device == 'cuda':
        if index >= torch.cuda.device_count():
            raise ConfigError(
                f'local rank {index} has no GPU, since {torch.cuda.device_count()} are visible: '
                f'start fewer processes a node, or write --device cpu'
            )
        torch.cuda.set_device(index)
    place = torch.device(device, index) if device == 'cuda' else torch.device(device)
    if not launched:
        yield Process(0, 1, place)
        return
    dist.init_process_group('nccl' if device == 'cuda' else 'gloo')
    try:
        yield Process(dist.get_rank(), dist.get_world_size(), place)
    finally:
        dist.destroy_process_group()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def from_main_process(value: Any) -> Any:
    """Rank 0's value, in every process."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def distribute(model: nn.Module, device: torch.device) -> nn.Module:
    """The network as this process trains it: with gradients averaged over the processes, if there are several."""
    if not dist.is_initialized():
        return model
    return DistributedDataParallel(
        model, device_ids=[device.index] if device.type == 'cuda' else None, broadcast_buffers=False
    )


def synchronize_gradients(model: nn.Module, enabled: bool) -> AbstractContextManager:
    """Context for a backward pass: gradients are averaged over the processes in it, or left to a later one."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not enabled else nullcontext()


def set_seed(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's random numbers."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint under a temporary name, then rename it, so that `path` is never half written."""
    temporary = path.with_name(path.name + '.tmp')
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU without running any code in it.

    Published checkpoints hold a pickled yacs node as `config`; it is read as a plain mapping.

    Raises:
        CheckpointError: no file, not a checkpoint, or one that holds more than data.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f'checkpoint {path} {"is a folder: name a file in it" if path.is_dir() else "does not exist"}'
        )
    try:
        with torch.serialization.safe_globals([(collections.OrderedDict, 'yacs.config.CfgNode')]):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # torch.load raises many kinds, none of which it promises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f'{path} is not a checkpoint that can be read safely: {reason}') from error
    weights = checkpoint.get('model') if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(f'{path} is not a checkpoint of this project: it has no entry "model" of weights')
    return checkpoint


def find_latest_checkpoint(output_dir: Path) -> Path | None:
    """The checkpoint of the highest epoch in a run's folder."""
    epochs = {}
    for path in output_dir.glob('ckpt_epoch_*.pth'):
        if match := re.fullmatch(r'ckpt_epoch_(\d+)\.pth', path.name):
            epochs[int(match[1])] = path
    return epochs[max(epochs)] if epochs else None


def load_weights(
    model: nn.Module, checkpoint: dict[str, Any], path: str | Path, may_replace_head: bool = False
) -> bool:
    """Load a checkpoint's weights, every one of them.

    Args:
        model: the network, not wrapped.
        checkpoint: from `load_checkpoint`.
        path: where it came from, for messages.
        may_replace_head: keep the network's own head if the checkpoint's has other classes.

    Returns:
        Whether the network kept its own head.

    Raises:
        CheckpointError: names the missing, unexpected and misshapen weights.
    """
    theirs, ours = dict(checkpoint['model']), model.state_dict()
    heads = {name for name in theirs.keys() | ours.keys() if name.startswith('head.')}
    replaced = may_replace_head and any(_shape(theirs.get(name)) != _shape(ours.get(name)) for name in heads)
    if replaced:
        theirs = {name: value for name, value in theirs.items() if name not in heads}
        theirs |= {name: value for name, value in ours.items() if name in heads}
    faults = {
        'missing': sorted(ours.keys() - theirs.keys()),
        'unexpected': sorted(theirs.keys() - ours.keys()),
        'misshapen': [
            f'{name} {_shape(theirs[name])} for {_shape(ours[name])}'
            for name in ours
            if name in theirs and _shape(theirs[name]) != _shape(ours[name])
        ],
    }
    if any(faults.values()):
        told = '; '.join(f'{fault} {_some(names)}' for fault, names in faults.items() if names)
        raise CheckpointError(f'{path} is a checkpoint of another model than the config: {told}')
    model.load_state_dict(theirs)
    return replaced


def _shape(value: Tensor | None) -> tuple[int, ...] | None:
    return None if value is None else tuple(value.shape)


def _some(names: list[str], most: int = 3) -> str:
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(names[:most]) + more
