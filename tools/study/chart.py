"""Chart of a study, for documents and papers: one font size, a colour-blind-safe palette, direct labels."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch
from matplotlib.ticker import MaxNLocator

from data.drawn_text import DrawnText, fit_font
from data.figure_style import CHART_STYLE, FONT_SIZE, PALETTE, add_margin, tidy_axes
from tools.study.statistics import Summary, summarise

TWO_COLUMNS = 7.0  # width in inches, of a page with two columns of text
MIN_WIDTH, MAX_WIDTH = 3.0, 20.0
STACKED_BELOW = 6.0  # a narrower chart has its two panels one above the other
LABEL_LETTERS, NARROW_LETTERS, LABEL_LINES = 26, 18, 3  # most letters in a line of a label, most lines

MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X', '*')  # eight, so that no two of 56 variants share colour and marker
LINES = ('-', '--', '-.', ':')  # the next one after each round of colours


def chart(results: dict[str, Any], width: float = TWO_COLUMNS) -> Figure:
    """Draw the metric over the epochs (mean and range over seeds) and of each seed after the last epoch.

    Variants are sorted by their final mean, and each label stands at the end of its curve and in the row of its seeds.

    Args:
        results: see `tools.study.runs.collect`.
        width: of the chart, in inches. Below 6, the seeds are drawn below the curves.
    """
    summaries, metric = summarise(results), results['metric_name']
    ranks = sorted(range(len(summaries)), key=lambda i: -np.nan_to_num(summaries[i].mean))
    ranked = [summaries[i] for i in ranks]
    styles = [_style(i) for i in ranks]  # by the place in the study
    is_stacked = width < STACKED_BELOW
    labels = fit_font([_wrapped(s.label, NARROW_LETTERS if is_stacked else LABEL_LETTERS) for s in ranked])
    lines = max(text.count('\n') + 1 for text in labels.texts)
    height = max(1.8, len(ranked) * (lines * 1.2 + 0.4) * FONT_SIZE / 72)  # inches of a panel
    with matplotlib.rc_context(CHART_STYLE):
        # The axes of labels have almost no width: the layout makes room for what extends beyond them.
        if is_stacked:
            figure = Figure(figsize=(width, 2 * height + 1.2), layout='constrained')
            (curves, names), (seeds, seed_names) = figure.subplots(2, 2, width_ratios=(1, 0.01))
            _draw_labels(seed_names, labels, styles)
        else:
            figure = Figure(figsize=(width, height + 0.7), layout='constrained')
            curves, names, seeds = figure.subplots(1, 3, width_ratios=(1.3, 0.01, 1))
        _draw_curves(curves, ranked, styles, metric)
        _draw_labels(names, labels, styles)
        _draw_seeds(seeds, ranked, styles, metric)
        for i, (s, style) in enumerate(zip(ranked, styles, strict=True)):
            _join(curves, (s.curves.shape[1], _mean_curve(s)[-1]), names, (0.0, i), style['color'])
    add_margin(figure)
    return figure


def _style(place: int) -> dict[str, str]:
    """Colour, marker and line of the variant at a place of the study."""
    line = LINES[place // len(PALETTE) % len(LINES)]
    return {'color': PALETTE[place % len(PALETTE)], 'marker': MARKERS[place % len(MARKERS)], 'linestyle': line}


def _wrapped(label: str, letters: int) -> str:
    return textwrap.fill(label, letters, max_lines=LABEL_LINES, placeholder='…')


def _mean_curve(summary: Summary) -> np.ndarray:
    return summary.curves.mean(axis=0)


def _draw_curves(axes: Axes, ranked: Sequence[Summary], styles: Sequence[dict[str, str]], metric: str) -> None:
    """Draw the mean over seeds of each epoch, and the range over seeds as a band."""
    for s, style in zip(ranked, styles, strict=True):
        epochs = np.arange(1, s.curves.shape[1] + 1)
        axes.plot(epochs, _mean_curve(s), **style, markevery=[-1], clip_on=False, zorder=3)
        axes.fill_between(epochs, s.curves.min(axis=0), s.curves.max(axis=0), color=style['color'], alpha=0.15, lw=0)
    last = max(s.curves.shape[1] for s in ranked)
    axes.set(xlabel='epoch', ylabel=f'{metric}, %')
    axes.set_title('mean and range over seeds', loc='left')
    axes.set_xlim(min(1, last - 1), last)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    tidy_axes(axes)


def _draw_seeds(axes: Axes, ranked: Sequence[Summary], styles: Sequence[dict[str, str]], metric: str) -> None:
    """Draw a row for each variant: a marker per seed, a bar and a number for the mean."""
    for i, (s, style) in enumerate(zip(ranked, styles, strict=True)):
        values, point = [*s.values.values()], style | {'linestyle': ''}
        axes.plot(values, [i] * len(values), **point, alpha=0.7)
        axes.plot([s.mean] * 2, [i - 0.3, i + 0.3], color=style['color'])
        if not math.isnan(s.mean):
            axes.annotate(f'{s.mean:.1f}', (max(values), i), (5, 0), textcoords='offset points', va='center')
    axes.set(xlabel=f'{metric} after the last epoch, %', yticks=[])
    axes.set_title('each seed, and the mean', loc='left')
    axes.set_ylim(len(ranked) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    values = [value for s in ranked for value in s.values.values() if not math.isnan(value)]
    if values:
        extent = max(values) - min(values) or 1.0
        axes.set_xlim(min(values) - 0.08 * extent, max(values) + 0.25 * extent)  # the numbers need room
    tidy_axes(axes)


def _draw_labels(axes: Axes, labels: DrawnText, styles: Sequence[dict[str, str]]) -> None:
    """Draw a column of labels with their markers, in rows of the same height as those of the seeds."""
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(len(labels.texts) - 0.5, -0.5))
    for i, (text, style) in enumerate(zip(labels.texts, styles, strict=True)):
        axes.plot(0, i, **style, clip_on=False)
        place = {'xytext': (5, 0), 'textcoords': 'offset points', 'va': 'center', 'annotation_clip': False}
        axes.annotate(text, (0, i), **place, font=labels.font, fontsize=FONT_SIZE, linespacing=1.0, parse_math=False)


def _join(axes: Axes, point: tuple[float, float], other: Axes, end: tuple[float, float], color: str) -> None:
    """Draw a thin line from a point of some axes to a point of others."""
    if math.isnan(point[1]):
        return
    line = ConnectionPatch(point, end, axes.transData, other.transData, color=color, linewidth=0.5, alpha=0.8)
    line.set_in_layout(False)
    axes.figure.add_artist(line)
