"""Rehearse a long run: interrupt it many times, and check that its result is bit-identical to an uninterrupted run.

    python -m tools.rehearsal --output output/rehearsal --processes 4 1 2 --kills 30 -- \
        main.py --cfg configs/rehearsal_imagenet.yaml --data-path output/rehearsal/imagenet

The command after `--` is trained twice: as an uninterrupted run, and as an interrupted run, whose processes are killed
or stopped at random moments and started again. With several --processes, the number of processes changes during the
interrupted run, which needs TRAIN.VIRTUAL_RANKS. The program prints a row for each interruption, then compares every
entry of the last checkpoints. With --slurm, a third run is a SLURM job that is requeued. Linux only: docs/rehearsal.md.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
import json
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

from tools.rehearsal.interruptions import RehearsedRun, Restart, compare, rehearse, rehearse_slurm, sizes
from utils import exit_on_user_error, home_path, non_negative_int, orderly_termination, positive_int

HEAD = ('', 'interruption', 'in epoch', 'processes', 'updates computed again', 'start-up, s', 'peak of a process, MB')
HEAD += ('resumed bit for bit',)


def print_row(cells: Iterable[object]) -> None:
    """Print a row of a Markdown table."""
    print('| ' + ' | '.join(map(str, cells)) + ' |', flush=True)


def print_restart(number: int, restart: Restart) -> None:
    """Print the row of an interruption."""
    before, after = restart.processes
    processes = str(before) if before == after else f'{before}, then {after}'
    peak = f'{restart.peak_mb:,.0f}' if restart.peak_mb else ''
    cells = [number, restart.kind, restart.epoch, processes, restart.lost_updates, f'{restart.seconds:.0f}', peak]
    print_row([*cells, 'yes' if restart.is_exact else 'no'])


def run_all(args: argparse.Namespace, runs: Mapping[str, RehearsedRun]) -> bool:
    """Train all runs, print tables, and update `rehearsal.json` after every row.

    Returns:
        Whether all other runs are bit-identical to the uninterrupted run.
    """
    uninterrupted, is_equal = runs['uninterrupted'], True
    result: dict[str, Any] = {'command': args.command, 'processes': args.processes, 'seed': args.seed}

    def write() -> None:
        text = json.dumps(result, indent=1) + '\n'
        (args.output / 'rehearsal.json').write_text(text, encoding='utf-8')

    start = time.monotonic()
    uninterrupted.start(min(args.processes))
    uninterrupted.finish()
    seconds = time.monotonic() - start
    result['uninterrupted'] = {'seconds': seconds, 'bytes': sizes(uninterrupted)}
    write()
    print(f'uninterrupted on {min(args.processes)} process(es): {uninterrupted.epochs} epochs in {seconds:.0f} s')
    print(', '.join(f'{name} {size / 2**20:.1f} MB' for name, size in sizes(uninterrupted).items()), flush=True)
    restarts = {'interrupted': rehearse(runs['interrupted'], args.processes, args.kills, args.seed)}
    if args.slurm:
        restarts['slurm'] = rehearse_slurm(runs['slurm'], max(args.processes), args.slurm, args.seed)
    for tag, restarts_of_run in restarts.items():
        result[tag] = {'restarts': []}
        for row in (HEAD, ['---'] * len(HEAD)):
            print_row(row)
        for number, restart in enumerate(restarts_of_run, start=1):
            print_restart(number, restart)
            result[tag]['restarts'].append(restart._asdict())
            is_equal &= restart.is_exact
            write()
        differences = compare(uninterrupted.last_checkpoint, runs[tag].last_checkpoint)
        print(f'{tag}: {"; ".join(differences) or "equal to the uninterrupted run, to the bit"}', flush=True)
        result[tag]['differences'] = differences
        is_equal &= not differences
        write()
    return is_equal


def main() -> None:
    """Read the command line, rehearse, and print tables; exit code 1 if the runs differ."""
    parser = argparse.ArgumentParser('python -m tools.rehearsal', description=__doc__.splitlines()[0])
    parser.add_argument('--output', type=home_path, required=True, metavar='DIR', help='empty folder for all runs')
    parser.add_argument(
        '--processes',
        type=positive_int,
        nargs='+',
        default=[1],
        metavar='N',
        help='numbers of processes of the interrupted run, one after the other, each for an equal part of the run (1)',
    )
    parser.add_argument('--kills', type=positive_int, default=30, metavar='N', help='number of interruptions (30)')
    parser.add_argument(
        '--seed',
        type=non_negative_int,
        default=0,
        metavar='N',
        help='seed of the moments and kinds of interruptions (0)',
    )
    parser.add_argument(
        '--slurm', type=non_negative_int, default=0, metavar='N', help='requeue a third run, a SLURM job, N times (0)'
    )
    parser.add_argument('command', nargs='+', help='after --: main.py or detection.main with --cfg and so on')
    args = parser.parse_args()
    if args.output.exists() and any(args.output.iterdir()):
        parser.error(f'--output {args.output} is not empty: give an empty folder')
    args.output.mkdir(parents=True, exist_ok=True)
    runs = {tag: RehearsedRun(args.command, args.output, tag) for tag in ('uninterrupted', 'interrupted', 'slurm')}
    try:
        is_equal = run_all(args, runs)
    finally:
        for run in runs.values():
            run.stop()
    sys.exit(0 if is_equal else 1)


if __name__ == '__main__':
    with exit_on_user_error(), orderly_termination():
        main()
