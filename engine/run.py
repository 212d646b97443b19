"""A run: its command line, its folder, and the start of its process."""

import argparse
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from torch.utils.data import DataLoader
from tqdm.contrib.logging import logging_redirect_tqdm
from yacs.config import CfgNode

from data.samplers import ranks_of_process
from engine.config_tree import ConfigTree, add_options
from engine.distributed import Process, on_main_process, share_cores, start_process
from engine.precision import ApexPrecision, Precision, build_precision
from engine.run_folder import RunFolder
from engine.run_lock import RunLock
from engine.signals import Stopped, StopRequest
from logger import add_log_file, create_logger
from utils import environment, report_write_errors, set_backend_flags, set_seed


class Run(NamedTuple):
    """A run of this process, from `start_run`.

    Attributes:
        config: the config tree.
        process: this process among those of the run.
        precision: the run's precision.
        folder: `<OUTPUT>/<MODEL.NAME>/<TAG>` with its checkpoints.
        logger: the run's log.
        is_training_run: whether it trains, and so writes checkpoints.
        lock: the right to write to the folder, which rank 0 of a training run holds.
        stop: whether a signal has asked a training run to stop.
        teacher: the network that the run distils from, with its `identity`, from `Task.build_teacher`; None if there
            is none.
    """

    config: CfgNode
    process: Process
    precision: Precision | ApexPrecision
    folder: RunFolder
    logger: logging.Logger
    is_training_run: bool
    lock: RunLock
    stop: StopRequest
    teacher: Any = None

    @property
    def output_dir(self) -> Path:
        """The run's folder."""
        return self.folder.path

    @property
    def plain_config(self) -> dict[str, Any]:
        """The config as checkpoints hold it, in plain containers."""
        return yaml.safe_load(self.config.dump())

    @property
    def accumulation_steps(self) -> int:
        """Batches per update."""
        return max(self.config.TRAIN.ACCUMULATION_STEPS, 1)

    @property
    def rank_count(self) -> int:
        """Number of ranks whose gradients an update averages: the virtual ranks, or the processes if there are none."""
        return self.config.TRAIN.VIRTUAL_RANKS or self.process.world_size

    @property
    def own_ranks(self) -> range:
        """The ranks, of `rank_count`, whose gradients this process computes."""
        return ranks_of_process(self.config.TRAIN.VIRTUAL_RANKS, self.process.rank, self.process.world_size)

    @property
    def images_per_update(self) -> int:
        """Images per update, over all ranks."""
        return self.config.DATA.BATCH_SIZE * self.rank_count * self.accumulation_steps

    def batches_per_rank(self, loader: DataLoader) -> int:
        """Batches per epoch of each rank, of the training loader of this process."""
        return len(loader) // len(self.own_ranks)

    def steps_per_epoch(self, batches: int) -> int:
        """Updates per epoch, in which each rank has this many batches."""
        return math.ceil(batches / self.accumulation_steps)


def run_parser(prog: str, description: str, tree: ConfigTree, example: str) -> argparse.ArgumentParser:
    """A parser of `--cfg`, `--opts` and the flags of a task's keys.

    Args:
        prog: how the program is called: `python main.py`.
        description: the program's description.
        tree: the task's keys.
        example: path of one of its configs.
    """
    parser = argparse.ArgumentParser(prog, description=description, allow_abbrev=False)
    parser.add_argument('--cfg', required=True, metavar='FILE', help=f'YAML config, such as {example}')
    add_options(parser, 'config keys and values, such as TRAIN.EPOCHS 100 SEED 1; may be repeated')
    tree.add_flags(parser)
    return parser


@contextmanager
def start_run(config: CfgNode, is_training_run: bool, compiles: bool = False) -> Iterator[Run]:
    """Start a run in this process: join the process group, set up the log, and log the environment.

    Within the context, a signal lets a training run finish its update and save. Rank 0 of a training run holds the
    lock of the run's folder.

    Args:
        config: the config tree.
        is_training_run: whether the run trains.
        compiles: whether the run compiles its network.

    Raises:
        RunLockError: another process writes to the folder.
        Stopped: a signal came while the run waited for the folder.
    """
    stop = StopRequest()
    # A signal ends a process at once that still waits for the others to connect.
    with start_process(config.DEVICE, config.LOCAL_RANK) as process, stop if is_training_run else nullcontext():
        threads = share_cores(os.environ)
        precision = build_precision(config, process.device, compiles)
        set_backend_flags(config.TF32, config.DETERMINISTIC)
        set_seed(config.SEED + process.rank)
        logger = create_logger(process.rank)
        folder = RunFolder(Path(config.OUTPUT or 'output') / config.MODEL.NAME / config.TAG, config.SAVE_KEEP, logger)
        lock = RunLock(folder.path, logger)
        with report_write_errors(folder.path):
            folder.path.mkdir(parents=True, exist_ok=True)
        run = Run(config, process, precision, folder, logger, is_training_run, lock, stop)
        try:
            add_log_file(logger, folder.path / _enter_folder(run))
            with logging_redirect_tqdm([logger] if process.rank == 0 else []):  # log lines go above a progress bar
                logger.info(' | '.join(f'{name} {value}' for name, value in environment(process.device).items()))
                logger.info(f'{process.world_size} process(es), device {process.device}, {precision}, {threads}')
                if compiles:
                    logger.info('torch.compile: the first batch of training or evaluation takes minutes longer')
                yield run
        finally:
            lock.release()


def _enter_folder(run: Run) -> str:
    """Lock the folder of a training run on rank 0, and name the log file.

    A run that does not train takes no lock. While another run writes to the folder, it writes to a separate log file.
    """
    if run.is_training_run:

        def lock() -> bool:
            with report_write_errors(run.output_dir):
                return run.lock.acquire(run.config.LOCK_WAIT, lambda: run.stop.signal > 0)

        if not on_main_process(lock):
            raise Stopped
        return f'log_rank{run.process.rank}.txt'
    is_live = on_main_process(run.lock.is_held_by_another)
    return f'log_eval_rank{run.process.rank}.txt' if is_live else f'log_rank{run.process.rank}.txt'
