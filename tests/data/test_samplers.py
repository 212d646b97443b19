import math

import pytest
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import BatchSampler

from data.samplers import ShardSampler, TrainSampler, VirtualRankSampler, ranks_of_process


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


def test_repeats_follow_one_another_as_in_timm():
    for world_size in (1, 2, 3):
        for rank in range(world_size):
            sampler = TrainSampler(12, rank, world_size, repeats=3)
            theirs = RepeatAugSampler(range(12), world_size, rank, num_repeats=3)
            for epoch in (0, 2):
                sampler.set_epoch(epoch)
                theirs.set_epoch(epoch)
                assert [key[1] for key in sampler] == list(theirs)
    keys = list(TrainSampler(12, repeats=3))
    assert [key[2:] for key in keys] == [(), (1,), (2,)] * 4  # each copy has its own key, and so its own augmentation


def test_shorter_epochs_begin_like_whole_ones():
    for rank in range(2):
        whole, short = TrainSampler(12, rank, 2, repeats=2), TrainSampler(12, rank, 2, repeats=2, images_per_epoch=6)
        orders = set()
        for epoch in range(3):
            whole.set_epoch(epoch)
            short.set_epoch(epoch)
            assert list(short) == list(whole)[:3]
            assert len(short) == 3
            orders.add(tuple(index for _, index, *_ in short))
        assert len(orders) == 3  # each epoch has other images
    assert len(TrainSampler(12, weights=torch.ones(12).double(), images_per_epoch=5).order) == 5


def test_weights_draw_classes_as_often_as_they_say():
    targets = torch.tensor([0] * 900 + [1] * 100)
    for weights, share in ((torch.tensor([1 / 900, 1 / 100]), 0.5), (torch.tensor([1 / 30, 1 / 10]), 0.25)):
        sampler = TrainSampler(1000, weights=weights[targets].double())
        drawn = []
        for epoch in range(10):
            sampler.set_epoch(epoch)
            drawn += [targets[key[1]].item() for key in sampler]
        assert sum(drawn) / len(drawn) == pytest.approx(share, abs=0.02)


def test_draws_do_not_depend_on_the_ranks_or_on_where_an_epoch_starts():
    weights = torch.rand(24, dtype=torch.float64)
    whole = TrainSampler(24, seed=3, weights=weights, repeats=2)
    keys = list(whole)
    assert len({*keys}) == 24  # no key twice, though images are drawn several times
    assert len({key[1] for key in keys}) < 12
    for world_size in (2, 3):
        samplers = [
            TrainSampler(24, rank, world_size, seed=3, weights=weights, repeats=2) for rank in range(world_size)
        ]
        assert [key for step in zip(*samplers, strict=True) for key in step] == keys
        for sampler in samplers:
            sampler.set_epoch(7)
            sampler.load_state_dict(whole.state_dict(), start=12)
        assert [key for step in zip(*samplers, strict=True) for key in step] == keys[12:]


@pytest.mark.parametrize(('batches_per_update', 'start'), [(1, 0), (2, 0), (2, 16), (5, 0)])
def test_batches_of_virtual_ranks_are_those_of_as_many_processes(batches_per_update, start):
    """Each of four ranks has three batches of two, or one where the epoch begins in its middle."""
    expected = []
    for rank in range(4):
        sampler = TrainSampler(27, rank, 4, seed=3)
        sampler.load_state_dict(sampler.state_dict(), start)
        expected.append(list(BatchSampler(sampler, 2, drop_last=True)))
    assert len(expected[0]) == (1 if start else 3)
    for process, world_size in ((0, 1), (0, 2), (1, 2), (3, 4)):
        ranks = ranks_of_process(4, process, world_size)
        sampler = TrainSampler(27, process, world_size, seed=3, virtual_ranks=4)
        batches = VirtualRankSampler(sampler, 2, batches_per_update)
        assert len(batches) == len(list(batches)) == 3 * len(ranks)
        sampler.load_state_dict(sampler.state_dict(), start)
        in_order = [
            batch
            for first in range(0, len(expected[0]), batches_per_update)
            for rank in ranks
            for batch in expected[rank][first : first + batches_per_update]
        ]
        assert list(batches) == in_order


def test_ranks_of_processes():
    assert [ranks_of_process(8, process, 2) for process in (0, 1)] == [range(4), range(4, 8)]
    assert ranks_of_process(0, 3, 5) == range(3, 4)
