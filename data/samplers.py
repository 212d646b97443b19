"""Which images each process reads."""

from collections.abc import Iterator

from torch.utils.data import Sampler


class ShardSampler(Sampler[int]):
    """Every world_size-th index from `rank` on, so that all processes together see each image exactly once.

    Shards may differ in size or be empty: nothing is padded, unlike `DistributedSampler`.

    Args:
        length: images in the data set.
        rank: of this process.
        world_size: processes.
    """

    def __init__(self, length: int, rank: int, world_size: int):
        self.indices = range(rank, length, world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)
