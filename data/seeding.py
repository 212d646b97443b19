"""Augmentation seeded by (seed, epoch, index) instead of by process and order."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from data.samplers import SampleKey


@contextmanager
def restored_states() -> Iterator[None]:
    """Context after which the random states of the CPU are restored."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Context that seeds the CPU's random generators from numbers (>= 0), and restores their states afterwards."""
    with restored_states():
        _seed(entropy)
        yield


def _seed(entropy: Sequence[int]) -> None:
    for_python, for_numpy, for_torch = map(int, np.random.SeedSequence(entropy).generate_state(3))
    random.seed(for_python)
    np.random.seed(for_numpy)
    torch.default_generator.manual_seed(for_torch)


class SeededDataset(Dataset):
    """A dataset whose random augmentation is a function of (seed, epoch, index), in whichever process.

    Neither the number of DataLoader workers nor an interruption of the run changes what the network sees. An image that
    an epoch draws several times is augmented differently each time.

    Args:
        dataset: indexed by sample.
        seed: the run's seed.
    """

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, key: SampleKey) -> Any:
        """The sample of a key of `TrainSampler`."""
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[SampleKey]) -> list[Any]:
        """The samples of a batch. States are restored once: copying NumPy's takes several times as long as seeding."""
        samples = []
        with restored_states():
            for key in keys:
                _seed((self.seed, *key))
                samples.append(self.dataset[key[1]])
        return samples

    def __len__(self) -> int:
        return len(self.dataset)
