"""The figure of influence: how far information has come after each block, with three exchanges of MSG tokens."""

import io

import numpy as np
import timm
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from PIL import Image
from sklearn.datasets import load_sample_image

from data.figure_style import INK, MUTED
from tools.draw_figures.diagram import NOTE, TEXT, TITLE, canvas, label, rectangle
from tools.visualize.explain import trace_blocks
from tools.visualize.overlays import CHOSEN, Overlay, colour_scale, influence_overlay, overlay_colours
from tools.visualize.sheets import LABELS, percent
from tools.visualize.view import prepare, random_predictor

# Exchanges of the rows, and what is written below their names
EXCHANGES = {'none': 'no exchange', 'shuf': 'published,\nas trained', 'shift': 'shift by one\nwindow'}
BLOCKS = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]  # stage and block, from 0; in stage 3, one window is the image
WINDOW = (1, 1)  # the outlined one in the first stage's grid
SIDE, GAP, LEFT, TOP = 128, 8, 112, 74  # pixels
HEIGHT = 552


def draw_influence() -> Figure:
    """Draw the influence of each window on the MSG token of the outlined one, over scikit-learn's photograph."""
    picture, rows = trace_influence()
    scale = colour_scale(rows['shuf'])
    axes = canvas(height=HEIGHT)
    label(axes, 16, 22, 'Influence of each window on the MSG token of the outlined window', TITLE, bold=True, ha='left')
    for column, (stage, block) in enumerate(BLOCKS):
        x = LEFT + column * (SIDE + GAP) + SIDE / 2
        label(axes, x, TOP - 14, f'stage {stage + 1}, block {block + 1}', TEXT)
    for row, (exchange, overlays) in enumerate(rows.items()):
        y = TOP + row * (SIDE + GAP)
        label(axes, 16, y + SIDE / 2 - 12, exchange, TEXT, bold=True, ha='left')
        label(axes, 16, y + SIDE / 2 + 2, EXCHANGES[exchange], NOTE, MUTED, ha='left', va='top')
        _draw_pictures(axes, y, picture)
        for column, overlay in enumerate(overlays):
            _draw_overlay(axes, LEFT + column * (SIDE + GAP), y, SIDE / picture.shape[0], overlay, scale)
    axes.set(xlim=(0, 800), ylim=(HEIGHT, 0), aspect='auto')  # `imshow` changes them
    _draw_scale(axes, scale, TOP + 3 * (SIDE + GAP) + 12)
    return axes.figure


def trace_influence() -> tuple[np.ndarray, dict[str, list[Overlay]]]:
    """The picture (112, 112, 3), and the influence after each block of `BLOCKS` for each exchange."""
    predictor = random_predictor('configs/msg_nano_p4_win7_112.yaml', ['DEVICE', 'cpu'])  # for its preprocessing
    png = io.BytesIO()
    Image.fromarray(load_sample_image('china.jpg')).save(png, 'PNG')
    view = prepare(predictor, png.getvalue(), 'china.jpg')
    rows = {}
    for exchange in EXCHANGES:
        # These exchanges have no parameters, so the stored weights fit each of them.
        model = timm.create_model('msg_transformer_nano', pretrained=True, manip_type=exchange).eval()
        stages = trace_blocks(model, view.image)
        rows[exchange] = [influence_overlay(model, stages, *block, WINDOW, 'msg') for block in BLOCKS]
    return view.picture, rows


def _draw_pictures(axes: Axes, y: float, picture: np.ndarray) -> None:
    """Draw the picture in grey in all panels of a row, as one image: a PNG stores repetitions within a row once."""
    grey = np.round(picture.mean(axis=-1)).astype(np.uint8)
    gap = np.full((len(grey), GAP * len(grey) // SIDE), 255, np.uint8)
    row = np.hstack([grey, *([gap, grey] * (len(BLOCKS) - 1))])
    extent = (LEFT, LEFT + len(BLOCKS) * (SIDE + GAP) - GAP, y + SIDE, y)
    axes.imshow(row, cmap='gray', vmin=0, vmax=255, extent=extent, interpolation='none', clip_on=False)


def _draw_overlay(axes: Axes, x: float, y: float, pixel: float, overlay: Overlay, scale: ScalarMappable) -> None:
    """Draw the colour of each window, with the upper left corner of the panel at (x, y) and pixels of this size."""
    cell = overlay.cell * pixel
    # Rounded, so that processors whose results differ in the last bits give the same file
    colours = overlay_colours(overlay._replace(values=overlay.values.round(3)), scale)
    for i, j in np.ndindex(overlay.values.shape):
        rectangle(axes, x + j * cell, y + i * cell, cell, cell, tuple(colours[i, j]), 'white', 0.5)
    size = overlay.chosen_size * pixel
    row, column = overlay.chosen
    rectangle(axes, x + column * size, y + row * size, size, size, edge=CHOSEN, line=2.5)


def _draw_scale(axes: Axes, scale: ScalarMappable, y: float) -> None:
    """Draw the colours with their values below the panels, and the colour of no influence."""
    figure = axes.figure
    width, height = figure.get_size_inches() * 96
    bar = figure.add_axes((LEFT / width, 1 - (y + 12) / height, (3 * SIDE + 2 * GAP) / width, 12 / height))
    figure.colorbar(scale, cax=bar, orientation='horizontal')
    bar.xaxis.set_major_formatter(FuncFormatter(percent))
    bar.minorticks_off()
    bar.tick_params(labelsize=NOTE * 0.75, colors=INK, width=0.6)
    bar.spines['outline'].set_visible(False)
    label(axes, 16, y + 6, LABELS['influence'].replace(' the ', '\n', 1), NOTE, MUTED, ha='left')
    x = LEFT + 4 * (SIDE + GAP)
    rectangle(axes, x, y, 24, 12, '#5A5A5A')
    label(axes, x + 32, y + 6, 'no influence', NOTE, ha='left')
