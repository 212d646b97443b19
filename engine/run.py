"""A run: its flags, its start, the checkpoint it starts from, and how it resumes."""

import argparse
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from tqdm.contrib.logging import logging_redirect_tqdm
from yacs.config import CfgNode

from engine.checkpoint import CheckpointError, CheckpointFolder, load_checkpoint, load_weights
from engine.config_tree import ConfigTree
from engine.distributed import Process, distribute, on_main_process, start_process
from engine.precision import ApexPrecision, Precision, build_precision
from engine.state import TrainingState
from logger import create_logger
from utils import environment, set_backend_flags, set_seed


class Run(NamedTuple):
    """Config, process, precision, folder (`<OUTPUT>/<MODEL.NAME>/<TAG>`) and logger of a run."""

    config: CfgNode
    process: Process
    precision: Precision | ApexPrecision
    output_dir: Path
    logger: logging.Logger

    @property
    def accumulation_steps(self) -> int:
        """Batches per update."""
        return max(self.config.TRAIN.ACCUMULATION_STEPS, 1)

    @property
    def images_per_update(self) -> int:
        """Images per update, over all processes."""
        return self.config.DATA.BATCH_SIZE * self.process.world_size * self.accumulation_steps

    def maybe_compile(self, network: nn.Module, enabled: bool) -> nn.Module:
        """The network under torch.compile, if enabled: compiled at the first batch of each shape."""
        return torch.compile(network, mode=self.config.COMPILE_MODE, dynamic=False) if enabled else network


