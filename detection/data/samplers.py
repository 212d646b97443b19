"""A sampler whose batches hold images of one aspect-ratio group."""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from data.samplers import TrainSampler


class GroupedTrainSampler(TrainSampler):
    """A `TrainSampler` whose batches hold images of one group, such as landscape ones, so little padding is needed.

    It differs only in the order of an epoch, which a checkpoint keeps, so an epoch can be resumed as usual. Images that
    do not fill a batch of their group make mixed batches at the end of the epoch.

    Args:
        groups: the group of each image.
        batch_size: images per rank and step; all ranks see the same group in a step.
        rank: this process's rank.
        world_size: number of processes.
        seed: the run's seed.
        repeat_factors: see `TrainSampler`, also for the following.
        virtual_ranks: their number, or 0.
        images_per_epoch: samples of an epoch; 0 takes all.
    """

    def __init__(
        self,
        groups: Sequence[int],
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        repeat_factors: Tensor | None = None,
        virtual_ranks: int = 0,
        images_per_epoch: int = 0,
    ):
        self.groups, self.images_per_step = groups, batch_size * (virtual_ranks or world_size)
        super().__init__(
            len(groups),
            rank,
            world_size,
            seed,
            repeat_factors=repeat_factors,
            virtual_ranks=virtual_ranks,
            images_per_epoch=images_per_epoch,
        )

    def set_epoch(self, epoch: int) -> None:
        """Shuffle for this epoch and start at its beginning."""
        super().set_epoch(epoch)
        order = self.order.tolist()
        # The dropped remainder of an epoch is chosen before grouping, or it would always come from a small group.
        kept = self.length // self.images_per_step * self.images_per_step
        partial_batches: dict[int, list[int]] = {}
        grouped = []
        for index in order[:kept]:
            batch = partial_batches.setdefault(self.groups[index], [])
            batch.append(index)
            if len(batch) == self.images_per_step:
                grouped += batch
                batch.clear()
        mixed = list(chain.from_iterable(partial_batches.values()))
        self.order = torch.tensor(grouped + mixed + order[kept:], dtype=torch.int32)
