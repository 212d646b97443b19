"""A chart of results: time and, where it was measured, memory."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from data.figure_style import CHART_STYLE, FONT_SIZE, INK, MUTED, PALETTE, add_margin, tidy_axes
from tools.benchmark.comparison import Result, without_form

PANEL = (4.2, 3.0)  # inches of a panel of curves
LINES = ('-', '--', '-.', ':')  # one per setting, such as the number of threads
MARKERS = ('o', 's', '^', 'D')  # one per form of a network


def chart(results: Sequence[Result]) -> Figure:
    """Draw bars per setting, or curves over the size or the batch where they differ."""
    with matplotlib.rc_context(CHART_STYLE):
        if len({result.pixels for result in results}) == 1:
            return _bars(results)
        figure = Figure(figsize=(PANEL[0] * len(_panels(results)), PANEL[1]), layout='constrained')
        add_margin(figure)
        draw_curves(figure, results)
        return figure


def _panels(results: Sequence[Result]) -> list[tuple[str, list[float]]]:
    """The title of each panel, and the value of each result in it."""
    panels = [('time, ms', [1e3 * result.seconds.median for result in results])]
    if all(result.memory is not None for result in results):
        panels.append(('peak memory, MB', [result.memory / 2**20 for result in results]))
    return panels


def _bars(results: Sequence[Result]) -> Figure:
    panels = _panels(results)
    figure = Figure(figsize=(5 * len(panels), max(3.0, 0.2 * len(results) + 1)), layout='constrained')
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, values) in zip(row, panels, strict=True):
        _draw_bars(axes, results, values)
        axes.set_xlabel(title)
        tidy_axes(axes, grid='x')
    figure.legend(*row[0].get_legend_handles_labels(), loc='outside lower center', ncols=2, frameon=False)
    return figure


def _draw_bars(axes: Axes, results: Sequence[Result], values: Sequence[float]) -> None:
    names = list(dict.fromkeys(result.name for result in results))
    settings = list(dict.fromkeys(result.setting for result in results))
    height, label_format = 0.8 / len(names), '{:,.0f}' if max(values) >= 100 else '{:.2f}'
    for number, name in enumerate(names):
        pairs = [(r.setting, value) for r, value in zip(results, values, strict=True) if r.name == name]
        positions = [settings.index(setting) + number * height for setting, _ in pairs]
        color = PALETTE[number % len(PALETTE)]
        bars = axes.barh(positions, [value for _, value in pairs], height, color=color, label=name)
        axes.bar_label(bars, fmt=label_format, padding=2)
    axes.set_yticks([i + (len(names) - 1) * height / 2 for i in range(len(settings))], map(str, settings))
    axes.set_ylim(len(settings) - 0.1 - height / 2, -0.1 - height / 2)  # the first setting on top


def draw_curves(figure: FigureBase, results: Sequence[Result], labels: Mapping[str, str] | None = None) -> None:
    """Draw time and memory over the image size, over the batch, or over the pixels where both differ.

    A network has a colour, and its name stands at the end of its curve; the peer, which is the last one, is a pale
    band. A setting, such as a number of threads, has a kind of line.

    Args:
        figure: empty figure or subfigure.
        results: of at least two sizes or batches.
        labels: what to write instead of the names of networks and settings.
    """
    labels = labels or {}
    variants = list(dict.fromkeys(result.setting.variant for result in results))
    parts = [variant.split(', ') for variant in variants]
    shared = [part for part in parts[0] if all(part in other for other in parts)]
    panels = _panels(results)
    for axes, (title, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw_panel(axes, results, values, variants, labels)
        axes.set_title(f'{title}: {", ".join(labels.get(part, part) for part in shared)}', loc='left')
    shown = []
    for part, style in zip(parts, LINES * len(parts), strict=False) if len(parts) > 1 else ():
        name = ', '.join(word for word in part if word not in shared)
        shown.append(Line2D([], [], color=INK, linestyle=style, label=labels.get(name, name)))
    shown.append(Line2D([], [], color=MUTED, linestyle=':', linewidth=0.8, label='proportional to pixels'))
    figure.legend(handles=shown, loc='outside lower center', ncols=len(shown), frameon=False)


def _draw_panel(
    axes: Axes, results: Sequence[Result], values: Sequence[float], variants: Sequence[str], labels: Mapping[str, str]
) -> None:
    curves: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for result, value in sorted(zip(results, values, strict=True), key=lambda pair: pair[0].pixels):
        curves.setdefault((result.name, result.setting.variant), []).append((result.pixels, value))
    names = list(dict.fromkeys(result.name for result in results))
    networks = list(dict.fromkeys(map(without_form, names)))
    ends: dict[str, tuple[float, str]] = {}
    for (name, variant), points in curves.items():
        network = without_form(name)
        form = [other for other in names if without_form(other) == network].index(name)
        look = {'color': PALETTE[networks.index(network) % len(PALETTE)], 'marker': MARKERS[form % len(MARKERS)]}
        if len(networks) > 1 and network == networks[-1]:  # a pale band, below curves that may coincide with it
            look |= {'color': INK, 'linewidth': 4, 'alpha': 0.3, 'markersize': 0, 'zorder': 1.5}
        axes.loglog(*zip(*points, strict=True), LINES[variants.index(variant) % len(LINES)], **look)
        if variant == variants[0]:
            ends[labels.get(name, name)] = (points[-1][1], look['color'])
    first_x, first_y = min(points[0] for points in curves.values())
    last_x = max(points[-1][0] for points in curves.values())
    limits = axes.get_ylim()
    axes.loglog([first_x, last_x], [first_y, first_y * last_x / first_x], ':', color=MUTED, linewidth=0.8, zorder=1)
    axes.set_ylim(limits)  # those of the measurements
    ticks = {result.pixels: result.setting for result in results}
    sizes, batches = ({getattr(setting, key) for setting in ticks.values()} for key in ('size', 'batch'))
    if len(batches) == 1:
        axes.set_xlabel(f'image size, px (batch {batches.pop()})')
        texts = [str(setting.size) for setting in ticks.values()]
    elif len(sizes) == 1:
        axes.set_xlabel(f'images per batch ({sizes.pop()} px)')
        texts = [str(setting.batch) for setting in ticks.values()]
    else:
        axes.set_xlabel('million pixels per batch')
        texts = [f'{pixels / 1e6:.2g}' for pixels in ticks]
    _set_ticks(axes, dict(sorted(zip(ticks, texts, strict=True))))
    tidy_axes(axes)
    _label_ends(axes, last_x, ends)


def _set_ticks(axes: Axes, texts: Mapping[float, str]) -> None:
    """Write plain numbers on both axes; on the x axis those of the measurements, unless they would touch."""
    nearest = 0.13 * np.log10(max(texts) / min(texts))
    labels: list[str] = []
    last = np.inf
    for x, text in reversed(texts.items()):
        is_shown = last - np.log10(x) > nearest
        labels.insert(0, text if is_shown else '')
        last = np.log10(x) if is_shown else last
    axes.set_xticks([*texts], labels)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:,.10g}'))
    axes.yaxis.set_minor_locator(NullLocator())


def _label_ends(axes: Axes, x: float, ends: Mapping[str, tuple[float, str]]) -> None:
    """Write the names of curves at their ends, at a distance that keeps them apart."""
    low, high = np.log10(axes.get_ylim())
    gap = 1.15 * FONT_SIZE / 72 / (PANEL[1] - 1) * (high - low)  # of a line of text
    place = -np.inf
    for name, (y, color) in sorted(ends.items(), key=lambda item: item[1][0]):
        place = max(np.log10(y), place + gap)
        style = {'color': color, 'va': 'center', 'annotation_clip': False}
        axes.annotate(name, (x, 10**place), (5, 0), textcoords='offset points', **style)
