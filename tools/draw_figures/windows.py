"""The figure of a shuffle region: attention within its windows, and the shuffle of their MSG tokens."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data.figure_style import BLUE, GREEN, MUTED, ORANGE, PALE, PURPLE, text_color
from tools.draw_figures.diagram import NOTE, TITLE, canvas, label, line, rectangle

COLORS = (BLUE, ORANGE, GREEN, PURPLE)  # one per window
PATCH, CHUNK = 26, 23  # pixels
W = 4  # patches along a window


def draw_windows() -> Figure:
    """Draw a region of 2 x 2 windows, and the chunks of its MSG tokens before and after the shuffle."""
    axes = canvas(height=388)
    label(axes, 16, 22, '1. Attention within each window', TITLE, bold=True, ha='left')
    label(axes, 16, 43, 'among its w × w patches and its MSG token', NOTE, MUTED, ha='left')
    for g, color in enumerate(COLORS):
        row, column = divmod(g, 2)
        x, y = 16 + column * 152, 66 + row * 146
        _draw_window(axes, x, y, g, color)
    label(
        axes,
        16,
        352,
        f'A shuffle region of 2 × 2 windows;\nw = {W} for clarity, w = 7 in the networks.',
        NOTE,
        MUTED,
        ha='left',
        va='top',
    )

    left, before, after = 372, 114, 282
    label(axes, left, 22, '2. Shuffle of the MSG tokens of a region', TITLE, bold=True, ha='left')
    text = 'each MSG token gives one chunk of its channels to every MSG token'
    label(axes, left, 43, text, NOTE, MUTED, ha='left')
    starts = [left + g * (4 * CHUNK + 14) for g in range(4)]
    for g, color in enumerate(COLORS):
        center = starts[g] + 2 * CHUNK
        draw_chunks(axes, starts[g], before, [color] * 4, range(4))
        draw_chunks(axes, starts[g], after, COLORS, [g] * 4)
        label(axes, center, before - 16, f'MSG token {g}', NOTE, bold=True)
        label(axes, center, after + CHUNK + 16, f'new token {g}', NOTE, bold=True)
        for k in range(4):
            top = (starts[g] + (k + 0.5) * CHUNK, before + CHUNK)
            bottom = (starts[k] + (g + 0.5) * CHUNK, after)
            line(axes, top, bottom, color=color, width=1.4)
    note = 'Each number is a chunk of the channels;\neach colour is the window that it comes from.'
    label(axes, left, 352, note, NOTE, MUTED, ha='left', va='top')
    return axes.figure


def _draw_window(axes: Axes, x: float, y: float, number: int, color: str) -> None:
    """Draw a window of patches, and its MSG token in its upper left corner."""
    size = W * PATCH
    for i in range(W):
        for j in range(W):
            rectangle(axes, x + i * PATCH, y + j * PATCH + 22, PATCH, PATCH, PALE, 'white', 1.5)
    rectangle(axes, x, y + 22, size, size, edge=color, line=2.5)
    rectangle(axes, x - 1.25, y, 15, 15, color)
    label(axes, x + 22, y + 8, f'MSG token {number}', NOTE, bold=True, ha='left')


def draw_chunks(axes: Axes, x: float, y: float, colors: list[str], numbers: list[int]) -> None:
    """Draw a token as a row of numbered chunks of channels."""
    for k, (color, number) in enumerate(zip(colors, numbers, strict=True)):
        rectangle(axes, x + k * CHUNK, y, CHUNK, CHUNK, color, 'white', 1.5)
        label(axes, x + (k + 0.5) * CHUNK, y + CHUNK / 2, str(number), NOTE, text_color(color))
