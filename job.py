"""What the jobs of all tasks have in common: their flags, their start-up, and where training starts."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from tqdm.contrib.logging import logging_redirect_tqdm
from yacs.config import CfgNode

from checkpoint import CheckpointError, CheckpointFolder, load_checkpoint
from launcher import start_process
from logger import create_logger
from lr_scheduler import accumulation_steps, updates_per_epoch
from precision import build_precision
from trainer import Run
from training_state import TrainingState
from utils import distribute, environment, on_main_process, set_arithmetic, set_seed


def job_parser(description: str, cfg: str, data: str) -> argparse.ArgumentParser:
    """A parser of the flags of every job; a flag that is not given is None and overrides nothing.

    Args:
        description: of the program.
        cfg: path of an example of a config.
        data: what the data's folder holds.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    add = parser.add_argument
    add('--cfg', required=True, metavar='FILE', help=f'YAML config, such as {cfg}')
    add(
        '--opts',
        nargs='+',
        action='extend',
        metavar='KEY VALUE',
        help='config keys and values, such as TRAIN.EPOCHS 100 SEED 1; may be given more than once',
    )
    add('--batch-size', type=int, metavar='N', help='images a process and step (DATA.BATCH_SIZE)')
    add('--data-path', metavar='DIR', help=f'folder with {data} (DATA.DATA_PATH)')
    add('--resume', metavar='FILE', help='checkpoint to continue, or to evaluate with --eval (MODEL.RESUME)')
    add('--pretrained', metavar='FILE', help='checkpoint whose weights start a new run (MODEL.PRETRAINED)')
    add('--accumulation-steps', type=int, metavar='N', help='batches an update (TRAIN.ACCUMULATION_STEPS)')
    add('--use-checkpoint', action='store_true', default=None, help='recompute activations, for memory')
    add('--amp-opt-level', choices=['O0', 'O1', 'O2'], help='mixed precision: O0 none, O1 autocast, O2 needs Apex')
    add('--device', choices=['auto', 'cuda', 'mps', 'cpu'], help='device; auto takes a GPU where there is one')
    add('--output', metavar='DIR', help='folder of all runs; this one writes <DIR>/<MODEL.NAME>/<TAG> (output)')
    add('--tag', metavar='NAME', help='name of this run among those of its model (default)')
    add('--eval', action='store_true', default=None, help='evaluate --resume or --pretrained and stop')
    add('--local_rank', '--local-rank', type=int, metavar='N', help='set by torch.distributed.launch; not required')
    return parser


@contextmanager
def started(config: CfgNode, compiles: bool = False) -> Iterator[Run]:
    """This process as the config's job, whose folder is `<OUTPUT>/<MODEL.NAME>/<TAG>`; what it runs on is logged.

    Args:
        config: the config tree.
        compiles: whether the job compiles its network.
    """
    set_arithmetic(config.TF32, config.DETERMINISTIC)
    with start_process(config.DEVICE, config.LOCAL_RANK) as process:
        set_seed(config.SEED + process.rank)
        output_dir = Path(config.OUTPUT or 'output') / config.MODEL.NAME / config.TAG
        logger = create_logger(output_dir, process.rank)
        run = Run(config, process, build_precision(config, process.device, compiles), output_dir, logger)
        with logging_redirect_tqdm([logger] if process.rank == 0 else []):  # log lines go above a progress bar
            logger.info(' | '.join(f'{name} {value}' for name, value in environment(process.device).items()))
            logger.info(f'{process.world_size} process(es), device {process.device}, {run.precision}')
            yield run


