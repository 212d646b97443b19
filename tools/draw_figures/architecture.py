"""The figure of the network: MSG-Transformer-T at 224 px, stage by stage, with the numbers of the built network."""

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_sample_image

from config import load_config
from data.figure_style import BLUE, INK, MUTED, ORANGE, PALE, VERMILION, tint
from models import MSGTransformer, build_model
from models.pyramid import patch_grids
from tools.draw_figures.diagram import NOTE, TEXT, TITLE, box, canvas, label, line, rectangle

NAME, CONFIG = 'MSG-Transformer-T', 'configs/msg_tiny_p4_win7_224.yaml'
HEIGHT = 416
SIDE, TOP = 100, 80  # of a picture of the image area, in pixels, and its upper edge
LEFTS = (16, 164, 306, 448, 590)  # left edges of the image and of the four stages
MIDDLE = TOP + SIDE / 2


def draw_architecture() -> Figure:
    """Draw the image, the windows and MSG tokens of each stage over the image's area, and their numbers below."""
    with torch.device('meta'):
        model = build_model(load_config(CONFIG))
    axes = canvas(HEIGHT)
    title = f'{NAME} at {model.img_size.height} × {model.img_size.width} pixels'
    label(axes, LEFTS[0], 22, title, TITLE, bold=True, ha='left')
    _draw_image(axes, model)
    grids = patch_grids(model.img_size, model.patch_embed.patch_size, len(model.layers))
    for i, left in enumerate(LEFTS[1:]):
        label(axes, left + SIDE / 2, TOP - 16, f'Stage {i + 1}', TEXT, bold=True)
        block = model.layers[i].blocks[0]
        _draw_windows(axes, left, grids[i].height, block.window_size, block.shuffle_size)
    steps = ['patch\nembed-\nding', *['merge\n2 × 2'] * (len(model.layers) - 1)]
    for text, start, end in zip(steps, LEFTS, LEFTS[1:], strict=False):
        line(axes, (start + SIDE + 4, MIDDLE), (end - 4, MIDDLE), arrow=True)
        label(axes, (start + SIDE + end) / 2, MIDDLE - 6, text, NOTE - 1, MUTED, va='bottom')
    _draw_head(axes, model)
    _draw_table(axes, model)
    _draw_legend(axes, HEIGHT - 24)
    return axes.figure


def _draw_image(axes: Axes, model: MSGTransformer) -> None:
    """Draw scikit-learn's photograph of a temple as the input."""
    height, width = model.img_size
    photo = Image.fromarray(load_sample_image('china.jpg')).crop((0, 0, 427, 427)).resize((112, 112))
    axes.imshow(
        np.asarray(photo), extent=(LEFTS[0], LEFTS[0] + SIDE, TOP + SIDE, TOP), interpolation='none', clip_on=False
    )
    axes.set(xlim=(0, 800), ylim=(HEIGHT, 0), aspect='auto')  # `imshow` changes them
    label(axes, LEFTS[0] + SIDE / 2, TOP - 16, 'Image', TEXT, bold=True)
    label(axes, LEFTS[0] + SIDE / 2, TOP + SIDE + 15, f'{height} × {width} × {model.in_chans}', TEXT)


