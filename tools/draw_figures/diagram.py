"""Parts of diagrams: a canvas measured in pixels, boxes, arrows, text.

A unit is a pixel where the figure is shown at its own width, as on GitHub. The y axis points down.
"""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.path import Path

from data.figure_style import INK

WIDTH = 800  # of a diagram
TITLE, TEXT, NOTE = 14, 12, 11  # sizes of text
LEADING = 1.25  # distance of lines, relative to their size
_POINTS = 0.75  # of a pixel
_PIXELS_PER_INCH = 96


def canvas(height: float, width: float = WIDTH) -> Axes:
    """Axes without frame that fill a new figure, in pixels from its upper left corner."""
    figure = Figure(figsize=(width / _PIXELS_PER_INCH, height / _PIXELS_PER_INCH))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis('off')
    return axes


def label(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    size: float = TEXT,
    color: str = INK,
    bold: bool = False,
    ha: str = 'center',
    va: str = 'center',
) -> None:
    """Write lines of text, by default centred at (x, y). Their places do not depend on the letters in them."""
    lines = text.split('\n')
    height = (len(lines) - 1) * LEADING * size
    first = y + {'top': 0.8 * size, 'center': 0.36 * size - height / 2, 'bottom': -0.25 * size - height}[va]
    style = {'fontsize': size * _POINTS, 'fontweight': 'bold' if bold else 'normal', 'parse_math': False}
    for number, row in enumerate(lines):
        axes.text(x, first + number * LEADING * size, row, color=color, ha=ha, va='baseline', **style)


def rectangle(
    axes: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    fill: str | None = None,
    edge: str | None = None,
    line: float = 1.0,
) -> None:
    """Draw a rectangle with its upper left corner at (x, y).

    Args:
        axes: where to draw.
        x: of the corner.
        y: of the corner.
        width: of the rectangle.
        height: of the rectangle.
        fill: its colour; None for none.
        edge: colour of its outline; None for none.
        line: width of the outline.
    """
    colors = {'facecolor': fill or 'none', 'edgecolor': edge or 'none', 'linewidth': line * _POINTS if edge else 0}
    axes.add_patch(Rectangle((x, y), width, height, joinstyle='miter', clip_on=False, **colors))


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, fill: str) -> None:
    """Draw a rounded box with text in it, centred at (x, y)."""
    corner = (x - width / 2, y - height / 2)
    style = {'boxstyle': 'round,pad=0,rounding_size=5', 'facecolor': fill, 'edgecolor': INK, 'linewidth': _POINTS}
    axes.add_patch(FancyBboxPatch(corner, width, height, clip_on=False, **style))
    label(axes, x, y, text)


def line(axes: Axes, *points: Sequence[float], color: str = INK, width: float = 1.2, arrow: bool = False) -> None:
    """Draw a line through points, with an arrowhead at its end if `arrow`."""
    style = {'arrowstyle': '-|>' if arrow else '-', 'mutation_scale': 9, 'shrinkA': 0, 'shrinkB': 0}
    path = Path([tuple(point) for point in points])
    axes.add_patch(
        FancyArrowPatch(path=path, color=color, linewidth=width * _POINTS, joinstyle='miter', clip_on=False, **style)
    )


def plus(axes: Axes, x: float, y: float, radius: float = 9) -> None:
    """Draw the sign of a sum: a plus in a circle, centred at (x, y)."""
    axes.add_patch(Circle((x, y), radius, facecolor='white', edgecolor=INK, linewidth=_POINTS * 1.2, clip_on=False))
    line(axes, (x - 0.55 * radius, y), (x + 0.55 * radius, y))
    line(axes, (x, y - 0.55 * radius), (x, y + 0.55 * radius))
