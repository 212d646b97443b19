"""Distributed training: launchers, devices, the process group, collectives, DDP."""

import os
import pickle
import platform
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from engine.config_tree import ConfigError
from engine.signals import Stopped
from utils import UserError, available_cores, first_line, host_id

# Set by torchrun and torch.distributed.launch for each process.
TORCHRUN_VARIABLES = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')

# Set by srun for each process; MASTER_ADDR and MASTER_PORT may be set too.
SLURM_VARIABLES = ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID', 'SLURM_JOB_NODELIST', 'SLURM_JOB_ID')

# SLURM's own steps, which are the shells of salloc and sbatch, have numbers from here on.
_SPECIAL_STEPS = 0xFFFFFFF0

# Timeout of collectives, for a process that does not answer; docs/launching.md states it.
TIMEOUT = timedelta(minutes=30)

# Many times what Gloo's threads need, in case the processors are busy; see `_leave_process_group`.
_SECONDS_TO_FREE_TENSORS = 0.1

Result = TypeVar('Result')


class Process(NamedTuple):
    """This process among those of the run."""

    rank: int
    world_size: int
    device: torch.device


class Launch(NamedTuple):
    """Rank, world size and rendezvous address of this process, as its launcher sets them.

    Attributes:
        launcher: 'torchrun' or 'srun'.
        rank, world_size: this process's rank among the run's processes, and their number.
        local_rank: rank on this node.
        master_addr, master_port: address at which rank 0 listens.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: int


def read_launcher(variables: Mapping[str, str]) -> Launch | None:
    """Read the environment variables of torchrun or, without torchrun, of srun; None without a launcher.

    Args:
        variables: the environment.

    Raises:
        ConfigError: variables are missing or invalid.
    """
    variables = {name: value for name, value in variables.items() if value}  # empty is as good as not set
    if 'RANK' in variables or 'WORLD_SIZE' in variables:
        launcher = 'torchrun'
        rank, world_size, local_rank, address, port = _read(variables, TORCHRUN_VARIABLES, launcher)
    elif _is_slurm_task(variables):
        launcher = 'srun'
        fallbacks = {
            'SLURM_JOB_NODELIST': variables.get('MASTER_ADDR', variables.get('SLURM_NODELIST')),
            'SLURM_JOB_ID': variables.get('MASTER_PORT'),
        }
        rank, world_size, local_rank, nodes, job = _read({**fallbacks, **variables}, SLURM_VARIABLES, launcher)
        world_size = variables.get('SLURM_STEP_NUM_TASKS', world_size)  # a step may use part of its job
        address = variables.get('MASTER_ADDR') or first_host(variables.get('SLURM_STEP_NODELIST', nodes))
        step = _digits(variables.get('SLURM_STEP_ID', ''))
        # One per job, and one per step of a job
        port = variables.get('MASTER_PORT', 20_000 + (_digits(job) + 7919 * step) % 20_000)
    else:
        return None
    try:
        launch = Launch(launcher, int(rank), int(world_size), int(local_rank), address, int(port))
    except ValueError as error:
        raise ConfigError(
            f'a variable of the launcher is not a number: rank {rank} of {world_size}, local rank {local_rank}, '
            f'MASTER_PORT {port}: start with {launcher}, or unset them'
        ) from error
    if not 0 < launch.master_port < 2**16:
        raise ConfigError(f'MASTER_PORT is {port}: write a port from 1 to 65535')
    if not 0 <= launch.rank < launch.world_size:
        raise ConfigError(f'the launcher says rank {rank} of {world_size} processes: ranks start at 0')
    if launch.local_rank < 0:
        raise ConfigError(f'the launcher says local rank {local_rank}: local ranks start at 0')
    return launch


def _read(variables: Mapping[str, str], names: tuple[str, ...], launcher: str) -> list[str]:
    missing = [name for name in names if not variables.get(name)]
    if missing:
        present = next(name for name in names if variables.get(name))
        raise ConfigError(
            f'{present} is set but {", ".join(missing)} is not: start with {launcher}, or unset {present}'
        )
    return [variables[name] for name in names]


def _is_slurm_task(variables: Mapping[str, str]) -> bool:
    """Whether srun started this process.

    A batch script and the shell of salloc have most of srun's variables, but are not tasks of a step with a number.
    """
    step = variables.get('SLURM_STEP_ID')
    is_shell = variables.get('ENVIRONMENT') == 'BATCH' if step is None else _digits(step) >= _SPECIAL_STEPS
    return 'SLURM_PROCID' in variables and not is_shell


def _digits(text: str) -> int:
    """The digits of a text as a number, 0 if there are none."""
    return int(re.sub(r'[^0-9]', '', text)[:20] or 0)


def first_host(nodes: str) -> str:
    """The first host in SLURM's notation, such as `gpu[003-007,9],login`."""
    first = re.match(r'(?:[^\[,]|\[[^\]]*\])*', nodes)[0]  # up to a comma outside brackets
    return re.sub(r'\[(\w+)[^\]]*\]', r'\1', first)


