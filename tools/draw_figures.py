"""Draw the pictures of README and docs: windows, the shuffle and other exchanges of MSG tokens, the block, influence.

python -m tools.draw_figures --output docs
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
import io
from pathlib import Path

import matplotlib
import timm
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.ticker import FuncFormatter
from PIL import Image
from sklearn.datasets import load_sample_image

from models.exchange import EXCHANGES, Exchange
from tools.visualize.explain import trace_blocks
from tools.visualize.overlays import colour_scale, draw_overlay, influence_overlay
from tools.visualize.sheets import LABELS, percent
from tools.visualize.view import prepare, random_predictor
from utils import exit_on_user_error, home_path, printable

COLOURS = ['#4c78a8', '#f58518', '#54a24b', '#b279a2']  # one per window
# Colours that colour-blind readers can tell apart, by Okabe and Ito: one per MSG token
TOKEN_COLOURS = ['#0072b2', '#e69f00', '#009e73', '#cc79a7', '#56b4e9', '#d55e00', '#f0e442', '#a6a6a6']
EXCHANGE_LABELS = {'none': 'none', 'shuf': 'shuf\n(as trained)', 'shift': 'shift'}
PATCH, INK = '#e8e8e8', '#333333'


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--output', type=home_path, required=True, metavar='DIR', help='folder for the files')
    args = parser.parse_args()
    with exit_on_user_error():
        draw_figures(args.output)


def draw_figures(folder: Path) -> None:
    """Draw all pictures into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    matplotlib.rcParams.update({'svg.hashsalt': 'msg', 'font.size': 10, 'font.family': 'DejaVu Sans'})
    for name, draw in (('windows', draw_windows), ('exchange', draw_exchanges), ('block', draw_block)):
        draw().savefig(folder / f'{name}.svg', metadata={'Date': None})
        print(printable(folder / f'{name}.svg'))
    draw_influence().savefig(folder / 'influence.png', dpi=82)
    print(printable(folder / 'influence.png'))


def draw_windows() -> Figure:
    """A shuffle region of 2 x 2 windows, and what the shuffle does to its MSG tokens."""
    figure = Figure(figsize=(10, 4.4), layout='constrained')
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.25])
    w, gap = 4, 1.6
    for g, colour in enumerate(COLOURS):
        row, column = divmod(g, 2)
        x, y = column * (w + gap), (1 - row) * (w + gap)
        for i in range(w):
            for j in range(w):
                left.add_patch(Rectangle((x + i, y + j), 1, 1, facecolor=PATCH, edgecolor='white', linewidth=1.5))
        left.add_patch(Rectangle((x, y), w, w, fill=False, edgecolor=colour, linewidth=2.5))
        chunks(left, x - 0.1, y + w + 0.15, [colour] * 4)
        left.text(x + 2.3, y + w + 0.38, f'MSG token {g}', color=colour, va='center', fontweight='bold')
    left.set_title('Attention: within each window,\namong its patches and its MSG token')
    frame(left, (-0.4, 2 * w + gap + 0.4), (-0.4, 2 * w + gap + 1.2))

    for g, colour in enumerate(COLOURS):
        y = 6 - 2 * g
        chunks(right, 0, y, [colour] * 4)
        chunks(right, 6, y, COLOURS)
        right.text(-0.3, y + 0.25, f'{g}', ha='right', va='center', color=colour, fontweight='bold')
        right.text(8.3, y + 0.25, f'new {g}', va='center', color=INK)
    for g in range(4):
        for k in range(4):
            ends = ((k * 0.5 + 0.25, 6 - 2 * g), (6 + g * 0.5 + 0.25, 6 - 2 * k + 0.5))
            right.add_patch(
                FancyArrowPatch(
                    *ends, arrowstyle='-', shrinkA=0, shrinkB=0, color=COLOURS[g], linewidth=0.9, alpha=0.6, zorder=0
                )
            )
    right.set_title('Shuffle: each MSG token gives one chunk of its\nchannels to every MSG token of the region')
    frame(right, (-0.9, 9.6), (-0.3, 7.2))
    return figure


