import random

import numpy as np
import pytest
import torch

from data import build_loaders
from data.seeding import SeededDataset, seeded
from tests.helpers.runs import CPU, is_identical
from utils import random_states, set_random_states


@pytest.mark.parametrize('pipeline', ['fast', 'published'])
@pytest.mark.parametrize('workers', ['1', '3'])
def test_batches_do_not_depend_on_the_number_of_loader_processes(tiny_config, image_tree, workers, pipeline):
    def batches(**options):
        loader, _ = build_loaders(tiny_config(DATA__DATA_PATH=str(image_tree), DATA__PIPELINE=pipeline, **options))
        collected = []
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            collected += list(loader)
        return collected

    torch.manual_seed(1)
    np.random.seed(1)
    plain = batches()
    before = random_states(CPU)
    assert is_identical(plain, batches(DATA__NUM_WORKERS=workers))
    assert is_identical(before, random_states(CPU))  # nor do they draw from the process's own random numbers
    assert not is_identical(plain, batches(SEED='1'))
    first, second = (torch.cat([batch.image for batch in epoch]).sum((1, 2, 3)) for epoch in (plain[:6], plain[6:]))
    assert not torch.equal(first.sort()[0], second.sort()[0])  # an image is augmented differently in each epoch


def test_seeded_numbers_depend_only_on_their_seeds():
    def draw(*entropy):
        with seeded(*entropy):
            return random_states(CPU)

    before = random_states(CPU)
    assert is_identical(draw(1, 2, 3), draw(1, 2, 3))
    assert is_identical(before, random_states(CPU))  # as if nothing had been drawn
    for other in ((1, 3, 2), (2, 2, 3), (1, 2, 4), (1, 2)):
        assert not is_identical(draw(1, 2, 3), draw(*other))


def test_seeded_numbers_are_those_of_earlier_versions():
    """A run of an earlier version resumes to the bit."""
    with seeded(1, 2, 3):
        drawn = random.random(), np.random.rand(), torch.rand(1).item()
    assert drawn == (0.17754431735171294, 0.9633871940611571, 0.5354775786399841)


class Draws:
    """A dataset of random numbers."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return index, random.random(), np.random.standard_normal(), torch.rand(1).item()


def test_samples_of_a_batch_do_not_depend_on_one_another():
    dataset, expected = SeededDataset(Draws(), seed=3), []
    assert len(dataset) == 5
    for index in (4, 1, 1):
        with seeded(3, 7, index):
            expected.append(Draws()[index])
    before = random_states(CPU)
    assert dataset.__getitems__([(7, 4), (7, 1), (7, 1)]) == expected == [dataset[7, index] for index in (4, 1, 1)]
    assert is_identical(before, random_states(CPU))
    copies = dataset.__getitems__([(7, 1), (7, 1, 1), (7, 1, 2)])  # an image that the epoch draws three times
    assert copies[0] == expected[1]
    assert len({copy[1:] for copy in copies}) == 3


def test_random_states_round_trip():
    states = random_states(CPU)
    drawn = [torch.rand(3), torch.from_numpy(np.random.rand(3))]
    np.random.standard_normal()  # of a pair, whose other half is kept
    middle = random_states(CPU)
    after = np.random.standard_normal(3).tolist()
    set_random_states(states, CPU)
    assert is_identical(drawn, [torch.rand(3), torch.from_numpy(np.random.rand(3))])
    set_random_states(middle, CPU)
    assert np.random.standard_normal(3).tolist() == after
