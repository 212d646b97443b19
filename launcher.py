"""How a process of a run starts: what its launcher says, its device, and the process group."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from config import ConfigError
from signals import Stopped

# What torchrun, and torch.distributed.launch, tell each process.
TORCHRUN_VARIABLES = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')

# What srun tells each process; MASTER_ADDR and MASTER_PORT may be set besides.
SLURM_VARIABLES = ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID', 'SLURM_JOB_NODELIST', 'SLURM_JOB_ID')


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


class Launch(NamedTuple):
    """What a launcher says of this process.

    Attributes:
        launcher: torchrun or srun.
        rank, world_size: its number, and how many there are.
        local_rank: its number on its node.
        master_addr, master_port: where rank 0 is to be met.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: int


def read_launcher(variables: Mapping[str, str]) -> Launch | None:
    """What the launcher has set: torchrun and its like, which go first, or srun; None where there is no launcher.

    Args:
        variables: of the environment.

    Raises:
        ConfigError: they are set in part, or cannot be.
    """
    if 'RANK' in variables or 'WORLD_SIZE' in variables:
        launcher = 'torchrun'
        rank, world_size, local_rank, address, port = _read(variables, TORCHRUN_VARIABLES, launcher)
    elif _is_slurm_task(variables):
        launcher = 'srun'
        stand_ins = {
            'SLURM_JOB_NODELIST': variables.get('MASTER_ADDR') or variables.get('SLURM_NODELIST'),
            'SLURM_JOB_ID': variables.get('MASTER_PORT'),
        }
        rank, world_size, local_rank, nodes, job = _read({**stand_ins, **variables}, SLURM_VARIABLES, launcher)
        world_size = variables.get('SLURM_STEP_NUM_TASKS', world_size)  # a step may take a part of its job
        address = variables.get('MASTER_ADDR') or first_host(variables.get('SLURM_STEP_NODELIST', nodes))
        port = variables.get('MASTER_PORT') or 20_000 + int(re.sub(r'\D', '', job)) % 20_000  # another for each job
    else:
        return None
    try:
        launch = Launch(launcher, int(rank), int(world_size), int(local_rank), address, int(port))
    except ValueError as error:
        raise ConfigError(f'a variable of the launcher is not a number: {error}') from error
    if not 0 <= launch.rank < launch.world_size:
        raise ConfigError(f'the launcher says rank {rank} of {world_size} processes: ranks go from 0 on')
    return launch


def _read(variables: Mapping[str, str], names: tuple[str, ...], launcher: str) -> list[str]:
    """The variables' values, all of them."""
    missing = [name for name in names if not variables.get(name)]
    if missing:
        there = next(name for name in names if variables.get(name))
        raise ConfigError(f'{there} is set but {", ".join(missing)} is not: start with {launcher}, or unset {there}')
    return [variables[name] for name in names]


def _is_slurm_task(variables: Mapping[str, str]) -> bool:
    """Whether srun has started this process; a batch script has most of its variables, but is no task of a step."""
    is_batch_script = variables.get('ENVIRONMENT') == 'BATCH' and 'SLURM_STEP_ID' not in variables
    return 'SLURM_PROCID' in variables and not is_batch_script


def first_host(nodes: str) -> str:
    """The first host of SLURM's notation, such as `gpu[003-007,9],login`."""
    first = re.match(r'(?:[^\[,]|\[[^\]]*\])*', nodes)[0]  # up to a comma that is not in brackets
    return re.sub(r'\[(\w+)[^\]]*\]', r'\1', first)


def choose_device(name: str, launch: Launch | None, local_rank: int) -> torch.device:
    """The device of this process.

    Args:
        name: auto, cuda, mps or cpu.
        launch: from `read_launcher`.
        local_rank: GPU to use where there is no launcher.

    Raises:
        ConfigError: the device is not there.
    """
    if name == 'auto':
        several = launch is not None and launch.world_size > 1
        mps = torch.backends.mps.is_available() and not several
        name = 'cuda' if torch.cuda.is_available() else 'mps' if mps else 'cpu'
    if name == 'mps':
        if not torch.backends.mps.is_available():
            raise ConfigError('DEVICE is mps, but there is no Apple GPU that PyTorch can use: write --device cpu')
        if launch is not None and launch.world_size > 1:
            raise ConfigError('several processes cannot share an Apple GPU: start one, or write --device cpu')
    if name != 'cuda':
        return torch.device(name)
    index = launch.local_rank if launch else local_rank
    count = torch.cuda.device_count()
    if launch and launch.launcher == 'srun' and count == 1:
        index = 0  # SLURM can show each task the GPU that it has bound to it, and no other
    if index >= count:
        raise ConfigError(
            f'local rank {index} has no GPU, since {count} are visible: '
            f'start fewer processes a node, or write --device cpu'
        )
    return torch.device('cuda', index)


def _meeting_place(launch: Launch, variables: Mapping[str, str]) -> dict[str, Any]:
    """Where PyTorch shall have the processes meet: the options of `init_process_group`."""
    if launch.launcher == 'srun':
        return {'init_method': f'tcp://{launch.master_addr}:{launch.master_port}'}
    on_one_node = variables.get('LOCAL_WORLD_SIZE') == variables['WORLD_SIZE']
    if on_one_node and variables.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':
        # After a restart, torchrun's store still holds the addresses of the ranks before it (PyTorch 2.11), and a rank
        # that reads another's too early fails. Nodes count restarts each for itself; for them, see README's command.
        store = dist.TCPStore(launch.master_addr, launch.master_port, is_master=False)
        return {'store': dist.PrefixStore(f'restart_{variables["TORCHELASTIC_RESTART_COUNT"]}', store)}
    return {'init_method': 'env://'}


@contextmanager
def start_process(device: str, local_rank: int) -> Iterator[Process]:
    """Join the process group that a launcher describes, or run alone where there is none.

    Args:
        device: auto, cuda, mps or cpu.
        local_rank: GPU to use where there is no launcher.

    Raises:
        ConfigError: the device is not there, or the processes cannot meet as the launcher says.
    """
    launch = read_launcher(os.environ)
    place = choose_device(device, launch, local_rank)
    if place.type == 'cuda':
        torch.cuda.set_device(place)
    # One of srun's tasks may be a shell with several runs; an Apple GPU has one process, and no collectives.
    if launch is None or place.type == 'mps' or (launch.launcher == 'srun' and launch.world_size == 1):
        yield Process(0, 1, place)
        return
    # What the processes agree on beside the gradients goes from CPU to CPU: no GPU is waited for.
    backend = 'cpu:gloo,cuda:nccl' if place.type == 'cuda' else 'gloo'
    address = f'{launch.master_addr}:{launch.master_port}'
    try:
        dist.init_process_group(
            backend, rank=launch.rank, world_size=launch.world_size, **_meeting_place(launch, os.environ)
        )
    except (dist.DistError, ValueError) as error:
        reason = 'the port is in use' if 'EADDRINUSE' in str(error) else str(error).splitlines()[0]
        raise ConfigError(
            f'the processes cannot meet at {address} ({reason}): set MASTER_ADDR to the host of rank 0, '
            f'and MASTER_PORT to a free port of it'
        ) from error
    try:
        yield Process(launch.rank, launch.world_size, place)
    except Stopped:  # all of them
        dist.destroy_process_group()
        raise
    # Not after an error: the other processes are in the middle of something, and closing would wait for them.
    dist.destroy_process_group()
