"""Results of a study: Markdown tables and files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.output_files import save_figure, write_records, write_text
from tools.study.chart import chart
from tools.study.statistics import (
    Difference,
    DunnettDifference,
    compare_pairs,
    compare_with_references,
    mean_and_deviation,
    summarise,
)
from utils import short_revision

DPI = 200  # of charts in pixels


def write_results(results: dict[str, Any], output: Path) -> None:
    """Write `study.json`, with a line for each run, `study.md`, and the chart as `study.svg` and `study.pdf`.

    Args:
        results: see `tools.study.runs.collect`.
        output: folder.
    """
    write_records(output / 'study.json', results, 'runs')
    if results['runs']:
        write_text(output / 'study.md', [table(results), '\n'])
        for suffix in ('svg', 'pdf'):
            save_figure(chart(results), output / f'study.{suffix}', DPI)


def table(results: dict[str, Any]) -> str:
    """Write Markdown tables of the variants, the study's comparisons and Dunnett's test, and how the runs came about.

    Args:
        results: see `tools.study.runs.collect`.
    """
    summaries = summarise(results)
    label, metric = results['labels'][results['reference']], results['metric_name']
    lines = [
        f'| variant | parameters | multiply-adds | {metric} by seed, % | mean ± sd | difference to "{label}" |',
        '|---|---:|---:|---|---:|---:|',
    ]
    for s in summaries:
        seeds = ', '.join(f'{s.values[seed]:.1f}' for seed in sorted(s.values))
        difference = '' if s.difference is None else _with_intervals(s.difference)
        lines.append(
            f'| {s.label} | {s.parameters:,} | {s.multiply_adds / 1e6:.1f}M | {seeds} | '
            f'{mean_and_deviation(s.values.values())} | {difference} |'
        )
    compared = compare_pairs(results)
    if compared:
        lines += ['', '| comparison | difference by seed | mean |', '|---|---|---:|']
    for label, other, difference in compared:
        seeds = ', '.join(f'{value:+.1f}' for value in difference.values.values())
        lines.append(f'| {label}, against {other} | {seeds} | {_with_intervals(difference)} |')
    tests = compare_with_references(results)
    if tests:
        lines += ['', *_dunnett_table(tests, results['labels'])]
    return '\n'.join([*lines, '', provenance(results['runs'], metric, bool(tests))])


def _dunnett_table(tests: dict[str, dict[str, DunnettDifference]], labels: dict[str, str]) -> list[str]:
    """Write a row for each variant, and a column for each reference."""
    heads = [f'difference to "{labels[reference]}"' for reference in tests]
    lines = [f"| Dunnett's test | {' | '.join(heads)} |", f'|---|{"---:|" * len(heads)}']
    for variant, label in labels.items():
        found = [differences.get(variant) for differences in tests.values()]
        if any(found):
            cells = ['' if x is None else f'{x.mean:+.1f} [{x.low:+.1f}, {x.high:+.1f}]' for x in found]
            lines.append(f'| {label} | {" | ".join(cells)} |')
    return lines


def _with_intervals(difference: Difference) -> str:
    text = f'{difference.mean:+.1f}'
    if difference.bootstrap and difference.student:
        text += ' [{:+.1f}, {:+.1f}]'.format(*difference.bootstrap)
        text += ' ({:+.1f} to {:+.1f})'.format(*difference.student)
    return text


def provenance(runs: Sequence[dict[str, Any]], metric: str, has_dunnett: bool = False) -> str:
    """Data, epochs, time, hardware and revisions of the runs, in one line of text.

    Args:
        runs: of the results.
        metric: what the metric is called.
        has_dunnett: whether to explain the intervals of Dunnett's test, too.
    """
    data = runs[0]['data']
    epochs = sorted({len(run['epochs']) for run in runs})
    facts = [
        f'{len(runs)} runs',
        f'{data["train"]["images"]:,} training and {data["val"]["images"]:,} validation images',
        f'epochs: {" or ".join(map(str, epochs))}, {metric} after the last',
        f'{sum(run["train_seconds"] for run in runs) / 3600:.1f} run-hours of training',
        'differences are paired by seed',
    ]
    if len(runs) > len({run['variant'] for run in runs}):  # some have several seeds
        facts.append("95 % intervals: [bootstrap over seeds] (Student's t)")
    if has_dunnett:
        facts.append("Dunnett's test: [simultaneous 95 % intervals for all differences to a reference]")
    for key, name in (('processor', 'processor'), ('device', 'device'), ('torch', 'torch'), ('revision', 'revision')):
        values = {run['environment'][key] for run in runs}
        if key == 'revision':
            values = set(map(short_revision, values))
        facts.append(f'{name} {", ".join(sorted(values))}')
    return '; '.join(facts) + '.'
