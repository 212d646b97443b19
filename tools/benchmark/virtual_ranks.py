"""Measure the time per update with virtual ranks and with DDP, for the same processes, network and images per update.

    python -m tools.make_digits --output output/digits
    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 -m tools.benchmark.virtual_ranks \
        --cfg configs/study_nano_p2_win7_56.yaml --data-path output/digits \
        --opts TRAIN.VIRTUAL_RANKS 4 DATA.BATCH_SIZE 8 AMP_OPT_LEVEL O0

The run with DDP accumulates as many batches of the same size as a process computes with virtual ranks. Both train the
network in turns, so that other work on the machine slows both down. Loading is not timed. The bytes are those
of the gradients that a process sends, by the algorithms: a ring all-reduce for DDP, and pairwise exchanges.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import math
from itertools import islice

from yacs.config import CfgNode

from config import get_config
from engine.config_tree import ConfigError
from engine.distributed import on_main_process
from engine.run import Run, run_parser, start_run
from engine.run_task import build_network, build_trainer
from engine.start import find_start
from engine.virtual_ranks import check_processes
from main import TASK
from tools.benchmark.timing import Quartiles, time_interleaved
from utils import exit_on_user_error

ROUNDS = 10


class TimedRun:
    """Training steps of a config on the first batches of its loader.

    Args:
        run: the run, whose config is replaced.
        config: the config to train with.
    """

    def __init__(self, run: Run, config: CfgNode):
        run = run._replace(config=config)
        loader, eval_loader = TASK.build_loaders(config, run.process.rank, run.process.world_size)
        self.count = run.accumulation_steps * len(run.own_ranks)
        self.batches = list(islice(loader, self.count))
        if len(self.batches) < self.count:
            raise ConfigError(f'an update has {self.count} batches, and the data {len(self.batches)}: give more images')
        network, start = build_network(run, TASK), find_start(run, TASK.tree)
        self.trainer = build_trainer(run, TASK, network, start, TASK.phases(config, loader), eval_loader, {})
        self.trainer.network.train()
        self.images, self.pending = run.images_per_update, None

    @property
    def megabytes(self) -> float:
        """Size of the gradients, in fp32."""
        return sum(p.numel() for p in self.trainer.state.model.parameters() if p.requires_grad) * 4 / 1e6

    def step(self) -> None:
        """Make one update."""
        self.pending = self.trainer.train_step(self.batches, self.pending)


def with_ddp(config: CfgNode, processes: int) -> CfgNode:
    """The config with DDP instead of virtual ranks, and as many images per update."""
    train = config.TRAIN
    config = config.clone()
    config.defrost()
    config.TRAIN.ACCUMULATION_STEPS = max(train.ACCUMULATION_STEPS, 1) * train.VIRTUAL_RANKS // processes
    config.TRAIN.VIRTUAL_RANKS = 0
    config.freeze()
    return config


def main() -> None:
    """Train with both in turns, and print a table on rank 0."""
    parser = run_parser(
        'python -m tools.benchmark.virtual_ranks',
        __doc__.splitlines()[0],
        TASK.tree,
        example='configs/study_nano_p2_win7_56.yaml',
    )
    config = get_config(parser.parse_args())
    count = config.TRAIN.VIRTUAL_RANKS
    if not count:
        raise ConfigError('there are no virtual ranks to time: write --opts TRAIN.VIRTUAL_RANKS 4')
    with start_run(config, is_training_run=False) as run:
        check_processes(count, run.process)
        processes = run.process.world_size
        runs = {
            'DDP': TimedRun(run, with_ddp(config, processes)),
            f'{count} virtual ranks': TimedRun(run, config),
        }
        for timed in runs.values():
            timed.step()
        times = time_interleaved({name: timed.step for name, timed in runs.items()}, ROUNDS, run.process.device, 0.5)
        sent = [2 * (processes - 1) / processes, math.log2(processes)]  # of the gradients, by each process
        lines = [
            f'| {name} | {processes} | {timed.images} | {1e3 * Quartiles.from_values(times[name]).median:.0f} | '
            f'{Quartiles.of_ratios(times[name], times["DDP"]):.2f} | {factor * timed.megabytes:.1f} |'
            for (name, timed), factor in zip(runs.items(), sent, strict=True)
        ]
        header = '| | processes | images per update | ms per update | x DDP | MB sent per process and update |'
        on_main_process(lambda: print('\n'.join([header, '|---|---|---|---|---|---|', *lines])))


if __name__ == '__main__':
    with exit_on_user_error():
        main()
