"""Time to accuracy: time the training of networks from scratch to 80 % top-1 on Imagenette with two CPU cores.

    python -m tools.speedrun --data-path <imagenette>
    python -m tools.speedrun --results output/speedrun/speedrun.json

Each recipe trains for a fixed number of epochs; training does not stop at 80 %. The rules:

1. The data are the 9,469 training images of Imagenette at 112 px, prepared as in docs/reproducing.md. Nothing else is
   used: no pretrained weights, no teacher, no other images.
2. Each network has one recipe, which is a variant in configs/studies/speedrun.yaml. The recipe is trained with the
   seeds 0 to 4, and all five runs count: the recipe passes if their mean top-1 accuracy on the 3,925 validation images
   is at least 80 %.
3. The time is the wall time of the whole command, from the start of Python to its end: imports, opening the data,
   training, saving, and one evaluation after the last epoch, without test-time augmentation. Training uses two cores,
   with two processes of one thread each. The table has the mean and the range over the seeds.
4. A recipe may be tuned on the validation images, so the accuracy of every network is slightly optimistic.

Results, and how the recipes were tuned: docs/speedrun.md.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from engine.experiment import changed_splits
from tools.output_files import prepare_output, read_records, write_records
from tools.rehearsal.launch import Launch
from tools.study.plan import Study, read_study
from tools.study.runs import ROOT, describe_data, finished_run, stoppable
from tools.study.statistics import mean_and_deviation, metric_curve
from utils import UserError, exit_on_user_error, home_path, non_negative_int, short_revision

STUDY = ROOT / 'configs/studies/speedrun.yaml'
PROCESSES = 2
EPILOG = """examples:
  python -m tools.speedrun --data-path imagenette
  python -m tools.speedrun --data-path imagenette --networks msg --seeds 0
  python -m tools.speedrun --results output/speedrun/speedrun.json
