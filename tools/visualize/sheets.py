"""Sheets of overlays: what to draw of a network, and how it is laid out."""

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from data.drawn_text import fit_font, shorten
from data.multi_label import class_probabilities
from engine.predictor import Predictor
from models import MSGTransformer
from tools.unknown import UNKNOWN, flag_unknown
from tools.visualize.explain import StageTrace, trace_blocks, traced_logits
from tools.visualize.overlays import (
    MIN_SHARE,
    Overlay,
    attention_overlays,
    colour_scale,
    draw_overlay,
    gradcam_overlay,
    influence_overlay,
    outline_windows,
    rollout_overlay,
)
from tools.visualize.view import View, VisualizeError
from utils import printable

KINDS = ('attention', 'influence', 'rollout', 'gradcam')
COLUMNS = 6  # most overlays in a row of a sheet
MAX_NAME = 80  # characters of a file or class in a title
LABELS = {
    'attention': 'attention, relative to an even spread',
    'influence': 'share of the influence',
    'rollout': 'attention rollout, relative to the mean',
    'gradcam': 'Grad-CAM, relative to maximum',
}


class Choice(NamedTuple):
    """What to draw: stages and blocks from 0, or all; the window in the first stage's grid, or the centre."""

    stages: Sequence[int] | None = None
    blocks: Sequence[int] | None = None
    window: tuple[int, int] | None = None
    class_index: int | None = None
    within_stage: bool = False


def chosen_blocks(model: MSGTransformer, choice: Choice) -> list[tuple[int, int]]:
    """The chosen blocks as (stage, block).

    Raises:
        VisualizeError: a stage or block that the network does not have.
    """
    depths = [len(stage.blocks) for stage in model.layers]
    stages = range(len(depths)) if choice.stages is None else choice.stages
    for stage in stages:
        if stage >= len(depths):
            raise VisualizeError(f'the network has no stage {stage + 1}: write one from 1 to {len(depths)}')
    deepest = max(depths[stage] for stage in stages)
    for block in choice.blocks or ():
        if block >= deepest:
            raise VisualizeError(f'no block {block + 1} in the chosen stages: write one from 1 to {deepest}')
    return [(i, j) for i in stages for j in range(depths[i]) if choice.blocks is None or j in choice.blocks]


def chosen_window(stages: Sequence[StageTrace], window: tuple[int, int] | None) -> tuple[int, int]:
    """The chosen window, or the centre one.

    Raises:
        VisualizeError: it is outside of the first stage's window grid.
    """
    rows, columns = stages[0].window_grid
    if window is None:
        return rows // 2, columns // 2
    if window[0] >= rows or window[1] >= columns:
        raise VisualizeError(
            f'no window at row {window[0] + 1}, column {window[1] + 1}: this image has {rows} rows and {columns} '
            f'columns of windows'
        )
    return window


def overlay_rows(model: MSGTransformer, stages: Sequence[StageTrace], kind: str, choice: Choice) -> list[list[Overlay]]:
    """The overlays of a sheet, row by row.

    Args:
        model: the network.
        stages: from `trace_blocks`.
        kind: of `KINDS`.
        choice: what to draw; Grad-CAM's class is the predicted one by default.

    Raises:
        VisualizeError: it cannot be drawn.
    """
    blocks = chosen_blocks(model, choice)
    if kind == 'attention':
        if len(blocks) == 1:
            return _wrapped(attention_overlays(model, stages, *blocks[0]))
        return _wrapped([attention_overlays(model, stages, *place)[0] for place in blocks])
    if kind == 'influence':
        window = chosen_window(stages, choice.window)
        rows = {
            tokens: [
                influence_overlay(model, stages, i, j, window, tokens, i if choice.within_stage else 0)
                for i, j in blocks
            ]
            for tokens in ('msg', 'patches')
        }
        return [row for pair in zip(*map(_wrapped, rows.values()), strict=True) for row in pair]
    chosen_stages = dict.fromkeys(i for i, _ in blocks)
    if kind == 'rollout':
        return _wrapped([rollout_overlay(model, stages, i) for i in chosen_stages])
    if model.num_classes == 0:
        raise VisualizeError('Grad-CAM needs classes, and the network has none: write another --kind')
    class_index = choice.class_index
    if class_index is None:
        class_index = int(traced_logits(model, stages).argmax())
    return _wrapped([gradcam_overlay(model, stages, class_index, i) for i in chosen_stages])


