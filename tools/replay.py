"""Replay: recompute a run between its checkpoints, and compare the results with what the run recorded, to the bit.

    python -m tools.replay output/msg_tiny_p4_win7_224/default
    python -m tools.replay output/msg_tiny_p4_win7_224/default --from ckpt_epoch_3.pth --to ckpt_epoch_5.pth

Each stretch between two consecutive checkpoints is trained again from the first of them, in a temporary folder. The
run's own folder is only read. The exit code is 0 if everything is equal to the bit, and 3 if not: docs/replay.md.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
import importlib
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from itertools import chain, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from yacs.config import CfgNode

from engine.checkpoint import load_checkpoint, peek_checkpoint, saved_progress
from engine.config_tree import add_options
from engine.distributed import Process, on_main_process, start_process
from engine.experiment import ENVIRONMENT, PRETRAINED, RESUME, ExperimentError, has_changed, recorded_origin
from engine.run_folder import RunFolder
from tools.differences import EVALUATION_ENTRIES, compare_records, differing_entries, entries, read_records
from tools.tasks import TASKS
from utils import UserError, environment, exit_on_user_error, home_path, printable

EXIT_DIFFERENT = 3

# Value of --from that names the start of the run
START = 'start'

# Entries of a checkpoint that are not compared: the replay sets keys of the config, and warns of another environment
_LEFT_OUT = ('config', 'environment')

# Entries that are read only when they are compared
_LARGE = ('model', 'model_ema', 'optimizer')

# Keys that change the metrics of the evaluation, and nothing else that a run computes
_METRIC_KEYS = ('TEST.LOSS',)

# Keys that may end a run early
_ENDS = ('TRAIN.EPOCHS', 'TRAIN.PATIENCE')

# Config of a replay. The run's name and tag are untrusted, and would become parts of a path
_REPLAY_OPTIONS = {
    'MODEL.NAME': 'replay',
    'TAG': 'replay',
    'SAVE_STEPS': 0,
    'SAVE_KEEP': 1,
    'TRACKER': 'none',
    'TRAIN.AUTO_RESUME': True,
    'MODEL.RESUME': '',
    'MODEL.PRETRAINED': '',
}


class ReplayError(UserError):
    """A run that cannot be recomputed, or not with this command."""


class Point(NamedTuple):
    """A point of a run that a replay starts from or ends at.

    Attributes:
        place: epoch, and number of updates in it that were made before.
        path: checkpoint that was saved there; None for the start of the run.
    """

    place: tuple[int, int]
    path: Path | None

    def __str__(self) -> str:
        return printable(self.path.name) if self.path else 'start of the run'


class Stretch(NamedTuple):
    """A part of a run between two points."""

    start: Point
    end: Point

    def __str__(self) -> str:
        return f'{self.start} to {self.end}'


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        'python -m tools.replay',
        description=__doc__.splitlines()[0],
        epilog='exit code: 0 equal to the bit, 3 not equal, 1 error, 2 wrong command line',
        allow_abbrev=False,
    )
    add = parser.add_argument
    add('run', type=home_path, metavar='RUN', help='folder of the run: <OUTPUT>/<MODEL.NAME>/<TAG>')
    add('--from', dest='first', metavar='FILE', help=f'checkpoint to begin with, or {START}: the start of the run')
    add('--to', dest='last', metavar='FILE', help='checkpoint to end with (default: the newest)')
    add(
        '--data-path',
        type=home_path,
        metavar='DIR',
        help="folder of the data, if it is not the one in the run's config",
    )
    add_options(parser, "config keys and values that override the run's, such as DATA.NUM_WORKERS 2")
    return parser.parse_args()


def point_at(path: Path) -> Point:
    """The point of a checkpoint.

    Raises:
        CheckpointError: it cannot be read.
    """
    progress = saved_progress(peek_checkpoint(path))
    return Point((progress['epoch'], progress['step']), path)


def find_stretches(run: Path, first: str | None = None, last: str | None = None) -> list[Stretch]:
    """Find the stretches between consecutive checkpoints of a run, in order.

    Args:
        run: the run's folder.
        first: checkpoint to begin with, by name or path, or START. None begins with the start of the run, unless the
            run's first checkpoints have been removed; then with the oldest one.
        last: checkpoint to end with; None for the newest.

    Raises:
        ReplayError: there is no such checkpoint, or no stretch.
        CheckpointError: a checkpoint cannot be read.
    """
    paths = RunFolder(run, 0, logging.getLogger(__name__)).checkpoints()
    if not paths:
        raise ReplayError(f'{run} holds no checkpoints ckpt_epoch_<n>.pth: give the folder of a run')

    def find(name: str) -> Point:
        found = [path for path in (run / name, home_path(name)) if path.is_file()]
        if not found:
            names = ', '.join(path.name for path in paths[:10])
            raise ReplayError(f'there is no checkpoint {name} in {run}: write one of {names}')
        return point_at(found[0])

    named = [None if name in (None, START) else find(name) for name in (first, last)]
    points = {point.place: point for point in (*map(point_at, paths), *filter(None, named))}
    lowest, highest = (point and point.place for point in named)
    chosen = [points[place] for place in sorted(points) if (lowest or place) <= place <= (highest or place)]
    if first == START or (first is None and chosen and _is_first(chosen[0].path)):
        chosen.insert(0, Point((0, 0), None))
    if len(chosen) < 2:
        raise ReplayError(
            f'there is nothing to recompute in {run} with this --from and --to: write a --from that is earlier, such '
            f'as {START}'
        )
    return [Stretch(*pair) for pair in pairwise(chosen)]


def _is_first(path: Path) -> bool:
    """Whether a checkpoint is the first of its run, or one within the epochs before that."""
    checkpoint = peek_checkpoint(path)
    config = checkpoint.get('config', {})
    first_epoch = config.get('TRAIN', {}).get('START_EPOCH', 0) + config.get('SAVE_FREQ', 1)
    is_resumed = (recorded_origin(checkpoint) or {}).get('kind') == RESUME
    return not is_resumed and saved_progress(checkpoint)['epoch'] <= first_epoch


def build_config(stretch: Stretch, checkpoint: Mapping[str, Any], scratch: str, opts: list[str]) -> CfgNode:
    """The config with which a stretch is trained again: that of the checkpoint at its end.

    Args:
        stretch: the stretch.
        checkpoint: the one at its end.
        scratch: folder to write to.
        opts: config keys and values that override the run's.

    Raises:
        ReplayError: the checkpoint has no config, or the file from which the run started is gone or has changed.
        ConfigError: the config does not work with this version of the project, or `opts` do not.
    """
    if 'config' not in checkpoint:
        raise ReplayError(f'{stretch.end.path} has no config, so nothing can be recomputed from it')
    options, origin = _REPLAY_OPTIONS | {'OUTPUT': scratch}, recorded_origin(checkpoint) or {}
    if stretch.start.path is None and (path := origin.get('path')):
        if not Path(path).is_file() or has_changed(path, origin):
            raise ReplayError(
                f'the run started from {path}, which is not there any more or has changed: write a checkpoint of the '
                f'run as --from'
            )
        options |= {{RESUME: 'MODEL.RESUME', PRETRAINED: 'MODEL.PRETRAINED'}[origin['kind']]: path}
    opts = [*opts, *chain.from_iterable(options.items())]
    return TASKS[checkpoint['task']].tree.load(None, opts, checkpoint['config'], repeats=True)


def check_process_count(checkpoint: Mapping[str, Any], config: CfgNode, process: Process) -> bool:
    """Compare the number of processes with that of the run.

    Returns:
        Whether it is the same.

    Raises:
        ReplayError: it is not, and the run has no virtual ranks.
    """
    ours = str(process.world_size)
    recorded = (checkpoint.get('environment') or {}).get('world_size', ours)
    if recorded != ours and not config.TRAIN.VIRTUAL_RANKS:
        program = 'python' if recorded == '1' else f'torchrun --nproc_per_node {recorded}'
        raise ReplayError(
            f'the run had {recorded} process(es) and no virtual ranks, so only as many can recompute its bits: '
            f'{program} -m tools.replay {shlex.join(sys.argv[1:])}'
        )
    return recorded == ours


def find_reasons(stretch: Stretch, checkpoint: Mapping[str, Any], config: CfgNode, process: Process) -> Iterator[str]:
    """Find differences between the run and its replay for which bits may differ."""
    recorded, now = checkpoint.get('environment') or {}, environment(process.device)
    if not recorded:
        yield f'{stretch.end} does not record its environment'
    for name in (*ENVIRONMENT, 'python', 'processor', 'variables', 'revision'):
        if name in now and recorded.get(name, now[name]) != now[name]:
            yield f'{name} was {recorded[name]!r} and is {now[name]!r}'
    if process.device.type != 'cpu' and not config.DETERMINISTIC:
        yield 'DETERMINISTIC is False, and this is a GPU'
    tree, before = TASKS[checkpoint['task']].tree, peek_checkpoint(stretch.start.path or stretch.end.path)
    for key in tree.changed_keys(config, before.get('config') or checkpoint['config']):
        yield str(key)
    for key in tree.changed_keys(config, checkpoint['config'], [name for name in _METRIC_KEYS if name in tree.keys]):
        yield str(key)


def recompute(stretch: Stretch, checkpoint: Mapping[str, Any], config: CfgNode) -> Path:
    """Train a stretch again; every process calls it at the same point. The log goes to standard error.

    Returns:
        The checkpoint at its end, in the folder of the config.

    Raises:
        UserError: it cannot be trained again.
    """
    folder, end = Path(config.OUTPUT) / config.MODEL.NAME / config.TAG, stretch.end.place

    def path_of(epoch: int, step: int) -> Path:
        return folder / (f'ckpt_epoch_{epoch}_step_{step}.pth' if step else f'ckpt_epoch_{epoch - 1}.pth')

    def link_start() -> None:
        folder.mkdir(parents=True)
        if stretch.start.path is not None:
            path_of(*stretch.start.place).symlink_to(stretch.start.path.resolve())

    on_main_process(link_start)
    try:
        with redirect_stdout(sys.stderr):
            importlib.import_module(TASKS[checkpoint['task']].program).main(config, until=end)
    except ExperimentError as error:
        differences = '; '.join(error.differences) or str(error)
        raise ReplayError(
            f'{stretch.end} is of another run than this replay ({differences}): give the same data and settings'
        ) from error
    path = path_of(*end)
    if not on_main_process(path.is_file):
        reason = 'with these data and settings, an epoch has another number of updates'
        for key in TASKS[checkpoint['task']].tree.changed_keys(config, checkpoint['config'], _ENDS):
            ends_earlier = end > (config.TRAIN.EPOCHS, 0) if key.name == 'TRAIN.EPOCHS' else config.TRAIN.PATIENCE > 0
            if ends_earlier:
                reason = f'{key}, so training ends earlier: leave {key.name} out of --opts'
        raise ReplayError(
            f'training has not reached epoch {end[0]}, update {end[1]}, where {stretch.end} was saved: {reason}'
        )
    return path


def compare(
    stretch: Stretch, run: Path, recomputed: Path, has_same_processes: bool, reasons: Sequence[str]
) -> tuple[bool, str]:
    """Compare the checkpoint at the end of a stretch, and the records on the way there, with those of the replay.

    Args:
        stretch: the stretch.
        run: the run's folder.
        recomputed: the replay's checkpoint.
        has_same_processes: whether the run had as many processes as the replay.
        reasons: for which bits may differ, from `find_reasons`.

    Returns:
        Whether all is equal to the bit, and the result in words.
    """
    left_out = _LEFT_OUT if has_same_processes else (*_LEFT_OUT, *EVALUATION_ENTRIES)
    ours, theirs = (
        {name: value for name, value in entries(load_checkpoint(path)) if not name.startswith(left_out)}
        for path in (stretch.end.path, recomputed)
    )
    differences = differing_entries(ours, theirs)
    logs = (read_records(folder / 'metrics.jsonl') for folder in (run, recomputed.parent))
    records = compare_records(*logs, stretch.start.place, stretch.end.place, has_same_processes)
    counts = (
        f'{records.counts["train"]} logged updates, {records.counts["hash"]} hashes, {records.counts["epoch"]} epochs'
    )
    if records.unmatched:
        counts += f'; {records.unmatched} records are only in the run or only in the replay'
    if not differences and not records.first:
        return True, f'{stretch}: equal to the bit ({len(ours)} entries; {counts})'
    lines = [f'{stretch}: NOT equal']
    lines.append(
        f'first record that deviates: {records.first}' if records.first else f'all records are equal: {counts}'
    )
    if differences:
        lines.append(f'first entry of {stretch.end} that differs: {differences[0]}')
        lines.append(f'{len(differences)} of {len(ours)} entries differ')
    else:
        lines.append(f'all {len(ours)} entries of {stretch.end} are equal')
    if reasons and (records.first or not any(records.counts.values())):  # otherwise, training had the same bits
        lines.append(f'possible reasons: {"; ".join(reasons)}')
    return False, '\n    '.join(map(printable, lines))


@contextmanager
def scratch_folder(process: Process) -> Iterator[str]:
    """Context of a temporary folder of rank 0; every process gets its path."""
    if process.rank:
        yield on_main_process(str)
        return
    with TemporaryDirectory(prefix='replay_') as folder:
        yield on_main_process(lambda: folder)


def replay(stretch: Stretch, run: Path, opts: list[str], process: Process, warned: set[str]) -> bool:
    """Recompute a stretch, compare it and print the result; every process calls it at the same point.

    Args:
        stretch: the stretch.
        run: the run's folder.
        opts: config keys and values that override the run's.
        process: this process.
        warned: reasons for other bits that a warning has named.

    Returns:
        Whether all is equal to the bit.

    Raises:
        UserError: it cannot be recomputed.
    """
    checkpoint = {name: value for name, value in load_checkpoint(stretch.end.path).items() if name not in _LARGE}
    with scratch_folder(process) as scratch:
        config = build_config(stretch, checkpoint, scratch, opts)
        has_same_processes = check_process_count(checkpoint, config, process)
        reasons = [*find_reasons(stretch, checkpoint, config, process)]
        for reason in reasons:
            if process.rank == 0 and reason not in warned:
                print(printable(f'warning: bits may differ, since {reason}'), file=sys.stderr, flush=True)
            warned.add(reason)
        recomputed = recompute(stretch, checkpoint, config)
        is_equal, text = on_main_process(lambda: compare(stretch, run, recomputed, has_same_processes, reasons))
    if process.rank == 0:
        print(text, flush=True)
    return is_equal


def use_threads_of(checkpoint: Mapping[str, Any]) -> None:
    """Use as many threads as the run of a checkpoint, unless OMP_NUM_THREADS says how many."""
    recorded = (checkpoint.get('environment') or {}).get('threads', '')
    if recorded.isdecimal() and int(recorded) and not os.environ.get('OMP_NUM_THREADS'):
        os.environ['OMP_NUM_THREADS'] = recorded  # read when each stretch starts
        torch.set_num_threads(int(recorded))


def main() -> None:
    """Read the command line, recompute and compare."""
    args = read_arguments()
    with exit_on_user_error():
        opts = args.opts + (['DATA.DATA_PATH', str(args.data_path)] if args.data_path else [])
        stretches = find_stretches(args.run, args.first, args.last)
        newest = load_checkpoint(stretches[-1].end.path)
        config = build_config(stretches[-1], newest, '', opts)
        use_threads_of(newest)
        del newest
        with start_process(config.DEVICE, config.LOCAL_RANK) as process:
            warned: set[str] = set()
            equal = [replay(stretch, args.run, opts, process, warned) for stretch in stretches]
            if process.rank == 0:
                print(f'{sum(equal)} of {len(equal)} stretches are equal to the bit')
        if not all(equal):
            sys.exit(EXIT_DIFFERENT)


if __name__ == '__main__':
    main()
