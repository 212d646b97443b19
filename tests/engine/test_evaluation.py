"""Evaluation on several processes: exact for every size of dataset, batch and process group."""

import logging

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from config import load_config
from data.samplers import ShardSampler
from engine.distributed import Process
from evaluation import validate
from models import build_model
from tests.helpers.golden import fill_
from tests.helpers.paths import TINY
from tests.helpers.processes import run_ranks
from tests.helpers.runs import CPU, as_samples, build_run

# Shards without an image, of one length and of two, with a last batch that is full, or is not
SIZES, BATCHES = range(1, 11), (1, 2, 3, 5)


def evaluate_grid(rank, folder):
    """Evaluate a network of 7 classes for every number of images and every batch size."""
    torch.set_num_threads(1)
    world_size = dist.get_world_size()
    config = load_config(TINY, ['MODEL.NUM_CLASSES', '7', 'PRINT_FREQ', '1000'])
    model = fill_(build_model(config))
    generator = torch.Generator().manual_seed(0)
    images, targets = torch.randn(10, 3, 28, 28, generator=generator), torch.randint(7, (10,), generator=generator)
    with torch.no_grad():
        targets[::2] = model.eval()(images[::2]).argmax(dim=1)  # so that the accuracy depends on the size
    logger = logging.Logger('silent', logging.CRITICAL)
    run = build_run(config, Process(rank, world_size, CPU), logger)
    polls, grid = torch.zeros(1), {}

    def poll():  # deadlocks unless called equally often in every process
        dist.all_reduce(polls)

    for size in SIZES:
        for batch in BATCHES:
            sampler = ShardSampler(size, rank, world_size)
            loader = DataLoader(as_samples(images[:size], targets[:size]), batch, sampler=sampler)
            grid[size, batch] = tuple(validate(run, model, loader, poll))[:3]
    torch.save(grid, f'{folder}/{world_size}_{rank}.pt')


def test_metrics_equal_those_of_one_process_for_every_size(tmp_path):
    for world_size in (1, 2, 3):
        run_ranks(evaluate_grid, tmp_path, nodes=['node'] * world_size)
    grids = {path.stem: torch.load(path, weights_only=True) for path in tmp_path.glob('*.pt')}
    assert grids.keys() == {f'{world_size}_{rank}' for world_size in (1, 2, 3) for rank in range(world_size)}
    single = {size: grids['1_0'][size, 1] for size in SIZES}
    assert len({acc1 for _, acc1, _ in single.values()}) > 3
    assert any(acc1 != acc5 for _, acc1, acc5 in single.values())
    for grid in grids.values():
        assert grid.keys() == {(size, batch) for size in SIZES for batch in BATCHES}
        for (size, _), (loss, acc1, acc5) in grid.items():
            assert (acc1, acc5) == single[size][1:]
            assert loss == pytest.approx(single[size][0], rel=1e-6)
