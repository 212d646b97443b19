import math

import pytest
import torch

from data.samplers import ShardSampler, TrainSampler


@pytest.mark.parametrize('world_size', [1, 2, 3, 8])
@pytest.mark.parametrize('length', [0, 1, 5, 17])
def test_shards_hold_every_image_once(length, world_size):
    shards = [ShardSampler(length, rank, world_size) for rank in range(world_size)]
    assert sorted(i for shard in shards for i in shard) == list(range(length))
    assert [len(list(shard)) for shard in shards] == [len(shard) for shard in shards]


@pytest.mark.parametrize('world_size', [1, 2, 3, 5])
@pytest.mark.parametrize('length', [2, 7, 12])
def test_order_equals_distributed_sampler_from_any_start(length, world_size):
    shards = []
    for rank in range(world_size):
        sampler = TrainSampler(length, rank, world_size, seed=4)
        theirs = torch.utils.data.DistributedSampler(range(length), world_size, rank, shuffle=True, seed=4)
        for epoch in (0, 3):
            sampler.set_epoch(epoch)
            theirs.set_epoch(epoch)
            assert [index for _, index in sampler] == list(theirs)
            assert {pair[0] for pair in sampler} == {epoch}
            assert len(sampler) == len(theirs) == len(list(sampler))
        state = sampler.state_dict()
        whole = list(sampler)
        sampler.set_epoch(9)
        for start in range(0, length, world_size):
            sampler.load_state_dict(state, start)
            assert list(sampler) == whole[start // world_size :]
        shards.append(whole)
    assert len({len(shard) for shard in shards}) == 1
    assert {index for shard in shards for _, index in shard} == set(range(length))
    assert math.ceil(length / world_size) == len(shards[0])
