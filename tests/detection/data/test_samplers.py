"""The sampler of aspect-ratio groups."""

import pickle
from itertools import chain

import pytest

from detection.data.samplers import GroupedTrainSampler


def batches_of(sampler, batch_size):
    indices = [index for _, index in sampler]
    return [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]


@pytest.mark.parametrize('world_size', [1, 2])
def test_steps_hold_one_group_and_an_epoch_has_every_image_once(world_size):
    groups = [index % 5 == 0 for index in range(103)]
    samplers = [GroupedTrainSampler(groups, 4, rank, world_size, seed=3) for rank in range(world_size)]
    epochs = []
    for epoch in (0, 1):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        batches = [batches_of(sampler, 4) for sampler in samplers]
        steps = [list(chain(*ranks)) for ranks in zip(*batches, strict=True)][: 103 // (4 * world_size)]
        assert sum(len({groups[index] for index in step}) > 1 for step in steps) <= 1
        first_groups = [groups[step[0]] for step in steps]
        assert len(set(first_groups)) == 2
        assert first_groups != sorted(first_groups)  # neither group comes first
        indices = [index for sampler in samplers for _, index in sampler]
        assert sorted(set(indices)) == list(range(103))
        assert len(indices) <= 103 + world_size - 1
        epochs.append(steps)
    assert epochs[0] != epochs[1]


def test_a_group_smaller_than_a_batch_is_sampled():
    sampler = GroupedTrainSampler([index < 3 for index in range(90)], 16)
    count = 0
    for epoch in range(20):
        sampler.set_epoch(epoch)
        count += sum(index < 3 for batch in batches_of(sampler, 16)[:5] for index in batch)
    assert count > 40  # 60 * 80 / 90 = 53 on average


def test_a_sampler_resumes_within_an_epoch():
    groups = [index % 3 == 0 for index in range(50)]
    sampler = GroupedTrainSampler(groups, 4, seed=1)
    sampler.set_epoch(2)
    whole = list(sampler)
    state = pickle.loads(pickle.dumps(sampler.state_dict()))
    resumed = GroupedTrainSampler(groups, 4, seed=1)
    resumed.load_state_dict(state, start=12)
    assert list(resumed) == whole[12:]
    with pytest.raises(ValueError, match='epoch of 50 images, but there are 49 now'):
        GroupedTrainSampler(groups[:49], 4).load_state_dict(state, start=12)