def load_start(run: Run, trains: bool, load: Callable[[dict[str, Any], str, bool], None]) -> dict[str, Any] | None:
    """Load the weights the job starts from: --resume, else the run's newest complete checkpoint, else --pretrained.

    A job that does not train never takes the run's own checkpoint by itself.

    Args:
        run: the job.
        trains: whether it trains.
        load: puts a checkpoint's weights into the network, from the checkpoint, its path, and whether they start a new
            run, in which the network may differ from theirs.

    Returns:
        The checkpoint to continue or evaluate; None where a new run starts.
    """
    config = run.config
    automatic = None
    if config.TRAIN.AUTO_RESUME and trains and not config.MODEL.RESUME:
        folder = CheckpointFolder(run.output_dir, config.SAVE_KEEP, run.logger)
        automatic = on_main_process(folder.newest_complete)
    resume = config.MODEL.RESUME or automatic
    path = resume or config.MODEL.PRETRAINED
    if not path:
        return None
    try:
        checkpoint = load_checkpoint(path)
        load(checkpoint, path, not resume and not config.EVAL_MODE)
    except CheckpointError as error:
        remedy = '; to start afresh, write another --tag or --opts TRAIN.AUTO_RESUME False' if automatic else ''
        raise CheckpointError(f'{error}{remedy}') from error
    run.logger.info(f'weights of {path} loaded')
    return checkpoint if resume or not trains else None


def compare_classes(run: Run, checkpoint: dict[str, Any], classes: list[str]) -> None:
    """Warn where the data's classes are not those that a checkpoint, in the same order, was trained on."""
    theirs = checkpoint.get('classes') or classes
    different = [f'{ours} for {other}' for ours, other in zip(classes, theirs, strict=False) if ours != other]
    if different:
        run.logger.warning(
            f'{len(different)} of the {len(classes)} classes are not those of the checkpoint ({different[0]}): '
            f'accuracies mean nothing unless they are other names of the same'
        )


def prepare_training(
    run: Run,
    model: nn.Module,
    optimizer: Optimizer,
    loader: DataLoader,
    schedule: Callable[[Optimizer, int], Scheduler],
    first_epoch: int = 0,
) -> tuple[nn.Module, TrainingState]:
    """What a new run trains with.

    Args:
        run: the job.
        model: the network, on the device.
        optimizer: of its parameters.
        loader: this process's training batches.
        schedule: gives the learning rate's schedule, from the optimizer and the updates in an epoch.
        first_epoch: from 0.

    Returns:
        The network as this process trains it, with rank 0's weights on every rank, and where training stands.
    """
    config, process = run.config, run.process
    model, optimizer = run.precision.prepare(model, optimizer)
    network = distribute(model, process.device, config.DETERMINISTIC)
    steps_per_epoch = updates_per_epoch(config, len(loader))
    images_per_batch = config.DATA.BATCH_SIZE * process.world_size
    state = TrainingState(
        model=model,
        optimizer=optimizer,
        scheduler=schedule(optimizer, steps_per_epoch),
        precision=run.precision,
        sampler=loader.sampler,
        device=process.device,
        steps_per_epoch=steps_per_epoch,
        images_per_epoch=images_per_batch * len(loader),
        images_per_update=images_per_batch * accumulation_steps(config),
        ema=ModelEmaV3(model, config.TRAIN.EMA_DECAY) if config.TRAIN.EMA_DECAY else None,
        epoch=first_epoch,
    )
    return network, state


def continue_run(run: Run, state: TrainingState, checkpoint: dict[str, Any], changed: list[str]) -> None:
    """Take the state up where the checkpoint left it, and say how exactly the run goes on.

    Args:
        run: the job.
        state: of training; it has the checkpoint's weights already.
        checkpoint: of the run.
        changed: keys of the config that have changed since it was saved.
    """
    process = run.process
    notes = state.load_state_dict(checkpoint, process.rank, process.world_size)
    notes += [f'{key} has changed' for key in changed]
    if process.device.type != 'cpu' and not run.config.DETERMINISTIC:
        notes.append('DETERMINISTIC is off')
    how = f'not bit for bit: {"; ".join(notes)}' if notes else 'bit for bit as if it had not stopped'
    run.logger.info(f'continuing at epoch {state.epoch}, update {state.step}, max accuracy {state.max_accuracy:.2f}%')
    run.logger.info(f'the run goes on, {how}')