def run_parser(description: str, tree: ConfigTree, example: str) -> argparse.ArgumentParser:
    """A parser of `--cfg`, `--opts` and the flags of a task's keys.

    Args:
        description: the program's description.
        tree: the task's keys.
        example: path of one of its configs.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument('--cfg', required=True, metavar='FILE', help=f'YAML config, such as {example}')
    parser.add_argument(
        '--opts',
        nargs='+',
        action='extend',
        metavar='KEY VALUE',
        help='config keys and values, such as TRAIN.EPOCHS 100 SEED 1; may be repeated',
    )
    tree.add_flags(parser)
    return parser


@contextmanager
def start_run(config: CfgNode, compiles: bool = False) -> Iterator[Run]:
    """Start this process of the config's run; its environment is logged.

    Args:
        config: the config tree.
        compiles: whether the run compiles its network.
    """
    with start_process(config.DEVICE, config.LOCAL_RANK) as process:
        precision = build_precision(config, process.device, compiles)
        set_backend_flags(config.TF32, config.DETERMINISTIC)
        set_seed(config.SEED + process.rank)
        output_dir = Path(config.OUTPUT or 'output') / config.MODEL.NAME / config.TAG
        logger = create_logger(output_dir, process.rank)
        run = Run(config, process, precision, output_dir, logger)
        with logging_redirect_tqdm([logger] if process.rank == 0 else []):  # log lines go above a progress bar
            logger.info(' | '.join(f'{name} {value}' for name, value in environment(process.device).items()))
            logger.info(f'{process.world_size} process(es), device {process.device}, {run.precision}')
            yield run


class Start(NamedTuple):
    """The checkpoint that a run starts from.

    Attributes:
        checkpoint: its content.
        path: its path.
        resumes: whether the run resumes from it.
        is_new_run: whether a new run starts from its weights, with its own head if the classes differ.
        is_automatic: whether it was found in the run's folder.
    """

    checkpoint: dict[str, Any]
    path: str
    resumes: bool
    is_new_run: bool
    is_automatic: bool

    def load_weights(self, model: nn.Module, head: str) -> bool:
        """Load its weights into a network.

        Args:
            model: the network.
            head: regular expression that matches the start of the names of weights that depend on the classes.

        Returns:
            Whether the network kept a head of its own.

        Raises:
            CheckpointError: it does not fit.
        """
        try:
            return load_weights(model, self.checkpoint, self.path, head if self.is_new_run else None)
        except CheckpointError as error:
            remedy = ': to start over, write another --tag or --opts TRAIN.AUTO_RESUME False'
            raise CheckpointError(f'{error}{remedy if self.is_automatic else ""}') from error


def find_start(run: Run, is_training_run: bool) -> Start | None:
    """Load what the run starts from: --resume, else the newest intact checkpoint in its folder, else --pretrained.

    Args:
        run: the run.
        is_training_run: a run that does not train never takes its own checkpoint automatically.

    Returns:
        The checkpoint, or None for a run from scratch.

    Raises:
        CheckpointError: it cannot be read.
    """
    config = run.config
    automatic = None
    if config.TRAIN.AUTO_RESUME and is_training_run and not config.MODEL.RESUME:
        folder = CheckpointFolder(run.output_dir, config.SAVE_KEEP, run.logger)
        automatic = on_main_process(folder.newest_complete)
    resume = config.MODEL.RESUME or automatic
    path = resume or config.MODEL.PRETRAINED
    if not path:
        return None
    return Start(
        load_checkpoint(path),
        str(path),
        resumes=is_training_run and bool(resume),
        is_new_run=not resume and not config.EVAL_MODE,
        is_automatic=automatic is not None,
    )


def build_state(
    run: Run,
    model: nn.Module,
    optimizer: Optimizer,
    loader: DataLoader,
    build_schedule: Callable[[Optimizer, int], Scheduler],
    first_epoch: int = 0,
) -> tuple[nn.Module, TrainingState]:
    """Build what a new run trains with.

    Args:
        run: the run.
        model: the network, on the device.
        optimizer: updates the network's parameters.
        loader: this process's training batches.
        build_schedule: builds the learning-rate schedule from the optimizer and the updates per epoch.
        first_epoch: from 0.

    Returns:
        The network as this process trains it, with rank 0's weights on every rank, and the training state.
    """
    config, process = run.config, run.process
    model, optimizer = run.precision.prepare(model, optimizer)
    network = distribute(model, process.device, config.DETERMINISTIC)
    steps_per_epoch = math.ceil(len(loader) / run.accumulation_steps)
    state = TrainingState(
        model=model,
        optimizer=optimizer,
        scheduler=build_schedule(optimizer, steps_per_epoch),
        precision=run.precision,
        sampler=loader.sampler,
        device=process.device,
        steps_per_epoch=steps_per_epoch,
        images_per_epoch=config.DATA.BATCH_SIZE * process.world_size * len(loader),
        images_per_update=run.images_per_update,
        ema=ModelEmaV3(model, config.TRAIN.EMA_DECAY) if config.TRAIN.EMA_DECAY else None,
        epoch=first_epoch,
    )
    return network, state


def resume(run: Run, state: TrainingState, start: Start, tree: ConfigTree) -> None:
    """Resume training where a checkpoint left it, and log whether the run resumes bit for bit.

    Args:
        run: the run.
        state: the training state, with the checkpoint's weights.
        start: the checkpoint.
        tree: the task's keys.
    """
    config, process, checkpoint = run.config, run.process, start.checkpoint
    notes = state.load_state_dict(checkpoint, process.rank, process.world_size)
    notes += [f'{name} has changed' for name in tree.changed_keys(config, checkpoint.get('config', {}))]
    if process.device.type != 'cpu' and not config.DETERMINISTIC:
        notes.append('DETERMINISTIC is off')
    exactness = f'not bit for bit: {"; ".join(notes)}' if notes else 'bit for bit, as if it had never stopped'
    run.logger.info(f'resuming at epoch {state.epoch}, update {state.step}, max accuracy {state.max_accuracy:.2f}%')
    run.logger.info(f'the run resumes {exactness}')


def compare_classes(run: Run, checkpoint: dict[str, Any], classes: list[str]) -> None:
    """Warn where the names of the data's classes differ from those of the checkpoint, position by position."""
    pairs = zip(classes, checkpoint.get('classes') or classes, strict=False)
    different = [f'{ours} for {theirs}' for ours, theirs in pairs if ours != theirs]
    if different:
        run.logger.warning(
            f'{len(different)} of the {len(classes)} classes have other names in the checkpoint ({different[0]}): '
            f'accuracy means nothing unless they are the same classes'
        )
