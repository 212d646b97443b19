"""What the training loop needs of the outside world: collectives, seeds, the environment, how a program ends."""

import os
import platform
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import timm
import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from checkpoint import CheckpointError
from config import ConfigError
from data import DataError
from signals import EXIT_STOPPED, Stopped

Result = TypeVar('Result')


@contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """Around a program: how it ends.

    What a user can mend ends it with one line and exit code 1, a signal with `EXIT_STOPPED` once all is saved, and
    anything else with a traceback.
    """
    try:
        yield
    except (ConfigError, DataError, CheckpointError, FloatingPointError) as mistake:
        sys.exit(f'error: {mistake}')
    except Stopped:
        sys.exit(EXIT_STOPPED)


@contextmanager
def writing_in(folder: Path) -> Iterator[None]:
    """Around what writes into a run's folder.

    Raises:
        ConfigError: the system does not let it.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(f'output folder {folder}: {error.strerror}: write another --output, or make room') from error


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def on_main_process(function: Callable[[], Result]) -> Result:
    """Call a function in rank 0 alone; what it returns, or the mistake it raises, comes to every process."""
    result, mistake = None, None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            result = function()
        except ValueError as error:
            mistake = error
    if dist.is_initialized():
        outcome = [result, mistake]
        dist.broadcast_object_list(outcome)
        result, mistake = outcome
    if mistake is not None:
        raise mistake
    return result


def gather_on_main_process(value: Any) -> list[Any] | None:
    """Every process's value in rank 0, by rank; None in the others."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values)
    return values


def distribute(model: nn.Module, device: torch.device, deterministic: bool = False) -> nn.Module:
    """The network as this process trains it: with gradients averaged over the processes, if there are several.

    Args:
        model: the network, on the device.
        device: of this process.
        deterministic: add gradients in the same order in every update, as on CPUs always. Otherwise PyTorch groups them
            anew after the first one, which on more than two processes changes the last bits of an interrupted run.
            The option for it looks for unused parameters, and warns once that there are none.
    """
    if not dist.is_initialized():
        return model
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == 'cuda' else None,
        broadcast_buffers=False,
        find_unused_parameters=deterministic or device.type == 'cpu',
    )


def compiled(network: nn.Module, enabled: bool, mode: str) -> nn.Module:
    """The network as torch.compile runs it, if enabled: compiled at the first batch of each shape.

    Args:
        network: also one that is distributed, whose gradients are then averaged while others are computed.
        enabled: whether to compile.
        mode: `COMPILE_MODE`.
    """
    return torch.compile(network, mode=mode, dynamic=False) if enabled else network


def synchronize_gradients(network: nn.Module, enabled: bool) -> AbstractContextManager:
    """Context for a backward pass: gradients are averaged over the processes in it, or left to a later one."""
    network = getattr(network, '_orig_mod', network)  # of torch.compile
    return network.no_sync() if isinstance(network, DistributedDataParallel) and not enabled else nullcontext()


def set_seed(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's random numbers."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def set_arithmetic(tf32: bool, deterministic: bool) -> None:
    """Choose how GPUs compute.

    Args:
        tf32: fp32 products and convolutions may round to TensorFloat-32.
        deterministic: only algorithms that give the same bits each time; otherwise cuDNN tries out the fastest.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = not deterministic
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # cuBLAS reads it when it starts


def environment(device: torch.device) -> dict[str, str]:
    """What a run's figures depend on beside its config: revision, versions, hardware, command line."""
    return {
        'revision': git_revision(Path(__file__).parent),
        'python': platform.python_version(),
        'torch': torch.__version__,
        'torchvision': torchvision.__version__,
        'timm': timm.__version__,
        'cuda': str(torch.version.cuda),
        'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type,
        'threads': str(torch.get_num_threads()),
        'host': platform.node(),
        'system': platform.platform(),
        'command': ' '.join(sys.argv),
    }


def git_revision(folder: Path) -> str:
    """The commit of a checkout, marked where tracked files differ from it; 'unknown' outside of one."""

    def git(*arguments: str) -> str:
        command = ['git', '-C', str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git('status', '--porcelain', '--untracked-files=no')
        return git('rev-parse', 'HEAD') + (' (modified)' if changed else '')
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'
