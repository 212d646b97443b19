"""A chart of results: time and memory."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.benchmark.timing import Result


def draw(results: Sequence[Result], path: Path) -> None:
    """Draw bars per setting, or curves over the pixels of a batch where sizes or batches differ."""
    figure = Figure(figsize=(13, 4.8), layout='constrained')
    time, memory = figure.subplots(1, 2)
    time.set_title('Time per run')
    memory.set_title('Peak memory')
    has_curves = len({(r.setting.batch, r.setting.size) for r in results}) > 1
    draw_values = _curves if has_curves else _bars
    draw_values(time, results, [1e3 * r.seconds.median for r in results], 'ms')
    draw_values(memory, results, [r.memory / 2**20 for r in results], 'MB')
    for axes in (time, memory):
        axes.spines[['top', 'right']].set_visible(False)
        axes.grid(alpha=0.3, axis='both' if has_curves else 'x')
        axes.set_axisbelow(True)
    figure.legend(*time.get_legend_handles_labels(), loc='outside lower center', ncols=2)
    figure.savefig(path, dpi=120)


def _bars(axes: Axes, results: Sequence[Result], values: Sequence[float], unit: str) -> None:
    networks = list(dict.fromkeys(r.network for r in results))
    settings = list(dict.fromkeys(r.setting for r in results))
    height = 0.8 / len(networks)
    for number, network in enumerate(networks):
        pairs = [(r.setting, value) for r, value in zip(results, values, strict=True) if r.network == network]
        positions = [settings.index(setting) + number * height for setting, _ in pairs]
        bars = axes.barh(positions, [value for _, value in pairs], height, label=network)
        axes.bar_label(bars, fmt='%.0f', padding=2, fontsize=8)
    labels = [f'{s.mode}, batch {s.batch}\n{s.precision}, {s.compile_mode}, {s.size} px' for s in settings]
    axes.set_yticks([i + (len(networks) - 1) * height / 2 for i in range(len(settings))], labels)
    axes.invert_yaxis()
    axes.set_xlabel(unit)


def _curves(axes: Axes, results: Sequence[Result], values: Sequence[float], unit: str) -> None:
    curves: dict[str, list[tuple[float, float]]] = {}
    for r, value in zip(results, values, strict=True):
        s = r.setting
        threads = f', {s.threads} thread(s)' if s.threads else ''
        curves.setdefault(f'{r.network}, {s.mode}, {s.precision}, {s.compile_mode}{threads}', []).append(
            (s.batch * s.size**2 / 1e6, value)
        )
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
