"""Samplers: which images each process reads, in which order."""

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, Sampler

# What a training sampler yields and a dataset gets: (epoch, index), or (epoch, index, n) if the epoch has drawn the
# image n times before
SampleKey = tuple[int, ...]


def ranks_of_process(virtual_ranks: int, rank: int, world_size: int) -> range:
    """The ranks whose batches a process computes: its share of the virtual ranks, or its own rank if there are none.

    Args:
        virtual_ranks: their number, which the processes divide; 0 for none.
        rank: the process's rank.
        world_size: number of processes.
    """
    count = virtual_ranks // world_size if virtual_ranks else 1
    return range(rank * count, (rank + 1) * count)


class TrainSampler(Sampler[SampleKey]):
    """Distributed training sampler that can resume within an epoch: every world_size-th sample of a shuffled order.

    By default, as in PyTorch's `DistributedSampler`, the order is a permutation seeded with seed + epoch, and padded
    with its first samples to a multiple of the number of processes. Unlike there, an epoch can start in its middle, on
    any number of processes.

    An epoch has as many samples as there are images, unless `images_per_epoch` says otherwise, also where images are
    drawn several times. With `repeats`, the copies of an image follow one another, so consecutive processes have them,
    as in timm's `RepeatAugSampler`. With `repeat_factors`, an epoch is longer: its length is the sum of the factors,
    rounded down.

    Args:
        images: number of images.
        rank: this process's rank.
        world_size: number of processes.
        seed: the run's seed.
        weights: weight of each image, (length,), to which its probability is proportional: images are drawn with
            replacement. None draws a permutation.
        repeats: number of times in a row that an image is taken.
        repeat_factors: average number of times that an epoch has each image, (length,), at least 1; see `draw_repeats`.
        virtual_ranks: their number, which the processes divide and among which the order is shared; 0 for none.
        images_per_epoch: number of samples of an epoch: the first ones of its order; 0 takes all. Without weights, at
            most `images`.

    Attributes:
        ranks: the ranks whose images this process reads.
        rank: the first of them.
        world_size: number of ranks among which the order is shared: the processes, or the virtual ranks.
        length: samples of an epoch, over all ranks.
    """

    def __init__(
        self,
        images: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        weights: Tensor | None = None,
        repeats: int = 1,
        repeat_factors: Tensor | None = None,
        virtual_ranks: int = 0,
        images_per_epoch: int = 0,
    ):
        self.ranks = ranks_of_process(virtual_ranks, rank, world_size)
        self.virtual_ranks, self.rank, self.world_size = virtual_ranks, self.ranks[0], virtual_ranks or world_size
        self.images, self.seed, self.weights, self.repeats = images, seed, weights, repeats
        self.repeat_factors = repeat_factors
        if repeat_factors is not None:
            # Multiples of a power of two have exact sums, whatever the order, so the length is the same in each epoch.
            self.repeat_factors = (repeat_factors.double() * 2**20).round() / 2**20
        self.length = images_per_epoch or (images if repeat_factors is None else int(self.repeat_factors.sum()))
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle for this epoch and start at its beginning."""
        self.epoch = epoch
        self.start = 0
        generator = torch.Generator().manual_seed(self.seed + epoch)
        if self.repeat_factors is not None:
            order = draw_repeats(self.repeat_factors, generator)
        elif self.weights is None:
            order = torch.randperm(self.images, generator=generator, dtype=torch.int32)
        else:
            draws = torch.multinomial(self.weights, self.length, replacement=True, generator=generator)
            order = draws.to(torch.int32)
        self.order = order[torch.arange(self.length) // self.repeats]

    def state_dict(self) -> dict[str, Any]:
        """The epoch and its order."""
        return {'epoch': self.epoch, 'order': self.order}

    def load_state_dict(self, state: dict[str, Any], start: int) -> None:
        """Resume within an epoch.

        Args:
            state: from `state_dict`.
            start: images seen so far, over all ranks.

        Raises:
            ValueError: the order has another number of images.
        """
        if len(state['order']) != self.length:
            raise ValueError(f'it is within an epoch of {len(state["order"])} images, but there are {self.length} now')
        self.epoch, self.order, self.start = state['epoch'], state['order'], start

    def __iter__(self) -> Iterator[SampleKey]:
        return self.keys_of(self.rank)

    def keys_of(self, rank: int) -> Iterator[SampleKey]:
        """The remaining keys of the epoch of any rank."""
        total = len(self) * self.world_size
        extensions = math.ceil(total / self.length)
        share = slice(self.start + rank, total, self.world_size)
        indices, earlier = (x.repeat(extensions)[share].tolist() for x in (self.order, earlier_draws(self.order)))
        return ((self.epoch, index, n) if n else (self.epoch, index) for index, n in zip(indices, earlier, strict=True))

    def __len__(self) -> int:
        """Number of keys in a whole epoch."""
        return math.ceil(self.length / self.world_size)


class VirtualRankSampler(Sampler[list[SampleKey]]):
    """Full batches of several virtual ranks, in the order in which one process computes them.

    For each update, the batches of the first rank come first, then those of the second one, and so on. Each rank has
    the batches that a process of this rank would have.

    Args:
        sampler: draws the samples of this process's virtual ranks; it may be set to another epoch later.
        batch_size: samples per batch.
        batches_per_update: batches of each rank per update; the last update of an epoch may have fewer.
    """

    def __init__(self, sampler: TrainSampler, batch_size: int, batches_per_update: int):
        self.sampler, self.batch_size, self.batches_per_update = sampler, batch_size, batches_per_update

    def __iter__(self) -> Iterator[list[SampleKey]]:
        ranks = self.sampler.ranks
        batches = [iter(BatchSampler(self.sampler.keys_of(rank), self.batch_size, True)) for rank in ranks]
        while first := list(islice(batches[0], self.batches_per_update)):
            yield from first
            for batches_of_rank in batches[1:]:  # which has as many
                yield from islice(batches_of_rank, self.batches_per_update)

    def __len__(self) -> int:
        """Number of batches in a whole epoch, of all ranks of this process."""
        return len(self.sampler) // self.batch_size * len(self.sampler.ranks)


def draw_repeats(factors: Tensor, generator: torch.Generator) -> Tensor:
    """Draw an epoch's images in random order, each repeated by its factor.

    A factor of 2.3 gives two samples, and a third one with a probability of 0.3. The factors are rounded together
    (systematic sampling), so that the number of samples is the sum of the factors, rounded down or up.

    Args:
        factors: repeat factor of each image, (N,) float64.
        generator: draws the order and the rounding.

    Returns:
        Indices of images, int32, as many as the sum of the factors, or one more.
    """
    images = torch.randperm(len(factors), generator=generator, dtype=torch.int32)
    ends = (factors[images].cumsum(0) + torch.rand((), generator=generator, dtype=torch.float64)).long()
    samples = images.repeat_interleave(ends.diff(prepend=ends.new_zeros(1)))
    return samples[torch.randperm(len(samples), generator=generator)]


def earlier_draws(order: Tensor) -> Tensor:
    """Count how often the image of each draw was drawn earlier in the order: (N,) from image indices (N,)."""
    if order.bincount().max() == 1:  # of a permutation: a tenth of the time of sorting
        return torch.zeros(len(order), dtype=torch.int64)
    images, positions = order.sort(stable=True)
    first = torch.searchsorted(images, images)  # where the draws of an image begin
    return torch.empty_like(positions).scatter_(0, positions, torch.arange(len(order)) - first)


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
