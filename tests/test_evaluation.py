"""Evaluation on several processes: exact for every size of data set, batch and run."""

import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.data import DataLoader, TensorDataset

from config import load_config
from data.samplers import ShardSampler
from launcher import Process
from main import validate
from models import build_model
from precision import build_precision
from tests.conftest import TINY
from tests.helpers.golden import fill_
from trainer import Run

SIZES, BATCHES = range(1, 18), range(1, 7)
CPU = torch.device('cpu')


def evaluate_grid(rank, world_size, rendezvous, results):
    """Evaluate a network of 7 classes on every number of images, in every size of batch."""
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{rendezvous}', rank=rank, world_size=world_size)
    config = load_config(TINY, ['MODEL.NUM_CLASSES', '7', 'PRINT_FREQ', '1000'])
    model = fill_(build_model(config))
    generator = torch.Generator().manual_seed(0)
    images, targets = torch.randn(17, 3, 28, 28, generator=generator), torch.randint(7, (17,), generator=generator)
    logger = logging.Logger('silent', logging.CRITICAL)
    run = Run(config, Process(rank, world_size, CPU), build_precision(config, CPU), Path(), logger)
    polls, grid = torch.zeros(1), {}

    def poll():  # as often in every process, or this deadlocks
        dist.all_reduce(polls)

    for size in SIZES:
        for batch in BATCHES:
            sampler = ShardSampler(size, rank, world_size)
            loader = DataLoader(TensorDataset(images[:size], targets[:size]), batch, sampler=sampler)
            grid[size, batch] = tuple(validate(run, model, loader, poll))
    torch.save(grid, f'{results}/{world_size}_{rank}.pt')
    dist.destroy_process_group()


def test_every_size_of_data_set_batch_and_world_gives_the_figures_of_one_process(tmp_path):
    grids = {}
    for world_size in (1, 2, 3):
        mp.spawn(evaluate_grid, (world_size, tmp_path / f'meet_{world_size}', tmp_path), world_size)
        for rank in range(world_size):
            grids[world_size, rank] = torch.load(tmp_path / f'{world_size}_{rank}.pt', weights_only=True)
    alone = {size: grids[1, 0][size, 1] for size in SIZES}
    assert len({acc1 for _, acc1, _ in alone.values()}) > 3  # they are not all right, or all wrong
    assert any(acc1 != acc5 for _, acc1, acc5 in alone.values())
    for grid in grids.values():
        assert grid.keys() == {(size, batch) for size in SIZES for batch in BATCHES}
        for (size, _), (loss, acc1, acc5) in grid.items():
            assert (acc1, acc5) == alone[size][1:]
            assert loss == pytest.approx(alone[size][0], rel=1e-6)
