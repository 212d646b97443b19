"""What the jobs of all tasks have in common: their flags, and where they start."""

import argparse
from collections.abc import Callable
from typing import Any

from checkpoint import CheckpointError, CheckpointFolder, load_checkpoint
from trainer import Run
from training_state import TrainingState
from utils import on_main_process


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


def load_start(run: Run, load: Callable[[dict[str, Any], str, bool], None]) -> dict[str, Any] | None:
    """Load the weights the job starts from: --resume, else the run's newest complete checkpoint, else --pretrained.

    Args:
        run: the job.
        load: puts a checkpoint's weights into the network, from the checkpoint, its path, and whether they start a new
            run, in which the network may differ from theirs.

    Returns:
        The checkpoint to continue or evaluate; None where a new run starts.
    """
    config = run.config
    automatic = None
    if config.TRAIN.AUTO_RESUME and not config.EVAL_MODE and not config.MODEL.RESUME:
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
    return checkpoint if resume or config.EVAL_MODE else None


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
