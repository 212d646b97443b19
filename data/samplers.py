"""Samplers: which images each process reads, in which order."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler


class TrainSampler(Sampler[tuple[int, int]]):
    """An epoch's (epoch, index) pairs of one process: every world_size-th of one shuffled order, from `rank` on.

    As in PyTorch's `DistributedSampler`, the order is the permutation of seed + epoch, extended by its start until the
    processes divide it. Unlike there, an epoch can start in its middle, on any number of processes.

    Args:
        length: number of images.
        rank: this process's rank.
        world_size: number of processes.
        seed: the run's seed.
    """

    def __init__(self, length: int, rank: int = 0, world_size: int = 1, seed: int = 0):
        self.length, self.rank, self.world_size, self.seed = length, rank, world_size, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle for this epoch and start at its beginning."""
        self.epoch = epoch
        self.start = 0
        generator = torch.Generator().manual_seed(self.seed + epoch)
        self.order = torch.randperm(self.length, generator=generator, dtype=torch.int32)

    def state_dict(self) -> dict[str, Any]:
        """The epoch and its order."""
        return {'epoch': self.epoch, 'order': self.order}

    def load_state_dict(self, state: dict[str, Any], start: int) -> None:
        """Resume within an epoch.

        Args:
            state: from `state_dict`.
            start: images seen so far, over all processes.

        Raises:
            ValueError: the order has another number of images.
        """
        if len(state['order']) != self.length:
            raise ValueError(f'it is within an epoch of {len(state["order"])} images, but there are {self.length} now')
        self.epoch, self.order, self.start = state['epoch'], state['order'], start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        total = len(self) * self.world_size
        repeats = math.ceil(total / self.length)
        order = self.order.repeat(repeats)[self.start + self.rank : total : self.world_size]
        return ((self.epoch, index) for index in order.tolist())

    def __len__(self) -> int:
        """Number of pairs in a whole epoch."""
        return math.ceil(self.length / self.world_size)


class ShardSampler(Sampler[int]):
    """Every world_size-th index from `rank` on: together, processes see each image exactly once.

    Shards may differ in size or be empty; unlike in `DistributedSampler`, nothing is padded.

    Args:
        length: number of images.
        rank: this process's rank.
        world_size: number of processes.
    """

    def __init__(self, length: int, rank: int, world_size: int):
        self.indices = range(rank, length, world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)
