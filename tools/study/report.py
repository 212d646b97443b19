"""Results of a study: Markdown tables, a chart, JSON."""

import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from data.drawn_text import fit_font
from tools.output_files import save_figure, write_text
from tools.study.statistics import Difference, Summary, compare_pairs, summarise


def write_results(results: dict[str, Any], output: Path) -> None:
    """Write `study.json`, with a line for each run, and `study.md` and `study.png`.

    Args:
        results: see `tools.study.runs.collect`.
        output: folder.
    """
    head = json.dumps({key: value for key, value in results.items() if key != 'runs'}, indent=1).removesuffix('\n}')
    runs = ',\n  '.join(json.dumps(run) for run in results['runs'])
    write_text(output / 'study.json', [head, ',\n "runs": [\n  ', runs, '\n ]\n}\n'])
    if runs:
        write_text(output / 'study.md', [table(results), '\n'])
        save_figure(chart(results), output / 'study.png', dpi=100)


def table(results: dict[str, Any]) -> str:
    """Markdown tables of variants and of the study's comparisons, and below them how the runs came about.

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
        spread = '' if math.isnan(s.deviation) else f' ± {s.deviation:.1f}'
        difference = '' if s.difference is None else _with_intervals(s.difference)
        lines.append(
            f'| {s.label} | {s.parameters:,} | {s.multiply_adds / 1e6:.1f}M | {seeds} | {s.mean:.1f}{spread} | '
            f'{difference} |'
        )
    compared = compare_pairs(results)
    if compared:
        lines += ['', '| comparison | difference by seed | mean |', '|---|---|---:|']
    for label, other, difference in compared:
        seeds = ', '.join(f'{value:+.1f}' for value in difference.values.values())
        lines.append(f'| {label}, against {other} | {seeds} | {_with_intervals(difference)} |')
    return '\n'.join([*lines, '', provenance(results['runs'], metric)])


def _with_intervals(difference: Difference) -> str:
    text = f'{difference.mean:+.1f}'
    if difference.bootstrap and difference.student:
        text += ' [{:+.1f}, {:+.1f}]'.format(*difference.bootstrap)
        text += ' ({:+.1f} to {:+.1f})'.format(*difference.student)
    return text


def provenance(runs: Sequence[dict[str, Any]], metric: str) -> str:
    """Data, epochs, time, hardware and revisions of the runs, in one line of text."""
    data = runs[0]['data']
    epochs = sorted({len(run['epochs']) for run in runs})
    facts = [
        f'{len(runs)} runs',
        f'{data["train"]["images"]:,} training and {data["val"]["images"]:,} validation images',
        f'epochs: {" or ".join(map(str, epochs))}, {metric} after the last',
        f'{sum(run["train_seconds"] for run in runs) / 3600:.1f} run-hours of training',
        "differences are paired by seed; 95 % intervals: [bootstrap over seeds] (Student's t)",
    ]
    for key, name in (('processor', 'processor'), ('device', 'device'), ('torch', 'torch'), ('revision', 'revision')):
        values = {run['environment'][key][: 7 if key == 'revision' else None] for run in runs}
        facts.append(f'{name} {", ".join(sorted(values))}')
    return '; '.join(facts) + '.'


def chart(results: dict[str, Any]) -> Figure:
    """The metric over the epochs (mean, and range over seeds) and at the end (a point per seed, a bar for the mean).

    Args:
        results: see `tools.study.runs.collect`.
    """
    summaries, metric = summarise(results), results['metric_name']
    figure = Figure(figsize=(11, 2.2 + 0.42 * len(summaries)), layout='constrained')
    curves, final = figure.subplots(1, 2, width_ratios=(1, 1.15))
    colors = colormaps['tab10'].colors
    for i, s in enumerate(summaries):
        color = colors[i % len(colors)]
        _draw_curve(curves, s, color)
        values = [*s.values.values()]
        final.plot(values, [i] * len(values), 'o', color=color, markersize=4, alpha=0.7)
        final.plot([s.mean] * 2, [i - 0.3, i + 0.3], color=color)
        final.annotate(f'{s.mean:.1f}', (max(values), i), (6, 0), textcoords='offset points', va='center', fontsize=9)
    curves.set(xlabel='epoch', ylabel=f'{metric}, %', title='mean and range over seeds')
    curves.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    final.set(xlabel=f'{metric} after the last epoch, %', title='seeds, and their mean')
    labels, font = fit_font([textwrap.fill(s.label, 45, max_lines=2, placeholder='…') for s in summaries])
    final.set_yticks(range(len(summaries)), labels, font=font, fontsize=9, parse_math=False)
    final.invert_yaxis()
    final.margins(x=0.12)
    for axes in (curves, final):
        axes.grid(alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)
    return figure


def _draw_curve(axes: Any, summary: Summary, color: Any) -> None:
    epochs = np.arange(1, summary.curves.shape[1] + 1)
    marker = 'o' if len(epochs) == 1 else None  # a line needs two points
    axes.plot(epochs, summary.curves.mean(axis=0), color=color, marker=marker)
    axes.fill_between(epochs, summary.curves.min(axis=0), summary.curves.max(axis=0), color=color, alpha=0.15, lw=0)