def _wrapped(overlays: list[Overlay]) -> list[list[Overlay]]:
    return [overlays[i : i + COLUMNS] for i in range(0, len(overlays), COLUMNS)]


def draw_sheet(picture: np.ndarray, rows: Sequence[Sequence[Overlay]], title: str) -> Figure:
    """Draw a picture and overlays of one kind, row by row, with a colour bar.

    Args:
        picture: (height, width, 3), 8 bits; drawn before the first overlay.
        rows: the overlays; rows may differ in length.
        title: of the figure.
    """
    overlays = [overlay for row in rows for overlay in row]
    scale = colour_scale(overlays)
    height, width = picture.shape[:2]
    columns = 1 + max(map(len, rows))
    panel = (2.2 if columns > 4 else 3.0) * min(1.0, 3 * width / height)  # inches wide; narrow for a tall strip
    size = (columns * panel + 1.2, max(len(rows) * (panel * height / width + 0.3) + 0.7, 3.0))
    figure = Figure(figsize=size, layout='constrained')
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes in grid.flat:
        axes.axis('off')
    grid[0, 0].imshow(picture, extent=(0, width, height, 0))
    outline_windows(grid[0, 0], width, height, overlays[0])
    grid[0, 0].set_title(f'input, {height} x {width}', fontsize=10)
    for i, row in enumerate(rows):
        for axes, overlay in zip(grid[i, 1:], row, strict=False):
            draw_overlay(axes, picture, overlay, scale)
            axes.set_title(overlay.title, fontsize=10)
    bar = figure.colorbar(scale, ax=list(grid.flat), label=LABELS[overlays[0].kind], fraction=0.03, pad=0.01)
    if overlays[0].kind == 'influence':
        bar.ax.yaxis.set_major_formatter(FuncFormatter(percent))
    lines = (textwrap.fill(line, round(size[0] * 11)) for line in title.split('\n'))
    [text], font = fit_font(['\n'.join(lines)])
    figure.suptitle(text, font=font, fontsize=11, parse_math=False)
    return figure


def percent(share: float, _position: int | None = None) -> str:
    """A tick of the scale of influence."""
    return f'≤ {share:.1%}' if share <= MIN_SHARE else f'{share:.0%}'


def draw_kinds(
    predictor: Predictor, view: View, kinds: Sequence[str], choice: Choice, name: str, checkpoint: str | None
) -> dict[str, Figure]:
    """Draw a sheet per kind.

    Args:
        predictor: the network.
        view: the image.
        kinds: of `KINDS`.
        choice: what to draw.
        name: of the image, for the titles.
        checkpoint: of the network, for the titles; None for random weights.

    Raises:
        VisualizeError: it cannot be drawn.
    """
    stages = trace_blocks(predictor.model, view.image)
    name = shorten(printable(name), MAX_NAME)
    sheets, source = {}, f'{predictor.config.MODEL.NAME}, {checkpoint or "random weights"}'
    if checkpoint and predictor.class_names:
        logits = traced_logits(predictor.model, stages).detach()
        probabilities = class_probabilities(logits, predictor.config)[0]
        predicted = shorten(printable(predictor.class_names[probabilities.argmax()]), MAX_NAME)
        name += f', predicted {predicted} ({probabilities.max():.0%})'
        if any(flag_unknown(logits, predictor.config) or ()):
            name += f', {UNKNOWN}'
    for kind in kinds:
        rows = overlay_rows(predictor.model, stages, kind, choice)
        if kind == 'attention':
            subject = 'Attention of MSG tokens, mean of the heads'
        elif kind == 'influence':
            row, column = chosen_window(stages, choice.window)
            subject = f'Influence of each window on the outlined one (row {row + 1}, column {column + 1})'
        elif kind == 'rollout':
            subject = 'Attention rollout from the classifier to the patches that enter each stage'
        elif choice.class_index is None:
            subject = 'Grad-CAM of the predicted class'
        else:
            subject = f'Grad-CAM of {shorten(printable(predictor.class_names[choice.class_index]), MAX_NAME)}'
        sheets[kind] = draw_sheet(view.picture, rows, f'{subject}\n{name}; {source}')
    return sheets
