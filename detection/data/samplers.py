"""Which images make a batch."""

from collections.abc import Sequence
from itertools import chain

import torch

from data.samplers import TrainSampler


class GroupedTrainSampler(TrainSampler):
    """A `TrainSampler` whose batches hold images of one group, such as wide ones, so that little padding is needed.

    Only the order of an epoch differs, and that is what a checkpoint keeps: an epoch continues in its middle as ever.
    What does not fill a batch of its group makes mixed batches, at the end of the epoch.

    Args:
        groups: the group of each image.
        batch_size: images a process and step.
        rank: of this process.
        world_size: processes; all of them see the same group in a step.
        seed: of the run.
    """

    def __init__(self, groups: Sequence[int], batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0):
        self.groups, self.images_per_step = groups, batch_size * world_size
        super().__init__(len(groups), rank, world_size, seed)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle for this epoch, which starts at its beginning."""
        super().set_epoch(epoch)
        order = self.order.tolist()
        # What an epoch leaves out is chosen before grouping, or it would be a small group, each time.
        kept = self.length // self.images_per_step * self.images_per_step
        filling: dict[int, list[int]] = {}
        grouped = []
        for index in order[:kept]:
            batch = filling.setdefault(self.groups[index], [])
            batch.append(index)
            if len(batch) == self.images_per_step:
                grouped += batch
                batch.clear()
        mixed = list(chain.from_iterable(filling.values()))
        self.order = torch.tensor(grouped + mixed + order[kept:], dtype=torch.int32)