def draw_exchanges() -> Figure:
    """What each exchange makes of the MSG tokens of two regions of 2 x 2 windows, from the derivative of its module.

    The height of a token's colour in a chunk is the token's part of the chunk's absolute derivative. Of a linear
    exchange, the derivative is what the module gives for one-hot tokens.
    """
    figure = Figure(figsize=(11, 6.6), layout='constrained')
    panels = figure.subplots(4, 2).flat
    draw_tokens(next(panels), 'before the exchange: MSG tokens a to h, of four chunks each', torch.eye(32))
    ours = {name: exchange for name, exchange in EXCHANGES.items() if exchange.__module__ == Exchange.__module__}
    for panel, (name, exchange) in zip(panels, ours.items(), strict=True):
        draw_tokens(panel, name, token_shares(exchange))
    return figure


def token_shares(exchange: type[Exchange]) -> torch.Tensor:
    """Parts of the absolute derivative of new chunks by old ones, in two regions of 2 x 2 windows.

    Returns:
        (32, 32): chunks of new MSG tokens, in the order of windows, and of old ones. Rows sum to 1.
    """
    channels = 4  # of a chunk
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, msg = exchange(4 * channels, region_size=2), torch.randn(1, 2, 4, 4 * channels)
        for parameter in module.parameters():
            if not parameter.any():  # weights that begin as zeros hide what they can learn
                torch.nn.init.normal_(parameter, std=0.1)
    derivative = torch.autograd.functional.jacobian(module, msg).abs()
    shares = derivative.reshape(32, channels, 32, channels).sum(dim=(1, 3))
    return shares / shares.sum(dim=1, keepdim=True)


def draw_tokens(axes: Axes, title: str, shares: torch.Tensor) -> None:
    """Draw the MSG tokens of 2 x 4 windows, each chunk in the colours of the tokens that it depends on.

    Args:
        axes: where to draw.
        title: of the panel.
        shares: see `token_shares`.
    """
    height = 1.5
    for index, row in enumerate(shares):
        token, chunk = divmod(index, 4)
        x, bottom = token % 4 * 4.6 + token % 4 // 2 * 0.8 + chunk, -2.0 * (token // 4)
        by_token = row.view(8, 4).sum(dim=1)
        top = bottom + height
        for source in by_token.argsort(stable=True).tolist():  # the largest part is drawn last, on top
            part = height * round(by_token[source].item(), 2)  # the same file on any CPU
            if part > 0:
                axes.add_patch(Rectangle((x, bottom), 1, part, facecolor=TOKEN_COLOURS[source], linewidth=0))
            bottom += part
        axes.add_patch(Rectangle((x, top - height), 1, height, fill=False, edgecolor='white', linewidth=1))
        source, own = by_token.argmax().item(), row.argmax().item()
        if by_token[source] > 0.3:
            label = 'abcdefgh'[source] + (str(own % 4) if row[own] > 0.5 * by_token[source] else '')
            colour = 'white' if source in (0, 5) else 'black'
            axes.text(x + 0.5, top - 0.3 * height, label, ha='center', va='center', fontsize=8, color=colour)
    for left in (0, 10.0):
        axes.add_patch(Rectangle((left - 0.25, -2.25), 9.1, 4, fill=False, edgecolor=INK, linewidth=1))
    axes.set_title(title, fontsize=11)
    frame(axes, (-0.5, 19.5), (-2.4, 1.9))