def choose_device(name: str, launch: Launch | None = None, local_rank: int = 0) -> torch.device:
    """The device of this process.

    Args:
        name: auto, cuda, mps or cpu.
        launch: from `read_launcher`.
        local_rank: GPU to use without a launcher.

    Raises:
        ConfigError: the device is not available.
    """
    if name == 'auto':
        several = launch is not None and launch.world_size > 1
        mps = torch.backends.mps.is_available() and not several
        name = 'cuda' if torch.cuda.is_available() else 'mps' if mps else 'cpu'
    if name == 'mps':
        if not torch.backends.mps.is_available():
            raise ConfigError('DEVICE is mps, but PyTorch finds no Apple GPU: write --device cpu')
        if launch is not None and launch.world_size > 1:
            raise ConfigError('several processes cannot share an Apple GPU: start one, or write --device cpu')
    if name != 'cuda':
        return torch.device(name)
    index = launch.local_rank if launch else local_rank
    count = torch.cuda.device_count()
    if count == 0:
        raise ConfigError('DEVICE is cuda, but PyTorch finds no GPU: write --device cpu, or check the driver')
    if launch and launch.launcher == 'srun' and count == 1:
        index = 0  # SLURM may show each task only the GPU bound to it
    if index >= count:
        raise ConfigError(
            f'local rank {index} has no GPU: {count} are visible: start fewer processes per node, or write --device cpu'
        )
    return torch.device('cuda', index)


def local_world_size(launch: Launch | None, variables: Mapping[str, str]) -> int:
    """Number of this run's processes on this node, according to its launcher."""
    if launch is None:
        return 1
    if launch.launcher == 'torchrun':
        return _digits(variables.get('LOCAL_WORLD_SIZE', '')) or launch.world_size
    tasks = variables.get('SLURM_STEP_TASKS_PER_NODE') or variables.get('SLURM_TASKS_PER_NODE', '1')  # 8(x2),4
    return max(map(int, re.findall(r'(?:^|,)([0-9]{1,9})', tasks)), default=1)


