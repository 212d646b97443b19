"""The look of all figures: a palette that colour-blind readers can tell apart, text sizes, axes."""

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

# Okabe and Ito's colours without yellow, which is hard to see on white: https://jfly.uni-koeln.de/color/
PALETTE = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY_BLUE, BLACK = PALETTE
YELLOW = '#F0E442'  # for areas only
INK, MUTED, PALE = '#333333', '#6B6B6B', '#E8E8E8'  # text and lines; secondary text; areas

FONT_SIZE = 8  # points, at the width at which a chart is drawn

# Settings of Matplotlib for charts
CHART_STYLE = {
    'font.family': 'DejaVu Sans',  # comes with Matplotlib
    'font.size': FONT_SIZE,
    'axes.titlesize': FONT_SIZE,
    'axes.labelsize': FONT_SIZE,
    'xtick.labelsize': FONT_SIZE,
    'ytick.labelsize': FONT_SIZE,
    'axes.linewidth': 0.6,
    'lines.linewidth': 1.2,
    'lines.markersize': 3.5,
}


def tidy_axes(axes: Axes, grid: str = 'both') -> None:
    """Draw a thin grid behind the data, and no frame at the top and on the right.

    Args:
        axes: the axes.
        grid: direction of the grid's lines: 'both', 'x' or 'y'.
    """
    axes.grid(axis=grid, alpha=0.3, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)


def add_margin(figure: Figure, inches: float = 0.07) -> None:
    """Keep the edges of a figure free, which shows where the page around it is dark.

    Args:
        figure: with the layout "constrained".
        inches: width of the margin.
    """
    width, height = figure.get_size_inches()
    x, y = inches / width, inches / height
    figure.get_layout_engine().set(rect=(x, y, 1 - 2 * x, 1 - 2 * y))


def text_color(fill: str) -> str:
    """Black or white, whichever is easier to read on a colour."""
    red, green, blue = to_rgb(fill)
    return 'black' if 0.299 * red + 0.587 * green + 0.114 * blue > 0.45 else 'white'


def tint(color: str, strength: float) -> tuple[float, float, float]:
    """Mix a colour with white; a strength of 1 is the colour itself."""
    return tuple(1 - strength * (1 - channel) for channel in to_rgb(color))
