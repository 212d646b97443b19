"""Classify an uploaded image, and draw and describe an overlay for the web page, without Gradio."""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.colors import to_hex

from data.images import DataError, read_file
from data.multi_label import class_probabilities
from engine.predictor import Predictor
from tools.unknown import UNKNOWN, flag_unknown
from tools.visualize.explain import trace_blocks, traced_logits
from tools.visualize.overlays import (
    MIN_SHARE,
    Overlay,
    attention_overlays,
    colour_scale,
    gradcam_overlay,
    influence_overlay,
    render_overlay,
    rollout_overlay,
)
from tools.visualize.sheets import chosen_window
from tools.visualize.view import find_class, prepare
from utils import UserError, printable

MAX_BYTES = 64 * 2**20  # of an upload
PREDICTED = 'the predicted one'
KINDS = {  # the kinds of overlays, by their names in the page
    'Grad-CAM': 'gradcam',
    'Attention rollout': 'rollout',
    'Attention of MSG tokens': 'attention',
    'Influence on the MSG token': 'msg',
    'Influence on the patches': 'patches',
}
NOTES = {
    'gradcam': 'Brightest: the patches that support **{class_}** most.',
    'rollout': 'Brightest: the patches that contribute most to the classifier input, up to {peak:.1f} times the mean.',
    'attention': 'Brightest: what the MSG token of each window attends to most, up to {peak:.1f} times an even spread.',
    'msg': 'Share of each window in the influence on the MSG token of the outlined window. Grey: none at all.',
    'patches': 'Share of each window in the influence on the patches of the outlined window. Grey: none at all.',
}


class Reply(NamedTuple):
    """What the page shows for an upload.

    Attributes:
        probabilities: of each class.
        overlay: (H, W, 3), 8 bits.
        legend: the overlay's colours, as HTML.
        note: what the overlay says, as Markdown; or what is wrong with the upload.
        window: row and column of the chosen window, in the first stage.
    """

    probabilities: dict[str, float] | None
    overlay: np.ndarray | None
    legend: str
    note: str
    window: tuple[int, int] | None = None


class Explainer:
    """Classifies and explains images for the page; keeps no state between requests.

    Args:
        predictor: the network.
    """

    def __init__(self, predictor: Predictor):
        self.predictor = predictor
        self.depths = [len(stage.blocks) for stage in predictor.model.layers]

    def kinds(self) -> list[str]:
        """The kinds of overlays of this network, by their names in the page."""
        return [name for name, kind in KINDS.items() if kind != 'gradcam' or self.predictor.class_names]

    def explain(
        self,
        path: str | Path,
        kind: str,
        stage: int,
        block: int,
        window: tuple[int, int] | None = None,
        class_: str = PREDICTED,
    ) -> Reply:
        """Classify an image and draw an overlay; what is wrong with the image is the reply's note.

        Args:
            path: image file.
            kind: of `KINDS`, by its name.
            stage: from 1; a block that it does not have stands for its last.
            block: from 1.
            window: the chosen window; None, or one that the image does not have, for the centre.
            class_: of Grad-CAM.
        """
        try:
            return self._explain(Path(path), KINDS[kind], stage - 1, block - 1, window, class_)
        except UserError as error:
            return Reply(None, None, '', f'**{as_markdown(error)}**')

    def _explain(
        self, path: Path, kind: str, stage: int, block: int, window: tuple[int, int] | None, class_: str
    ) -> Reply:
        config, model, class_names, _ = self.predictor
        data = read_upload(path)
        view = prepare(self.predictor, data, path.name)
        stages = trace_blocks(model, view.image)
        block = min(block, self.depths[stage] - 1)
        probabilities, class_index, is_unknown = None, 0, False
        if class_names:
            logits = traced_logits(model, stages).detach()
            is_unknown = any(flag_unknown(logits, config) or ())
            values = class_probabilities(logits, config)[0].tolist()
            probabilities = dict(zip(class_names, values, strict=True))
            class_index = int(np.argmax(values)) if class_ == PREDICTED else find_class(class_names, class_)
            class_ = class_names[class_index]
        rows, columns = stages[0].window_grid
        if window is None or window[0] >= rows or window[1] >= columns:
            window = chosen_window(stages, None)
        if kind == 'gradcam':
            overlay = gradcam_overlay(model, stages, class_index, stage)
        elif kind == 'rollout':
            overlay = rollout_overlay(model, stages, stage)
        elif kind == 'attention':
            overlay = attention_overlays(model, stages, stage, block)[0]
        else:
            overlay = influence_overlay(model, stages, stage, block, window, kind)
        note = NOTES[kind].format(class_=as_markdown(class_), peak=float(overlay.values.max()))
        if kind == 'gradcam' and not overlay.values.any():
            note = f'No patch of this stage supports **{as_markdown(class_)}**.'
        if kind in ('msg', 'patches'):
            reach = int((overlay.values > 0).sum())
            note += f' After stage {stage + 1}, block {block + 1}, **{reach} of {rows * columns} windows** have one.'
            note += ' Click on the overlay to choose another window.'
        if is_unknown:
            note = f'**{UNKNOWN.capitalize()}.** {note}'
        return Reply(probabilities, render_overlay(view.picture, overlay), legend(overlay), note, window)

    def window_at(self, x: int, y: int, overlay: np.ndarray) -> tuple[int, int]:
        """The first stage's window at a pixel of an overlay."""
        size = self.predictor.config.DATA.IMG_SIZE
        scale = size / overlay.shape[1]
        first = self.predictor.model.layers[0].window_size * self.predictor.config.MODEL.MSG.PATCH_SIZE
        return int(y * scale) // first, int(x * scale) // first


def read_upload(path: Path) -> bytes:
    """Content of an uploaded image, which must not be a large file.

    Raises:
        DataError: the file is too large, or cannot be read.
    """
    data = read_file(path)
    if len(data) > MAX_BYTES:
        raise DataError(f'{path.name} has {len(data):,} bytes, more than {MAX_BYTES:,}: scale the picture down')
    return data


def as_markdown(text: object) -> str:
    """A text as Markdown that shows it as it is: in the name of a class, an image would make the browser fetch it."""
    return re.sub(r'([\\`*_~\[\]<>!#|&$])', r'\\\1', printable(text))


def legend(overlay: Overlay) -> str:
    """The colours of an overlay and what the ends mean, as HTML."""
    scale = colour_scale([overlay])
    colours = ', '.join(to_hex(scale.cmap(i / 8)) for i in range(9))
    if overlay.kind == 'influence':
        low, high = f'{MIN_SHARE:.1%} or less', '100%, logarithmic'
    else:
        low, high = '0', 'the maximum'
    strip = f'<span style="flex: 1; height: 0.8em; background: linear-gradient(to right, {colours})"></span>'
    return f'<div style="display: flex; gap: 0.6em; align-items: center">{low}{strip}{high}</div>'