def _draw_windows(axes: Axes, left: float, patches: int, window_size: int, region_size: int) -> None:
    """Draw the patches, windows, MSG tokens and shuffle regions of a stage with `patches` x `patches` patches."""
    windows = patches // window_size
    cell, patch = SIDE / windows, SIDE / patches
    rectangle(axes, left, TOP, SIDE, SIDE, PALE)
    for i in range(1, patches):
        for start, end in (
            ((left + i * patch, TOP), (left + i * patch, TOP + SIDE)),
            ((left, TOP + i * patch), (left + SIDE, TOP + i * patch)),
        ):
            line(axes, start, end, color='white', width=0.5)
    for i in range(windows):
        for j in range(windows):
            x, y = left + j * cell, TOP + i * cell
            rectangle(axes, x, y, cell, cell, edge=MUTED, line=0.8)
            size = 4 + 2 * np.log2(SIDE / windows / 13)
            rectangle(axes, x + 2, y + 2, size, size, VERMILION)
    if windows == 1:
        return
    region = SIDE * region_size / windows
    for i in range(windows // region_size):
        for j in range(windows // region_size):
            rectangle(axes, left + j * region, TOP + i * region, region, region, edge=BLUE, line=2.4)


def _draw_head(axes: Axes, model: MSGTransformer) -> None:
    """Draw the classifier at the right."""
    x = LEFTS[-1] + SIDE + 58
    line(axes, (LEFTS[-1] + SIDE + 4, MIDDLE), (x - 37, MIDDLE), arrow=True)
    label(axes, x, TOP - 16, 'Head', TEXT, bold=True)
    box(axes, x, MIDDLE, 66, SIDE, 'norm,\nmean of\nMSG\ntokens,\nlinear', tint(ORANGE, 0.3))
    label(axes, x, TOP + SIDE + 15, f'{model.num_classes} classes', TEXT)


def _draw_table(axes: Axes, model: MSGTransformer) -> None:
    """Write the numbers of each stage below its picture."""
    rows = stage_table(model)
    y = TOP + SIDE + 15
    for number, (name, cells) in enumerate(rows.items()):
        if number:
            label(axes, LEFTS[0], y, name, TEXT, MUTED, ha='left')
        for left, cell in zip(LEFTS[1:], cells, strict=True):
            label(axes, left + SIDE / 2, y, cell, TEXT, bold=number == 0)
        y += 24
        if number == 0:
            y += 6
        axes.plot((LEFTS[0], LEFTS[-1] + SIDE), (y - 13, y - 13), color=PALE, linewidth=0.75)


def stage_table(model: MSGTransformer) -> dict[str, list[str]]:
    """The numbers of a network's stages at its `img_size`, row by row, with a text for each stage."""
    grids = patch_grids(model.img_size, model.patch_embed.patch_size, len(model.layers))
    names = (
        'patches and channels',
        'window',
        'window in pixels',
        'windows, MSG tokens',
        'shuffle regions',
        'heads',
        'blocks',
    )
    rows: dict[str, list[str]] = {name: [] for name in names}
    for grid, info, stage in zip(grids, model.feature_info, model.layers, strict=True):
        block = stage.blocks[0]
        w, s = block.window_size, block.shuffle_size
        windows = grid.divided_by(w)
        regions = windows.divided_by(s)
        is_single = windows == (1, 1)
        rows['patches and channels'].append(f'{_times(grid)} × {info["num_chs"]}')
        rows['window'].append(f'{w} × {w} patches')
        rows['window in pixels'].append(_times((w * info['reduction'],) * 2))
        rows['windows, MSG tokens'].append('1' if is_single else _times(windows))
        count = regions.height * regions.width
        rows['shuffle regions'].append('no exchange' if is_single else f'{count} of {s} × {s} windows')
        rows['heads'].append(str(block.attn.num_heads))
        rows['blocks'].append(str(len(stage.blocks)))
    return rows


def _times(size: tuple[int, int]) -> str:
    return f'{size[0]} × {size[1]}'


def _draw_legend(axes: Axes, y: float) -> None:
    """Say what the marks in the pictures of the stages mean."""
    x = LEFTS[0]
    rectangle(axes, x, y - 7, 14, 14, PALE, MUTED, 0.8)
    label(axes, x + 21, y, 'window of patches', NOTE, ha='left')
    x += 165
    rectangle(axes, x, y - 5, 10, 10, VERMILION)
    label(axes, x + 17, y, 'MSG token of a window', NOTE, ha='left')
    x += 190
    rectangle(axes, x, y - 7, 14, 14, edge=BLUE, line=2.4)
    label(axes, x + 21, y, 'shuffle region: its windows exchange MSG tokens in every block', NOTE, INK, ha='left')
