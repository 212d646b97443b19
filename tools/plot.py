"""Draw a run's curves from its metrics.jsonl: losses, accuracy and learning rate over the epochs.

python -m tools.plot --run output/msg_tiny_p4_win7_224/default --output curves.png
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from utils import UserError, exit_on_user_error

# Metrics of classifiers and detectors in metrics.jsonl.
TITLES = {'acc1': 'Top-1 accuracy', 'box_AP': 'Box AP', 'mask_AP': 'Mask AP'}


class PlotError(UserError):
    """A run that cannot be drawn."""


def read_epochs(path: Path) -> list[dict]:
    """One record per epoch, in order; the last one of an epoch that was trained again.

    Raises:
        PlotError: the file is missing or holds no epoch.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise PlotError(f'{path}: {error.strerror}: give --run the folder of a run') from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):  # the last line of a run that was killed may be truncated
                raise PlotError(f'{path}, line {number}: {error}') from error
    epochs = {record['epoch']: record for record in records if record['kind'] == 'epoch'}
    if not epochs:
        raise PlotError(f'{path} holds no finished epoch yet')
    return [epochs[epoch] for epoch in sorted(epochs)]


def plot(run: Path, output: Path) -> None:
    """Draw the curves of a run's folder.

    Raises:
        PlotError: there is nothing to draw, or the image cannot be written.
    """
    epochs = read_epochs(run / 'metrics.jsonl')
    numbers = [record['epoch'] + 1 for record in epochs]
    figure = Figure(figsize=(12, 3.5), layout='constrained')
    loss, accuracy, rate = figure.subplots(1, 3)
    loss.plot(numbers, [record['train_loss'] for record in epochs], label='training (augmented)')
    if 'val_loss' in epochs[0]:  # detectors have none
        loss.plot(numbers, [record['val_loss'] for record in epochs], label='evaluation')
    loss.set_title('Loss')
    loss.set_ylim(bottom=0)
    loss.legend()
    titles = {name: title for name, title in TITLES.items() if name in epochs[0]}
    for name, title in titles.items():
        accuracy.plot(numbers, [record[name] for record in epochs], label=title)
    final = ', '.join(f'{title} {epochs[-1][name]:.1f} %' for name, title in titles.items())
    accuracy.set_title(f'{final} at the end')
    accuracy.set_ylabel('%')
    if len(titles) > 1:
        accuracy.legend()
    rate.plot(numbers, [record['lr'] for record in epochs])
    rate.set_title('Learning rate')
    for axes in (loss, accuracy, rate):
        axes.set_xlabel('epoch')
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)
    figure.suptitle(f'{run.parent.name} / {run.name}')
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=120)
    except (OSError, ValueError) as error:  # a file for a folder, an unknown format
        raise PlotError(f'{output}: {error}') from error


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--run', type=Path, required=True, metavar='DIR', help='folder of the run')
    parser.add_argument('--output', type=Path, metavar='FILE', help='image to write (<run>/curves.png)')
    args = parser.parse_args()
    output = args.output or args.run / 'curves.png'
    with exit_on_user_error():
        plot(args.run, output)
    print(output)


if __name__ == '__main__':
    main()