def draw_block() -> Figure:
    """The steps of a block, with the shapes between them."""
    figure = Figure(figsize=(10, 3.0), layout='constrained')
    axes = figure.subplots()
    steps = [
        (1.7, 'LayerNorm', PATCH),
        (3.6, 'Window\nattention', '#cfe0f3'),
        (8.2, 'Shuffle of\nMSG tokens', '#fde0c0'),
        (11.2, 'LayerNorm', PATCH),
        (13.1, 'MLP', '#d6ecd2'),
    ]
    axes.plot([-1.2, 15.9], [1, 1], color=INK, linewidth=1.5, zorder=0)
    axes.plot(16, 1, '>', color=INK)
    for x, name, colour in steps:
        box = FancyBboxPatch((x - 0.8, 0.5), 1.6, 1.0, boxstyle='round,pad=0.05', facecolor=colour, edgecolor=INK)
        axes.add_patch(box)
        axes.text(x, 1, name, ha='center', va='center', fontsize=9)
    for start, end in ((0.4, 5.2), (9.9, 14.7)):
        axes.plot([start, start, end, end], [1, 1.85, 1.85, 1], color=INK, linewidth=1.5, zorder=0)
        axes.text(end, 1, '+', ha='center', va='center', bbox={'boxstyle': 'circle', 'fc': 'white', 'ec': INK})
        axes.text((start + end) / 2, 1.95, 'residual', ha='center', color=INK, fontsize=9)
    axes.text(-1.2, 0.8, 'windows\n(B, nH, nW,\nw² + 1, C)', ha='left', va='top', fontsize=9)
    axes.text(8.2, 0.25, 'only the MSG tokens,\non the residual stream itself', ha='center', va='top', fontsize=9)
    axes.text(5.2, 0.55, 'drop path,\nper region', ha='center', va='top', fontsize=9)
    axes.text(14.7, 0.55, 'drop path,\nper region', ha='center', va='top', fontsize=9)
    frame(axes, (-1.4, 16.4), (-0.6, 2.4), equal=False)
    return figure


def draw_influence() -> Figure:
    """The reach of a window's MSG token after each block, with three exchanges, over scikit-learn's photograph."""
    predictor = random_predictor('configs/msg_nano_p4_win7_112.yaml', ['DEVICE', 'cpu'])  # for its preprocessing
    png = io.BytesIO()
    Image.fromarray(load_sample_image('china.jpg')).save(png, 'PNG')
    view = prepare(predictor, png.getvalue(), 'china.jpg')
    window, blocks = (1, 1), [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]  # stage and block; stage 3 is one window
    rows = {}
    for exchange in EXCHANGE_LABELS:
        # These exchanges have no parameters, so the stored weights fit each of them.
        model = timm.create_model('msg_transformer_nano', pretrained=True, manip_type=exchange).eval()
        stages = trace_blocks(model, view.image)
        rows[exchange] = [influence_overlay(model, stages, *block, window, 'msg') for block in blocks]
    scale = colour_scale(rows['shuf'])
    figure = Figure(figsize=(10.5, 6.2), layout='constrained')
    grid = figure.subplots(len(rows), len(blocks))
    for axes_row, (exchange, overlays) in zip(grid, rows.items(), strict=True):
        for axes, overlay in zip(axes_row, overlays, strict=True):
            draw_overlay(axes, view.picture, overlay, scale)
        label = {'ha': 'right', 'va': 'center', 'transform': axes_row[0].transAxes}
        axes_row[0].text(-0.06, 0.5, EXCHANGE_LABELS[exchange], **label)
    for axes, (i, j) in zip(grid[0], blocks, strict=True):
        axes.set_title(f'stage {i + 1}, block {j + 1}', fontsize=10)
    bar = figure.colorbar(scale, ax=list(grid.flat), label=LABELS['influence'], fraction=0.03, pad=0.01)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(percent))
    figure.suptitle('Influence of each window on the MSG token of the outlined one; grey: none', fontsize=11)
    return figure


def chunks(axes: Axes, x: float, y: float, colours: list[str]) -> None:
    """A token as a row of channel chunks."""
    for k, colour in enumerate(colours):
        axes.add_patch(Rectangle((x + k * 0.5, y), 0.5, 0.5, facecolor=colour, edgecolor='white', linewidth=1))


def frame(axes: Axes, x: tuple[float, float], y: tuple[float, float], equal: bool = True) -> None:
    """Show this part of the plane, without axes."""
    axes.set_xlim(*x)
    axes.set_ylim(*y)
    axes.axis('off')
    if equal:
        axes.set_aspect('equal')


if __name__ == '__main__':
    main()
