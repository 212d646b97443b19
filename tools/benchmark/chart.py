"""A chart of results: time and, where it was measured, memory."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.benchmark.comparison import Result


def chart(results: Sequence[Result]) -> Figure:
    """Draw bars per setting, or curves over the pixels of a batch where sizes or batches differ."""
    panels = [('Time per run', [1e3 * result.seconds.median for result in results], 'ms')]
    if all(result.memory is not None for result in results):
        panels.append(('Peak memory', [result.memory / 2**20 for result in results], 'MB'))
    has_curves = len({result.pixels for result in results}) > 1
    height = 4.8 if has_curves else max(4.8, 0.3 * len(results))
    figure = Figure(figsize=(6.5 * len(panels), height), layout='constrained')
    row = figure.subplots(1, len(panels), sharey=not has_curves, squeeze=False)[0]
    for axes, (title, values, unit) in zip(row, panels, strict=True):
        axes.set_title(title)
        (_draw_curves if has_curves else _draw_bars)(axes, results, values, unit)
        axes.spines[['top', 'right']].set_visible(False)
        axes.grid(alpha=0.3, axis='both' if has_curves else 'x')
        axes.set_axisbelow(True)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=2)
    return figure


def _draw_bars(axes: Axes, results: Sequence[Result], values: Sequence[float], unit: str) -> None:
    names = list(dict.fromkeys(result.name for result in results))
    settings = list(dict.fromkeys(result.setting for result in results))
    height, label_format = 0.8 / len(names), '{:,.0f}' if max(values) >= 100 else '{:.2f}'
    for number, name in enumerate(names):
        pairs = [(r.setting, value) for r, value in zip(results, values, strict=True) if r.name == name]
        positions = [settings.index(setting) + number * height for setting, _ in pairs]
        bars = axes.barh(positions, [value for _, value in pairs], height, label=name)
        axes.bar_label(bars, fmt=label_format, padding=2, fontsize=8)
    axes.set_yticks([i + (len(names) - 1) * height / 2 for i in range(len(settings))], map(str, settings))
    axes.set_ylim(len(settings) - 0.1 - height / 2, -0.1 - height / 2)  # the first setting on top
    axes.set_xlabel(unit)


def _draw_curves(axes: Axes, results: Sequence[Result], values: Sequence[float], unit: str) -> None:
    curves: dict[str, list[tuple[float, float]]] = {}
    for result, value in zip(results, values, strict=True):
        points = curves.setdefault(f'{result.name}, {result.setting.variant}', [])
        points.append((result.pixels / 1e6, value))
    for number, (label, points) in enumerate(curves.items()):
        points.sort()
        (line,) = axes.loglog(*zip(*points, strict=True), marker='o', label=label)
        first_x, first_y = points[0]
        last_x = points[-1][0]
        axes.loglog(
            [first_x, last_x],
            [first_y, first_y * last_x / first_x],
            ':',
            color=line.get_color(),
            alpha=0.6,
            label='proportional to pixels' if number == 0 else None,
        )
    axes.set_xlabel('million pixels per batch')
    axes.set_ylabel(unit)
