"""Draw the curves of runs from their metrics.jsonl: losses, accuracy and learning rate over the epochs.

    python -m tools.plot --run output/msg_tiny_p4_win7_224/default
    python -m tools.plot --run output/msg_tiny_p4_win7_224/* --output curves.svg

Each run has a colour. The training loss is that of single updates, as logged every PRINT_FREQ updates, and its
exponential moving average; nothing else is averaged.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from data.drawn_text import fit_font, shorten
from data.figure_style import MUTED, PALETTE, tidy_axes
from logger import KINDS, parse_record
from tools.output_files import prepare_figure, save_figure
from utils import UserError, exit_on_user_error, home_path, printable

# Metrics of classifiers and detectors in metrics.jsonl, and the styles of their lines
TITLES = {'acc1': 'Top-1 accuracy', 'map': 'Mean average precision', 'box_AP': 'Box AP', 'mask_AP': 'Mask AP'}
MAX_TITLE, MAX_NAME = 110, 60  # characters of a run's name: alone, and in a legend
STYLES = {'acc1': 'solid', 'map': 'solid', 'box_AP': 'dashed', 'mask_AP': 'dotted'}
EPILOG = """
example:
  python -m tools.plot --run output/msg_tiny_p4_win7_224/a output/msg_tiny_p4_win7_224/b --output curves.svg
"""


class PlotError(UserError):
    """A run that cannot be drawn."""


class RunMetrics(NamedTuple):
    """A run's records in order; of updates and epochs that were trained again, only the last record.

    Attributes:
        name: of the run, among those of the figure.
        epochs: of its finished epochs.
        updates: of single updates.
    """

    name: str
    epochs: list[dict[str, Any]]
    updates: list[dict[str, Any]]

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Numbers of finished epochs and the values of a metric after them, where it is known."""
        points = [(record['epoch'] + 1, _number(record[key])) for record in self.epochs if key in record]
        return [x for x, _ in points], [y for _, y in points]

    @property
    def loss_names(self) -> list[str]:
        """The losses that `loss` sums, of a detector."""
        return [key for key in (self.updates[0] if self.updates else ()) if key.startswith('loss_')]

    def training_loss(self, name: str = 'loss') -> tuple[np.ndarray, np.ndarray]:
        """Finished epochs, as fractions, and the loss of the update there, where it was finite."""
        updates, losses = (np.array([_number(record.get(key)) for record in self.updates]) for key in ('updates', name))
        ends = [0, *(record.get('updates', 0) for record in self.epochs)]
        epochs = [0, *(record['epoch'] + 1 for record in self.epochs)]
        slope = (epochs[-1] - epochs[-2]) / max(ends[-1] - ends[-2], 1)  # of an epoch that is not finished
        x = np.interp(updates, ends, epochs) + slope * np.maximum(updates - ends[-1], 0)
        is_finite = np.isfinite(losses)
        return x[is_finite], losses[is_finite]

    def final(self) -> str:
        """The metrics at the end, in words."""
        last = self.epochs[-1]
        return ', '.join(f'{title} {_number(last[name]):.1f} %' for name, title in TITLES.items() if name in last)


def _number(value: float | None) -> float:
    """A number of metrics.jsonl, which has null for those that are not finite."""
    return math.nan if value is None else value


def read_run(run: Path, name: str) -> RunMetrics:
    """Read the metrics of a run's folder.

    Raises:
        PlotError: they are missing, or are not metrics.
    """
    path = run / 'metrics.jsonl'
    try:
        lines = path.read_text(encoding='utf-8').splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else 'not a text'
        raise PlotError(f'{path}: {reason}: give --run the folder of a run') from error
    records: dict[str, dict[int, dict[str, Any]]] = {kind: {} for kind in KINDS}
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_record(line)
            records[record['kind']][record['epoch' if record['kind'] == 'epoch' else 'updates']] = record
        except (ValueError, KeyError) as error:
            if number < len(lines):  # the last line of a run that was killed may be truncated
                raise PlotError(f'{path}, line {number} is not a record of a run: {error}') from error
    return RunMetrics(name, *([records[kind][key] for key in sorted(records[kind])] for kind in ('epoch', 'train')))


