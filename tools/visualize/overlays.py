"""Pictures of `tools.visualize.explain`: colours over what the network sees, window by window or patch by patch."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from models import MSGTransformer
from tools.visualize.explain import StageTrace, grad_cam, msg_attention, window_in_stage, window_influence
from tools.visualize.rollout import class_rollout

CHOSEN = '#00e5ff'  # outline of the chosen window: no colour map here has this colour
MIN_SHARE = 1e-3  # smallest share of influence that is coloured
TOKEN_NAMES = {'patches': 'patches', 'msg': 'MSG token'}


class Overlay(NamedTuple):
    """Values over a picture.

    Attributes:
        kind: 'attention', 'influence', 'gradcam' or 'rollout'.
        values: (rows, columns), from the picture's upper left corner; the last may reach beyond it.
        cell: size of a value's square, in pixels.
        title: what is shown.
        window: size of the windows to outline, in pixels.
        chosen: row and column of the chosen window, if any, among windows of `chosen_size`.
        chosen_size: its size, in pixels.
    """

    kind: str
    values: np.ndarray
    cell: int
    title: str
    window: int
    chosen: tuple[int, int] | None = None
    chosen_size: int = 0


def attention_overlays(model: MSGTransformer, stages: Sequence[StageTrace], stage: int, block: int) -> list[Overlay]:
    """Attention of the MSG tokens in a block, relative to an even spread: the mean of the heads, then each head."""
    maps = msg_attention(stages)[stage][block] * (stages[stage].window_size ** 2 + 1)  # (nH, nW, h, w, w)
    grid = maps.permute(2, 0, 3, 1, 4).flatten(1, 2).flatten(2)  # (h, nH * w, nW * w)
    cell, place = _patch(model, stage), f'stage {stage + 1}, block {block + 1}'
    titled = [(grid.mean(dim=0), place), *((head, f'head {i + 1}') for i, head in enumerate(grid))]
    window = cell * stages[stage].window_size
    return [Overlay('attention', _array(values), cell, title, window) for values, title in titled]


def influence_overlay(
    model: MSGTransformer,
    stages: Sequence[StageTrace],
    stage: int,
    block: int,
    window: tuple[int, int],
    tokens: str,
    source: int = 0,
) -> Overlay:
    """Influence of the windows that enter stage `source` on a window after a block.

    Args:
        model: the network.
        stages: from `trace_blocks`.
        stage: the chosen window's.
        block: of this stage, after which the influence is measured.
        window: row and column in the first stage's window grid; in later stages, the window that covers it.
        tokens: of the window: 'patches' or 'msg'.
        source: stage of the windows that influence it.
    """
    chosen = window_in_stage(window, stage)
    shares = window_influence(stages, stage, block, chosen, tokens, source)
    size, chosen_size = (_patch(model, i) * stages[i].window_size for i in (source, stage))
    title = f'{TOKEN_NAMES[tokens]}, stage {stage + 1}, block {block + 1}'
    return Overlay('influence', _array(shares), size, title, size, chosen, chosen_size)


def gradcam_overlay(model: MSGTransformer, stages: Sequence[StageTrace], class_index: int, stage: int) -> Overlay:
    """Grad-CAM of a stage, relative to its maximum; all zero if no patch supports the class."""
    values = _array(grad_cam(model, stages, class_index, stage))
    values = values / max(values.max(), np.finfo(np.float32).tiny)
    cell = _patch(model, stage)
    title = f'stage {stage + 1}' if values.any() else f'stage {stage + 1}: nothing for the class'
    return Overlay('gradcam', values, cell, title, cell * stages[stage].window_size)


def rollout_overlay(model: MSGTransformer, stages: Sequence[StageTrace], stage: int) -> Overlay:
    """Attention rollout from the classifier to the patches that enter a stage, relative to their mean."""
    shares = class_rollout(model, stages, stage)
    cell = _patch(model, stage)
    values = _array(shares / shares.mean().clamp_min(torch.finfo(shares.dtype).tiny))
    return Overlay('rollout', values, cell, f'stage {stage + 1}', cell * stages[stage].window_size)


def _patch(model: MSGTransformer, stage: int) -> int:
    """Size of a stage's patch, in pixels."""
    return model.feature_info[stage]['reduction']


def _array(values: Tensor) -> np.ndarray:
    return values.float().cpu().numpy()


def colour_scale(overlays: Sequence[Overlay]) -> ScalarMappable:
    """One colour scale for overlays of the same kind."""
    if overlays[0].kind == 'influence':
        return ScalarMappable(LogNorm(MIN_SHARE, 1, clip=True), colormaps['plasma'])
    if overlays[0].kind == 'gradcam':
        return ScalarMappable(Normalize(0, 1), colormaps['inferno'])
    largest = max(float(overlay.values.max()) for overlay in overlays)
    return ScalarMappable(PowerNorm(0.5, 0, largest), colormaps['inferno'])  # most weights are far below the largest


def draw_overlay(axes: Axes, picture: np.ndarray, overlay: Overlay, scale: ScalarMappable) -> None:
    """Draw values over a picture in grey, with the outlines of windows and of the chosen one.

    Args:
        axes: to draw into.
        picture: (height, width, 3), 8 bits.
        overlay: the values.
        scale: their colours.
    """
    height, width = picture.shape[:2]
    rows, columns = overlay.values.shape
    axes.imshow(picture.mean(axis=-1), cmap='gray', vmin=0, vmax=255, extent=(0, width, height, 0))
    colours = overlay_colours(overlay, scale)
    smooth = 'bilinear' if overlay.kind == 'gradcam' else 'nearest'
    extent = (0, columns * overlay.cell, rows * overlay.cell, 0)
    axes.imshow(colours, extent=extent, interpolation=smooth)
    outline_windows(axes, width, height, overlay)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.axis('off')


def overlay_colours(overlay: Overlay, scale: ScalarMappable) -> np.ndarray:
    """The colours of an overlay's values, with their opacity over the picture, (rows, columns, 4)."""
    colours = scale.to_rgba(overlay.values)
    # No influence at all is grey and dark; else weak values show the picture, strong ones their colour.
    colours[..., 3] = 0.7 if overlay.kind == 'influence' else 0.35 + 0.4 * scale.norm(overlay.values)
    if overlay.kind == 'influence':
        colours[overlay.values == 0] = (0.0, 0.0, 0.0, 0.55)
    return colours


def outline_windows(axes: Axes, width: int, height: int, overlay: Overlay) -> None:
    """Draw the windows of an overlay, and its chosen one, over a picture of this size."""
    line = {'color': 'white', 'linewidth': 0.5 if max(width, height) <= 12 * overlay.window else 0.25, 'alpha': 0.6}
    for x in range(overlay.window, width, overlay.window):
        axes.axvline(x, **line)
    for y in range(overlay.window, height, overlay.window):
        axes.axhline(y, **line)
    if overlay.chosen is None:
        return
    size = overlay.chosen_size
    top, left = (position * size for position in overlay.chosen)
    bottom, right = min(top + size, height), min(left + size, width)
    axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=CHOSEN, linewidth=2))


def render_overlay(picture: np.ndarray, overlay: Overlay, width: int = 640) -> np.ndarray:
    """Draw one overlay without margins, so that pixels of the drawing are proportional to those of the picture.

    Returns:
        (width * H / W, width, 3), 8 bits, for a picture of H x W.
    """
    rows, columns = picture.shape[:2]
    figure = Figure(figsize=(width / 100, max(width * rows / columns, 1) / 100), dpi=100)
    draw_overlay(figure.add_axes((0, 0, 1, 1)), picture, overlay, colour_scale([overlay]))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
