"""Virtual ranks: training that has the same bits on any number of processes that divides their number V.

An update of a run with V virtual ranks is the mean of V gradients. Each process computes the gradients of its share of
the virtual ranks, one after the other. All gradients are then added up along one binary tree over the V ranks:

    ((g0 + g1) + (g2 + g3)) + ((g4 + g5) + (g6 + g7))

A process adds up the part of the tree over its own ranks. Between processes, pairs exchange and add their sums. The
order of the additions, and with it every bit of the result, is the same for any number of processes that divides V.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.samplers import ranks_of_process
from engine.config_tree import ConfigError
from engine.distributed import Process, all_reduce_sum, gather_on_main_process, on_main_process
from utils import environment, random_states, set_random_states, set_seed

# Updates after which buffers are no longer compared, which makes the host wait for a GPU; spectral norm needs two
BUFFER_CHECKS = 3

# Entries of `utils.environment` that processes must share for equal bits
_SAME_IN_ALL = ('threads', 'cpu', 'device', 'variables', 'torch')

# Accumulates the gradients of batches in the weights, and returns their total loss and their losses by name
Accumulate = Callable[[Sequence[Any]], tuple[Tensor, dict[str, Tensor]]]


class TreeSum:
    """Sum of 2^n vectors in the order of a binary tree.

    At most n + 1 partial sums are kept in memory.
    """

    def __init__(self) -> None:
        self._partial: list[tuple[int, Tensor]] = []  # number of vectors in a sum, and the sum; largest first

    def add(self, vector: Tensor) -> None:
        """Add the next vector, which is overwritten."""
        count = 1
        while self._partial and self._partial[-1][0] == count:
            vector = self._partial.pop()[1].add_(vector)
            count *= 2
        self._partial.append((count, vector))

    def total(self) -> Tensor:
        """The sum of all vectors, whose number is a power of two."""
        ((_, total),) = self._partial
        return total


def add_over_processes(vector: Tensor, process: Process) -> Tensor:
    """Add the vectors of all processes along a binary tree, in place; every process gets the same bits.

    In each of log2(processes) steps, each process exchanges its sum with one other process. Both add the same two
    vectors, and a + b is b + a to the last bit.

    Args:
        vector: the sum of this process.
        process: this process; the number of processes is a power of two.
    """
    distance = 1
    while distance < process.world_size:
        theirs, partner = torch.empty_like(vector), process.rank ^ distance
        exchange = [dist.P2POp(dist.isend, vector, partner), dist.P2POp(dist.irecv, theirs, partner)]
        for request in dist.batch_isend_irecv(exchange):
            request.wait()
        vector += theirs
        distance *= 2
    return vector


class VirtualRanks:
    """The virtual ranks that this process computes, each with its own random states.

    Args:
        count: number of virtual ranks of the run, a power of two that the number of processes divides.
        process: this process.
        seed: the run's seed; virtual rank v starts with seed + v.

    Attributes:
        random_states: of each virtual rank of this process, in order, from `utils.random_states`.
    """

    def __init__(self, count: int, process: Process, seed: int):
        self.count, self.process = count, process
        self._buffer_checks = BUFFER_CHECKS
        self.random_states: list[dict[str, Any]] = []
        for rank in ranks_of_process(count, process.rank, process.world_size):
            set_seed(seed + rank)
            self.random_states.append(random_states(process.device))

    def restore(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Restore `random_states`; a generator of a device without a saved state keeps its own.

        As with `set_random_states`, invalid states raise an error of any type.
        """
        self.random_states = [{**ours, **theirs} for ours, theirs in zip(self.random_states, states, strict=True)]
        for restored in self.random_states:
            set_random_states(restored, self.process.device)

    def mean_gradient(
        self, network: nn.Module, accumulate: Accumulate, batches: Sequence[Any]
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Leave the mean gradient of all virtual ranks in `grad` of a network's parameters, on every process.

        A parameter that no virtual rank has a gradient of keeps `grad` None, as in a run of one process.

        Args:
            network: has parameters whose `grad` is None.
            accumulate: accumulates the gradients of batches.
            batches: of this update, grouped by virtual rank, the same number for each.

        Returns:
            Means over all virtual ranks, equal on every process: the total loss and the losses by name; and the number
            of virtual ranks whose total loss is not finite. All are scalars on the device.

        Raises:
            ConfigError: the forward pass changes a buffer of the network, or batches have losses of other names.
        """
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        buffers = {name: buffer.clone() for name, buffer in network.named_buffers()} if self._buffer_checks else {}
        names: list[str] = []
        has_gradient = torch.zeros(len(parameters), dtype=torch.int32)  # on the CPU, so that no GPU is waited for
        length, tree = len(batches) // len(self.random_states), TreeSum()
        for index in range(len(self.random_states)):
            with self._random_numbers_of(index):
                loss, losses = accumulate(batches[index * length : (index + 1) * length])
            _check_buffers(network, buffers)
            names = names or sorted(losses)
            if sorted(losses) != names:
                raise ConfigError(
                    f'the losses of one batch are {names}, and of another {sorted(losses)}: return the same'
                )
            has_gradient |= torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32)
            tree.add(_flattened(parameters, [loss, *(losses[name] for name in names), ~loss.isfinite()]))
            for parameter in parameters:
                parameter.grad = None
        self._buffer_checks = max(self._buffer_checks - 1, 0)
        mean = add_over_processes(tree.total(), self.process).div_(self.count)  # exact, as it is a power of two
        all_reduce_sum(has_gradient)
        *gradients, scalars = mean.split([*(parameter.numel() for parameter in parameters), len(names) + 2])
        for parameter, gradient, is_used in zip(parameters, gradients, has_gradient.tolist(), strict=True):
            parameter.grad = _gradient_like(parameter, gradient) if is_used else None
        loss, *values, nonfinite = scalars.clone()  # a view would keep the whole vector
        return loss, dict(zip(names, values, strict=True)), nonfinite * self.count

    @contextmanager
    def _random_numbers_of(self, index: int) -> Iterator[None]:
        """Context in which random numbers are those of one of this process's virtual ranks."""
        set_random_states(self.random_states[index], self.process.device)
        yield
        self.random_states[index] = random_states(self.process.device)


def _flattened(parameters: Sequence[nn.Parameter], scalars: Sequence[Tensor]) -> Tensor:
    """The gradients of parameters, zeros where there is none, followed by scalars, as one fp32 vector."""
    gradients = (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in parameters)
    return torch.cat([tensor.detach().float().reshape(-1) for tensor in (*gradients, *scalars)])


def _gradient_like(parameter: nn.Parameter, flat: Tensor) -> Tensor:
    """A flat gradient in the shape, type and strides of its parameter: fused optimizers read memory, not strides."""
    gradient = flat.view_as(parameter)
    if parameter.is_contiguous() and parameter.dtype == flat.dtype:
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def _check_buffers(network: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Refuse a network whose forward pass changes its buffers, such as running statistics or those of spectral norm.

    Raises:
        ConfigError: a buffer has changed.
    """
    for name, buffer in network.named_buffers() if before else ():
        if not torch.equal(buffer, before[name]):
            raise ConfigError(
                f'TRAIN.VIRTUAL_RANKS does not work with this network: training changes its buffer {name}, whose '
                f'values would depend on the number of processes. Write TRAIN.VIRTUAL_RANKS 0'
            )


def check_processes(count: int, process: Process) -> None:
    """Refuse processes that cannot compute a run of virtual ranks with the same bits as one process.

    Args:
        count: number of virtual ranks.
        process: this process; every process calls it at the same point.

    Raises:
        ConfigError: the processes cannot share the virtual ranks equally, or compute differently: with other numbers of
            threads, instructions, devices, variables or versions of PyTorch.
    """
    if count % process.world_size:
        possible = ', '.join(str(2**i) for i in range(count.bit_length()))
        raise ConfigError(
            f'TRAIN.VIRTUAL_RANKS is {count}, which {process.world_size} processes cannot share equally: start '
            f'{possible} processes, or write another number of virtual ranks'
        )
    ours = environment(process.device)
    gathered = gather_on_main_process([ours[key] for key in _SAME_IN_ALL])

    def check() -> None:
        for key, values in zip(_SAME_IN_ALL, zip(*gathered, strict=True), strict=True):
            if len({*values}) > 1:
                raise ConfigError(
                    f'the processes differ in {key} ({", ".join(sorted({*values}))}), and with TRAIN.VIRTUAL_RANKS all '
                    f'must be equal, since it changes the last bits of sums: set the same on every node '
                    f'(threads: OMP_NUM_THREADS)'
                )

    on_main_process(check)


def check_network(network: nn.Module) -> None:
    """Refuse a network in training mode whose norms keep statistics of the batches that a process has seen.

    Raises:
        ConfigError: it has such norms, like batch norms that are not frozen.
    """
    for name, module in network.named_modules():
        if module.training and getattr(module, 'num_batches_tracked', None) is not None:
            raise ConfigError(
                f'TRAIN.VIRTUAL_RANKS does not work with batch norms that are trained, and the network has some, such '
                f'as {name}: their running statistics would depend on the number of processes. Write '
                f'TRAIN.VIRTUAL_RANKS 0, or choose a network with other norms'
            )


def broadcast_weights(network: nn.Module) -> None:
    """Give every process the parameters and buffers of rank 0, as DDP does when it wraps a network."""
    if not dist.is_initialized():
        return
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            contiguous = tensor.contiguous()
            dist.broadcast(contiguous, 0)
            if contiguous.data_ptr() != tensor.data_ptr():
                tensor.copy_(contiguous)