def share_cores(variables: Mapping[str, str]) -> str:
    """Share the cores among the processes of a node, unless OMP_NUM_THREADS says how many threads each uses.

    The number depends on cores and processes only: the number of threads changes the last bits of sums.

    Args:
        variables: the environment.

    Returns:
        How many threads this process uses, and why.
    """
    if variables.get('OMP_NUM_THREADS'):
        return f'{torch.get_num_threads()} thread(s): OMP_NUM_THREADS'
    if re.fullmatch('0*[1-9][0-9]{0,5}', per_task := variables.get('SLURM_CPUS_PER_TASK', '')):
        torch.set_num_threads(int(per_task))
        return f'{per_task} thread(s): SLURM_CPUS_PER_TASK'
    cores = available_cores()
    processes = local_world_size(read_launcher(variables), variables)
    if processes > 1:
        torch.set_num_threads(max(cores // processes, 1))
    return f'{torch.get_num_threads()} thread(s): {cores} core(s) for {processes} process(es)'


@contextmanager
def start_process(device_name: str, local_rank: int) -> Iterator[Process]:
    """Join the process group that the launcher describes, or run as a single process without one.

    A process that is already in a process group, since it does several runs, stays in it.

    Args:
        device_name: auto, cuda, mps or cpu.
        local_rank: GPU to use without a launcher.

    Raises:
        ConfigError: the device is not available, or the processes cannot connect.
    """
    launch = read_launcher(os.environ)
    device = choose_device(device_name, launch, local_rank)
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    if dist.is_initialized():
        yield Process(dist.get_rank(), dist.get_world_size(), device)
        return
    # A single srun task may be a shell with several runs; an Apple GPU has one process, and no collectives.
    if launch is None or device.type == 'mps' or (launch.launcher == 'srun' and launch.world_size == 1):
        yield Process(0, 1, device)
        return
    if launch.launcher == 'srun' and launch.rank == 0:  # whose variables a shell may have inherited
        print(
            f'srun: waiting for {launch.world_size} processes at {launch.master_addr}:{launch.master_port}', flush=True
        )
    # Gloo exchanges everything except gradients between CPUs, so that the host need not wait for the GPU.
    backend = 'cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo'
    try:
        dist.init_process_group(
            backend,
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=TIMEOUT,
            **_rendezvous(launch, os.environ),
        )
    except (dist.DistError, ValueError) as error:
        reason = 'the port is in use' if 'EADDRINUSE' in str(error) else first_line(error)
        raise ConfigError(
            f'the processes cannot connect at {launch.master_addr}:{launch.master_port} ({reason}): set MASTER_ADDR to '
            f'the host of rank 0, and MASTER_PORT to a free port there'
        ) from error
    with _report_lost_process():
        try:
            yield Process(launch.rank, launch.world_size, device)
        except Stopped:  # in every process
            _leave_process_group()
            raise
        # Not after an error: the other processes are busy, and destroying the group would wait for them.
        _leave_process_group()


def _leave_process_group() -> None:
    """Destroy the process group; every process calls this at the same point.

    Avoids a deadlock: Gloo's threads need the GIL to free the tensors of the last collectives. DDP's destructor frees
    the group and, to do so, waits for these threads without releasing the GIL
    (https://github.com/pytorch/pytorch/issues/56297). If a thread still had a tensor to free, this process would wait
    forever. After the barrier, all collectives have ended. Then `sleep` releases the GIL, and the threads need less
    than a millisecond to free their tensors.
    """
    dist.barrier()
    time.sleep(_SECONDS_TO_FREE_TENSORS)
    dist.destroy_process_group()


@contextmanager
def _report_lost_process() -> Iterator[None]:
    """Turn the error of a collective whose other process has died into a `UserError`: that process says why."""
    try:
        yield
    except RuntimeError as error:
        if re.search('gloo.*(closed by peer|reset by peer|Broken pipe)', first_line(error)):
            raise UserError('another process of this run has ended: its own message says why') from error
        raise


def _rendezvous(launch: Launch, variables: Mapping[str, str]) -> dict[str, Any]:
    """Options of `init_process_group` that say where the processes connect."""
    if launch.launcher == 'srun':
        return {'init_method': f'tcp://{launch.master_addr}:{launch.master_port}'}
    on_one_node = variables.get('LOCAL_WORLD_SIZE') == variables['WORLD_SIZE']
    if on_one_node and variables.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':
        # After a restart, torchrun's store still holds the addresses of the previous ranks (PyTorch 2.11), and a rank
        # that reads another's too early fails. Nodes count restarts separately: see docs/launching.md.
        store = dist.TCPStore(launch.master_addr, launch.master_port, is_master=False)
        return {'store': dist.PrefixStore(f'restart_{variables.get("TORCHELASTIC_RESTART_COUNT", 0)}', store)}
    return {'init_method': 'env://'}


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def running_statistics(model: nn.Module) -> list[Tensor]:
    """The running means and variances of batch norms in training mode, which differ between processes."""
    kinds = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
    norms = [module for module in model.modules() if isinstance(module, kinds) and module.training]
    return [x for norm in norms for x in (norm.running_mean, norm.running_var) if x is not None]


def average_over_processes(tensors: Sequence[Tensor]) -> None:
    """Average tensors over all processes, in place, with a single collective."""
    if not tensors or not dist.is_initialized():
        return
    means = all_reduce_sum(torch.cat([x.flatten() for x in tensors])) / dist.get_world_size()
    for x, mean in zip(tensors, means.split([x.numel() for x in tensors]), strict=True):
        x.copy_(mean.view_as(x))


def on_main_process(function: Callable[[], Result]) -> Result:
    """Call a function on rank 0 only; every process gets its result, or the `UserError` it raises."""
    result, user_error = None, None
    if not dist.is_initialized() or dist.get_rank() == 0:
        result, user_error = _call(function)
    if dist.is_initialized():
        outcome = [result, user_error]
        dist.broadcast_object_list(outcome)
        result, user_error = outcome
    if user_error is not None:
        raise user_error
    return result


def once_per_node(function: Callable[[], Result]) -> Result:
    """Call a function on one process of each node; all of its processes get the result, or any node's `UserError`.

    The result is pickled for the others, so it may refer to memory that only processes of the node can map.
    """
    if not dist.is_initialized():
        return function()
    node = node_name()
    leader = _gather(node).index(node)
    result, user_error, pickled = None, None, None
    if dist.get_rank() == leader:
        result, user_error = _call(function)
        pickled = pickle.dumps(result)
    results, errors = zip(*_gather((pickled, user_error)), strict=True)
    if any(errors):
        raise next(filter(None, errors))
    if dist.get_rank() != leader:
        result = pickle.loads(results[leader])
    all_reduce_sum(torch.zeros(1))  # a barrier: all processes have mapped the memory
    return result


def node_name() -> str:
    """Identify the processes that can map each other's memory: those of one kernel, in the same container."""
    # On systems other than Linux, each process counts as a node
    return host_id() if Path('/proc/self/ns/pid').exists() else f'{platform.node()} {os.getpid()}'


def _call(function: Callable[[], Result]) -> tuple[Result | None, UserError | None]:
    """A function's result, or the `UserError` it raises."""
    try:
        return function(), None
    except UserError as error:
        return None, error


def _gather(value: Any) -> list[Any]:
    """Every process's value, in rank order, on every process."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_on_main_process(value: Any) -> list[Any] | None:
    """Every process's value on rank 0, in rank order; None on the others."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values)
    return values


def distribute(model: nn.Module, device: torch.device, deterministic: bool = False) -> nn.Module:
    """Wrap a network in DDP where there are several processes.

    Args:
        model: the network, on the device.
        device: this process's device.
        deterministic: reduce gradients in the same order in every update, as always on CPUs. Otherwise DDP rebuilds its
            buckets after the first update, which on more than two processes changes the last bits of a resumed run.
            The option that prevents this searches for unused parameters, and warns once that there are none.
    """
    if not dist.is_initialized():
        return model
    # With a single head, strides along the dimension of size 1 of the bias gradient differ, which is harmless.
    warnings.filterwarnings('ignore', 'Grad strides do not match bucket view strides', UserWarning)
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == 'cuda' else None,
        broadcast_buffers=False,
        find_unused_parameters=deterministic or device.type == 'cpu',
        gradient_as_bucket_view=True,  # no second copy of the gradients
    )


def synchronize_gradients(network: nn.Module, enabled: bool) -> AbstractContextManager:
    """Context of a backward pass that averages gradients over the processes, or leaves that to a later one."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) and not enabled else nullcontext()
