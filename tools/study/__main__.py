"""Train variants of a network with several seeds through main.py or detection.main, and compare them.

    python -m tools.study --data-path <imagenette>
    python -m tools.study --results docs/study.json

A study file names the config, the variants, the seeds, pairs of variants to compare, and references of Dunnett's test.
Run the same command again to resume. After each run, the results are written to `<output>/study.json` (every run:
config, revision, hardware, time, metrics), `study.md`, `study.svg` and `study.pdf`. `--results` prints the tables and
draws the chart of such a JSON file. See docs/study.md.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
import contextlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import timedelta
from pathlib import Path
from typing import Any

from engine.config_tree import add_options
from tools.output_files import prepare_figure, prepare_output, read_records, save_figure
from tools.study.chart import MAX_WIDTH, MIN_WIDTH, TWO_COLUMNS, chart
from tools.study.plan import Study, StudyError, read_study
from tools.study.report import DPI, table, write_results
from tools.study.runs import StudyRuns, collect, describe_data, finished_run, stoppable
from tools.study.statistics import metric_curve
from utils import exit_on_user_error, home_path, non_negative_int, positive_int

DEFAULT_STUDY = Path('configs/studies/msg_tokens.yaml')
EPILOG = """examples:
  python -m tools.study --data-path imagenette --jobs 2
  python -m tools.study --data-path imagenette --variants msg no_shuffle --seeds 0 --opts TRAIN.EPOCHS 5
  python -m tools.study --results docs/study.json --chart docs/study.svg
  python -m tools.study --results docs/study.json --chart study.pdf --width 3.3
"""


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        'python -m tools.study',
        description=__doc__.splitlines()[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        '--data-path', type=home_path, metavar='DIR', help='dataset to train and evaluate on, as for main.py'
    )
    source.add_argument(
        '--results', type=home_path, metavar='FILE', help='print the table of a study.json; train nothing'
    )
    add('--study', type=home_path, default=DEFAULT_STUDY, metavar='FILE', help=f'study file ({DEFAULT_STUDY})')
    add('--variants', nargs='+', metavar='NAME', help='variants to train (default: all of the study file)')
    add(
        '--seeds',
        nargs='+',
        type=non_negative_int,
        metavar='N',
        help='seeds to train (default: those of the study file)',
    )
    add('--jobs', type=positive_int, default=1, metavar='N', help='runs at a time; they share cores and GPU (1)')
    add('--output', type=home_path, metavar='DIR', help='folder of runs and results (output/studies/<study>)')
    add(
        '--chart',
        nargs='+',
        type=home_path,
        default=[],
        metavar='FILE',
        help='with --results: draw the chart to these files, as .png, .pdf or .svg',
    )
    add(
        '--width',
        type=chart_width,
        default=TWO_COLUMNS,
        metavar='INCHES',
        help=f'with --chart: width of the chart; 3.3 for a column of a paper ({TWO_COLUMNS:g}, a page)',
    )
    add_options(parser, 'config keys and values of all runs')
    args = parser.parse_args()
    if args.chart and not args.results:
        parser.error('--chart goes with --results; a study draws study.svg and study.pdf')
    if args.width != TWO_COLUMNS and not args.chart:
        parser.error('--width goes with --chart: name the file to draw')
    for name in ('study', 'variants', 'seeds', 'jobs', 'output', 'opts'):
        if args.results and getattr(args, name) != parser.get_default(name):
            parser.error(f'--{name} is for training, --results prints what has been trained')
    return args


def chart_width(text: str) -> float:
    """A width of a chart in inches, as the `type` of an argument.

    Raises:
        ArgumentTypeError: the text is not one.
    """
    with contextlib.suppress(ValueError):
        width = float(text)
        if MIN_WIDTH <= width <= MAX_WIDTH:
            return width
    raise argparse.ArgumentTypeError(f'{text} is not a width from {MIN_WIDTH:g} to {MAX_WIDTH:g} inches')


def train(
    study: Study, runs: StudyRuns, variants: list[str], seeds: list[int], jobs: int, data: Mapping[str, Any]
) -> None:
    """Train what is not trained yet, seed by seed, and report after each run.

    Args:
        study: the study.
        runs: what trains its runs.
        variants: to train.
        seeds: to train.
        jobs: runs at a time.
        data: of the runs, from `describe_data`.

    Raises:
        StudyError: a finished run was trained on other data; or a run failed. Those that ran with it have been stopped,
            and go on with the next command.
    """
    pending = []
    for seed in seeds:
        for variant in variants:
            done = finished_run(study, runs.output, variant, seed, runs.opts, data)
            if done:
                print(_line(done, study), 'already', flush=True)
            else:
                pending.append((variant, seed))
    write_results(collect(study, runs.output, runs.opts), runs.output)
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(runs.train, *run) for run in pending]
        try:
            for future in as_completed(futures):
                result = future.result()
                write_results(collect(study, runs.output, runs.opts), runs.output)
                if result:
                    print(_line(result, study), flush=True)
        finally:
            for future in futures:
                future.cancel()
            runs.stop()


def _line(run: dict[str, Any], study: Study) -> str:
    seconds = timedelta(seconds=round(run['train_seconds']))
    value = metric_curve(run, study.task.metric)[-1]
    return f'{run["variant"]}, seed {run["seed"]}: {study.metric_name} {value:.2f} %, trained in {seconds}'


def read_results(path: Path) -> dict[str, Any]:
    """Read a `study.json`.

    Raises:
        StudyError: it is none, or holds no run.
    """

    def report(results: dict[str, Any]) -> str:
        if not results['runs']:
            raise StudyError(f'{path} holds no finished run yet')
        return table(_with_metric(results))

    return _with_metric(read_records(path, report, 'study.json', StudyError))


def _with_metric(results: dict[str, Any]) -> dict[str, Any]:
    """Results with the metric, which older files lack."""
    return {'metric': 'acc1', 'metric_name': 'top-1', **results}


def main() -> None:
    """Read the command line; train and report, or print and draw results."""
    args = parse_args()
    with exit_on_user_error():
        if args.results:
            results = read_results(args.results)
            print(table(results))
            for path in args.chart:
                prepare_figure(path)
            for path in args.chart:
                save_figure(chart(results, args.width), path, DPI)
            return
        study = read_study(args.study)
        variants, seeds = study.select_variants(args.variants), list(dict.fromkeys(args.seeds or study.seeds))
        opts = ['DATA.DATA_PATH', str(args.data_path.resolve())]
        configs = [study.config(variant, seeds[0], [*args.opts, *opts]) for variant in variants]  # all are checked
        data = describe_data(study.task, configs[0])
        output = args.output or Path('output/studies') / study.name
        prepare_output(output / 'study.json')
        with stoppable():
            runs = StudyRuns(study, args.data_path, output, args.opts, args.jobs)
            train(study, runs, variants, seeds, args.jobs, data)
        print('\n' + (output / 'study.md').read_text(encoding='utf-8'))


if __name__ == '__main__':
    main()