"""


class SpeedrunError(UserError):
    """A run failed, or results cannot be read."""


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        'python -m tools.speedrun',
        description=__doc__.splitlines()[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument('--data-path', type=home_path, metavar='DIR', help='Imagenette at 112 px')
    source.add_argument('--results', type=home_path, metavar='FILE', help='print the table of a speedrun.json')
    add('--networks', nargs='+', metavar='NAME', help='variants of the study file to train (default: all)')
    add('--seeds', nargs='+', type=non_negative_int, metavar='N', help='seeds to train (default: those of the study)')
    add(
        '--study',
        type=home_path,
        default=STUDY,
        metavar='FILE',
        help='study file with the recipes (configs/studies/speedrun.yaml)',
    )
    add(
        '--output',
        type=home_path,
        default=Path('output/speedrun'),
        metavar='DIR',
        help='folder of the runs and of speedrun.json; runs that the file has are not repeated (output/speedrun)',
    )
    return parser.parse_args()


def train(study: Study, network: str, seed: int, data_path: Path, output: Path) -> dict[str, Any]:
    """Train one network with one seed, from nothing.

    Returns:
        Its result, see `tools.study.runs.finished_run`, and `seconds`, the wall time of the command.

    Raises:
        SpeedrunError: it failed.
    """
    shutil.rmtree(output / network / f'seed{seed}', ignore_errors=True)
    command = ['main.py', '--cfg', str(study.cfg_file.resolve())]
    command += ['--data-path', str(data_path.resolve()), '--output', str(output.resolve())]
    command += ['--opts', *study.options(network, seed)]
    printed = output / 'printed.txt'
    printed.unlink(missing_ok=True)
    start = time.monotonic()
    launch = Launch(command, PROCESSES, printed)
    try:
        code = launch.wait()
    except KeyboardInterrupt:
        launch.kill()
        raise
    seconds = time.monotonic() - start
    run = None if code else finished_run(study, output, network, seed)
    if run is None:
        text = printed.read_text(encoding='utf-8', errors='replace')
        errors = [x.removeprefix('error: ') for x in text.splitlines() if x.startswith('error: ')]
        raise SpeedrunError(f'{network}, seed {seed} failed: {errors[0] if errors else text[-2000:]}')
    return run | {'seconds': round(seconds, 1)}


def table(results: dict[str, Any]) -> str:
    """Write a Markdown table of the networks, and the hardware."""
    lines = [
        '| network | parameters | multiply-adds | epochs | top-1 by seed, % | mean ± sd | minutes, mean (range) |',
        '|---|---:|---:|---:|---|---:|---:|',
    ]
    for network, label in results['labels'].items():
        runs = [run for run in results['runs'] if run['variant'] == network]
        if not runs:
            continue
        accuracies, minutes = [_accuracy(run) for run in runs], [run['seconds'] / 60 for run in runs]
        by_seed = ', '.join(f'{x:.1f}' for x in accuracies)
        lines.append(
            f'| {label} | {runs[0]["parameters"]:,} | {runs[0]["multiply_adds"] / 1e6:.0f}M | '
            f'{len(runs[0]["epochs"])} | {by_seed} | {mean_and_deviation(accuracies)} | '
            f'**{mean(minutes):.1f}** ({min(minutes):.1f} to {max(minutes):.1f}) |'
        )
    for key in ('processor', 'cpu', 'torch', 'revision'):
        values = {run['environment'][key] for run in results['runs']}
        lines += ['', f'{key}: {", ".join(sorted(map(short_revision, values) if key == "revision" else values))}']
    return '\n'.join(lines)


def _accuracy(run: dict[str, Any]) -> float:
    """Top-1 after the last epoch, in percent."""
    return metric_curve(run, 'acc1')[-1]


def read_results(path: Path) -> dict[str, Any]:
    """Read a `speedrun.json`.

    Raises:
        SpeedrunError: it is none.
    """
    return read_records(path, table, 'speedrun.json', SpeedrunError)


def run_all(study: Study, networks: Sequence[str], seeds: Sequence[int], data_path: Path, output: Path) -> None:
    """Train what `speedrun.json` does not have yet, seed by seed, and add each run to it.

    Raises:
        SpeedrunError: a run failed, a recipe breaks the rules, or `speedrun.json` has a run with another recipe or
            on other data.
    """
    path = output / 'speedrun.json'
    prepare_output(path)
    results = read_results(path) if path.exists() else {'runs': []}
    data_opts = ['DATA.DATA_PATH', str(data_path.resolve())]
    configs = [study.config(network, seeds[0], data_opts) for network in networks]  # all are checked
    for network, config in zip(networks, configs, strict=True):
        if config.MODEL.PRETRAINED or config.DISTILL.TEACHER:
            raise SpeedrunError(f'{network} has pretrained weights or a teacher: rule 1 allows neither')
    data = describe_data(study.task, configs[0])
    for run in results['runs']:
        network, seed = run['variant'], run['seed']
        if network in networks:
            changes = study.task.tree.changed_keys(study.config(network, seed), run.get('config', {}))
            changes = [*map(str, changes), *changed_splits(run.get('data', {}), data)]
            if changes:
                raise SpeedrunError(
                    f'{path} has another run of {network}, seed {seed} ({"; ".join(changes)}): write another --output'
                )
    results['labels'] = {name: variant.label for name, variant in study.variants.items()}
    for seed in seeds:
        for network in networks:
            if any((run['variant'], run['seed']) == (network, seed) for run in results['runs']):
                continue
            run = train(study, network, seed, data_path, output)
            results['runs'] = sorted([*results['runs'], run], key=lambda run: (run['variant'], run['seed']))
            write_records(path, results, 'runs')
            print(f'{network}, seed {seed}: {_accuracy(run):.2f} % in {run["seconds"] / 60:.1f} minutes', flush=True)
    print(f'\n{table(results)}')


def main() -> None:
    """Read the command line; train and time, or print results."""
    args = parse_args()
    with exit_on_user_error():
        if args.results:
            print(table(read_results(args.results)))
            return
        study = read_study(args.study)
        seeds = args.seeds or study.seeds
        with stoppable('run the same command again: finished runs are kept'):
            run_all(study, study.select_variants(args.networks), seeds, args.data_path, args.output)


if __name__ == '__main__':
    main()