def read_runs(folders: Sequence[Path]) -> list[RunMetrics]:
    """Read runs, each folder once; say on stderr which have no finished epoch and are left out.

    Raises:
        PlotError: one cannot be read, or none has a finished epoch.
    """
    by_path = {folder.resolve(): folder for folder in folders}
    runs = [read_run(folder, name) for folder, name in zip(by_path.values(), short_names([*by_path]), strict=True)]
    unfinished = [folder for folder, run in zip(by_path.values(), runs, strict=True) if not run.epochs]
    if len(unfinished) == len(runs):
        raise PlotError(f'{unfinished[0] / "metrics.jsonl"} holds no finished epoch yet')
    for folder in unfinished:
        print(printable(f'{folder} has no finished epoch yet and is left out'), file=sys.stderr)
    return [run for run in runs if run.epochs]


def short_names(folders: Sequence[Path]) -> list[str]:
    """The shortest parts of the folders' paths that differ; model and tag of a single one."""
    if len(folders) == 1:
        return ['/'.join(folders[0].parts[-2:])]
    count = 1
    while len({folder.parts[-count:] for folder in folders}) < len(folders):
        count += 1
    names = [folder.parts[-count:] for folder in folders]
    while len({name[-1] for name in names}) == 1:
        names = [name[:-1] for name in names]
    return ['/'.join(name) for name in names]


def moving_average(x: np.ndarray, y: np.ndarray, width: float) -> np.ndarray:
    """Exponential moving average of points: the weight of a point falls by e over a width on the x axis."""
    averages, total, weight = [], 0.0, 0.0
    for distance, value in zip(np.diff(x, prepend=x[:1]), y, strict=True):
        decay = math.exp(-distance / width)
        total, weight = total * decay + value, weight * decay + 1
        averages.append(total / weight)
    return np.array(averages)


def plot(runs: Sequence[RunMetrics], smooth: float = 1.0) -> Figure:
    """Draw runs on one page.

    Args:
        runs: at least one, with finished epochs.
        smooth: width of the training loss's moving average, in epochs; 0 for none.
    """
    labels = [f'{shorten(run.name, MAX_NAME)}: {run.final()}' for run in runs]
    legend_height = 0.25 * math.ceil(len(runs) / _legend_columns(labels, 12)) if len(runs) > 1 else 0
    figure = Figure(figsize=(12, 3.5 + legend_height), layout='constrained')
    loss, accuracy, rate = figure.subplots(1, 3, sharex=True)
    colors = _colors(len(runs))
    for run, color in zip(runs, colors, strict=True):
        x, y = run.training_loss()
        if smooth > 0:
            loss.plot(x, y, color=color, alpha=0.25, linewidth=0.7)
            y = moving_average(x, y, smooth)
        loss.plot(x, y, color=color, linestyle='dashed')
        marker = 'o' if len(run.epochs) == 1 else None  # a line needs two points
        loss.plot(*run.curve('val_loss'), color=color, marker=marker)
        for name, style in STYLES.items():
            accuracy.plot(*run.curve(name), color=color, linestyle=style, marker=marker)
        rate.plot(*run.curve('lr'), color=color, marker=marker)
    average = f', average over {smooth:g} epoch(s)' if smooth > 0 else ''
    styles = {f'training (augmented){average}': 'dashed'}
    if any(run.curve('val_loss')[0] for run in runs):  # detectors have it with TEST.LOSS
        styles['evaluation'] = 'solid'
    loss.set_title('Loss')
    loss.set_ylim(bottom=0)
    _style_legend(loss, styles)
    known = [name for name in TITLES if any(run.curve(name)[0] for run in runs)]
    accuracy.set_title(f'{runs[0].final()} at the end' if len(runs) == 1 else ', '.join(map(TITLES.get, known)))
    accuracy.set_ylabel('%')
    if len(known) > 1:
        _style_legend(accuracy, {TITLES[name]: STYLES[name] for name in known})
    rate.set_title('Learning rate')
    for axes in (loss, accuracy, rate):
        axes.set_xlabel('epoch')
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        tidy_axes(axes)
    if len(runs) == 1:
        [title], font = fit_font([shorten(runs[0].name.replace('/', ' / '), MAX_TITLE)])
        figure.suptitle(title, font=font, fontsize=12, parse_math=False)
    else:
        _name_runs(figure, labels)
    return figure


def plot_losses(runs: Sequence[RunMetrics], smooth: float = 1.0) -> Figure:
    """Draw each loss of detectors on separate axes; dotted lines are the same loss of evaluation images (TEST.LOSS).

    Args:
        runs: at least one.
        smooth: width of the moving average, in epochs; 0 for none.

    Raises:
        PlotError: a run has a single loss.
    """
    for run in runs:
        if not run.loss_names:
            raise PlotError(f'{run.name} has a single loss, which is drawn without --losses')
    names = list(dict.fromkeys(name for run in runs for name in run.loss_names))
    columns = min(len(names), 4)
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.4 * rows + 0.4), layout='constrained')
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for axes in grid.flat[len(names) :]:
        axes.axis('off')
    for axes, name in zip(grid.flat, names, strict=False):
        for run, color in zip(runs, _colors(len(runs)), strict=True):
            if name in run.loss_names:
                x, y = run.training_loss(name)
                axes.plot(x, moving_average(x, y, smooth) if smooth > 0 else y, color=color, label=run.name)
                evaluated = run.curve(f'val_{name}')
                if evaluated[0]:
                    axes.plot(*evaluated, color=color, linestyle='dotted', marker='.')
        axes.set_title(name.removeprefix('loss_'), fontsize=9)
        axes.set_ylim(bottom=0)
        tidy_axes(axes)
    _name_runs(figure, [shorten(run.name, MAX_NAME) for run in runs])
    return figure


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """Columns of a legend, at most three, that labels of this length leave room for in a width in inches."""
    return min(max(int(width * 11 / (max(map(len, labels)) + 6)), 1), len(labels), 3)


def _name_runs(figure: Figure, labels: Sequence[str]) -> None:
    """Draw a legend of the runs' colours below a figure."""
    handles = [Line2D([], [], color=color) for color in _colors(len(labels))]
    columns = _legend_columns(labels, figure.get_figwidth())
    legend = figure.legend(handles, [''] * len(labels), loc='outside lower center', ncols=columns)
    drawn, font = fit_font(labels)
    for text, label in zip(legend.get_texts(), drawn, strict=True):  # given to `legend`, $ and _ would have a meaning
        text.set(text=label, font=font, fontsize=text.get_fontsize(), parse_math=False)


def _colors(count: int) -> list:
    """A colour for each run."""
    if count <= len(PALETTE):
        return list(PALETTE[:count])
    return list(colormaps['turbo'](np.linspace(0.05, 0.95, count)))


def _style_legend(axes: Axes, styles: dict[str, str]) -> None:
    """Draw a legend of the line styles."""
    axes.legend([Line2D([], [], color=MUTED, linestyle=style) for style in styles.values()], styles, fontsize=8)


def epochs(text: str) -> float:
    """A number of epochs, as the `type` of an argument.

    Raises:
        ArgumentTypeError: the text is none.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f'{text} is not a number of epochs: write 0 or more')
    return value


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(
        'python -m tools.plot',
        description=__doc__.splitlines()[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('--run', type=home_path, nargs='+', action='extend', required=True, metavar='DIR', help='folders of runs')
    add(
        '--smooth',
        type=epochs,
        default=1.0,
        metavar='W',
        help='epochs to average the training loss over; 0 for none (1)',
    )
    add('--losses', action='store_true', help='draw each loss of a detector instead')
    add(
        '--output',
        type=home_path,
        metavar='FILE',
        help='.png, .svg or .pdf to write (of a single run: <run>/curves.png)',
    )
    args = parser.parse_args()
    if args.output is None and len(args.run) > 1:
        parser.error('several runs need an --output')
    output = args.output or args.run[0] / 'curves.png'
    with exit_on_user_error():
        runs = read_runs(args.run)
        prepare_figure(output)
        save_figure((plot_losses if args.losses else plot)(runs, args.smooth), output, dpi=120)
        print(printable(output))


if __name__ == '__main__':
    main()
