"""A trained detector in Python, for images in files or in memory.

    from detection.detector import load_detector

    detector = load_detector('ckpt_best.pth', score=0.5)
    for detections in detector(['a.jpg', 'b.jpg']):
        print(detections.names, detections.scores, detections.boxes)

docs/detection_prediction.md describes it. The command-line program, detection/tools/predict.py, uses it too.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detection.detections import Detections
from detection.exported import load_exported_detector
from detection.images import ImageInput, read_pixels
from detection.main import TASK
from detection.tiles import Tiling
from detection.tta import DetectFn, Output, build_detect_fn
from engine.config_tree import ConfigError
from engine.precision import build_precision
from engine.predictor import Predictor, load_predictor, network_args

PRECISIONS = ('float32', 'float16', 'bfloat16')
WEIGHTS = ('auto', 'raw', 'ema')


class ImageDetector:
    """Finds objects in images, as the evaluation of `detection.main` does.

    Args:
        predictor: the network, with its config.
        batch_size: images, or tiles of an image, at a time. Of these, images that are resized to one shape go through
            the network together; the detections are the same but for rounding errors.

    Attributes:
        config: the config tree.
        model: the network, a `Detector`, in evaluation mode.
        class_names: names of the labels, from label 1.
        device: where it runs.
        precision: how it runs: float32, or autocast.

    Raises:
        ConfigError: the batch size is not positive, or the config's precision cannot be used on this device.
    """

    def __init__(self, predictor: Predictor, batch_size: int = 1):
        if not isinstance(batch_size, Integral) or batch_size < 1:
            raise ConfigError(f'batch_size is {batch_size!r}: write a whole number from 1 on')
        self.config, model, self.class_names, self.device = predictor
        self.precision, self.batch_size = build_precision(self.config, self.device), batch_size
        self.model, _ = self.precision.prepare(model)
        # Evaluation divides by 255 on the CPU. On a GPU, PyTorch would multiply by the reciprocal of a plain number.
        self._white = torch.tensor(255.0, device=self.device)

    def __call__(
        self, images: ImageInput | Iterable[ImageInput], *, tiles: int | None = None, overlap: float | None = None
    ) -> Detections | list[Detections]:
        """Detect objects in one image, or in several of any sizes.

        Args:
            images: an image; or a list, tensor (B, 3, H, W) or array (B, H, W, 3) of images. An image is a path, the
                content of a file, a PIL image, an array (H, W, 3) or (H, W), or a tensor (3, H, W). Colours are RGB.
                Arrays and tensors are of uint8, or of floats in [0, 1].
            tiles: height and width of overlapping tiles, in pixels of the image, in which objects are detected, for
                small objects in large images; 0 for no tiles. None takes `TEST.TILES` of the config, by default 0.
            overlap: minimum overlap of tiles, relative to their size; None takes `TEST.TILE_OVERLAP`, by default 0.2.

        Returns:
            The detections of the image; a list of them for several images.

        Raises:
            DataError: an image cannot be read, or is of another form.
            ConfigError: `tiles` or `overlap` cannot be used, or there is an overlap without tiles.
        """
        if _is_image(images):
            return next(self.stream([images], tiles=tiles, overlap=overlap))
        return list(self.stream(images, tiles=tiles, overlap=overlap))

    def stream(
        self, images: Iterable[ImageInput], *, tiles: int | None = None, overlap: float | None = None
    ) -> Iterator[Detections]:
        """The detections of each image, in order; images are read as they are needed.

        Args:
            images: see `__call__`.
            tiles: see `__call__`.
            overlap: see `__call__`.

        Raises:
            DataError: an image cannot be read, or is of another form.
            ConfigError: `tiles` or `overlap` cannot be used, or there is an overlap without tiles.
        """
        given = {'size': tiles, 'overlap': overlap}
        tiling = replace(Tiling.of_config(self.config), **{key: x for key, x in given.items() if x is not None})
        if overlap is not None and not tiling.size:
            raise ConfigError(f'overlap={overlap!r} has no effect without tiles: give tiles too, such as tiles=512')
        detect = build_detect_fn(self.config, self.model, tiling, self.batch_size)
        numbered = enumerate(images)
        while batch := list(islice(numbered, self.batch_size)):
            pixels = [read_pixels(image, number, self.config.DATA.EXIF) for number, image in batch]
            for image, output in zip(pixels, self._outputs(pixels, detect), strict=True):
                yield Detections.from_output(output, self.class_names, image.shape[1:])

    @torch.inference_mode()
    def _outputs(self, images: list[Tensor], detect: DetectFn) -> list[Output]:
        """What a function of `build_detect_fn` returns for images (3, H, W), uint8 or float."""
        on_device = [image.to(self.device) for image in images]
        scaled = [x.float() / self._white if x.dtype == torch.uint8 else x.float() for x in on_device]
        with self.precision.autocast():
            return detect(scaled)


def _is_image(x: Any) -> bool:
    """Whether it is one image, or of no known form, rather than several images."""
    if isinstance(x, np.ndarray | Tensor):
        return x.ndim < 4
    return isinstance(x, str | os.PathLike | bytes | Image.Image) or not isinstance(x, Iterable)


def load_detector(
    checkpoint: str | Path,
    *,
    device: str | torch.device = 'auto',
    precision: str | torch.dtype | None = None,
    score: float | None = None,
    batch_size: int = 1,
    weights: str = 'auto',
    cfg: str | Path | None = None,
    opts: Sequence[Any] = (),
) -> ImageDetector:
    """Load a detector from a checkpoint of `detection.main`.

    With the defaults, its detections are those that `detection.main --eval` writes for the same images: to
    `results.json` for the raw weights, to `results_ema.json` for the EMA weights.

    Args:
        checkpoint: path of the checkpoint, or of an ONNX file of `tools.export --detector`. Such a file runs in float32
            on the CPU. Its network is fixed: `weights` and `cfg` are errors, as are `opts` of `MODEL` and a lower
            `score` than that of the export.
        device: `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`, `mps`, or a `torch.device`.
        precision: `float32`, `float16` or `bfloat16`, or such a `torch.dtype`; None as evaluation: float16 autocast on
            a GPU, float32 elsewhere.
        score: minimum score of a detection (`MODEL.BOX.SCORE`); None keeps the checkpoint's, by default 0.05.
        batch_size: see `ImageDetector`.
        weights: `raw`, `ema`, or `auto`: the EMA weights unless the raw ones scored higher.
        cfg: YAML config whose keys override the checkpoint's; a checkpoint without a config needs it.
        opts: config keys and values that override the checkpoint's, such as `['TEST.FLIP', True]`.

    Raises:
        UserError: the checkpoint, a config key or an argument cannot be used; the message is one line.
    """
    precision = precision and str(precision).removeprefix('torch.')
    for name, value, choices in (('precision', precision or 'float32', PRECISIONS), ('weights', weights, WEIGHTS)):
        if value not in choices:
            raise ConfigError(f'{name} is {value!r}: write {", ".join(choices[:-1])} or {choices[-1]}')
    options = list(opts)
    if device != 'auto':
        kind, _, index = str(device).partition(':')
        options += ['DEVICE', kind, 'LOCAL_RANK', index or '0']
    if precision is not None:
        options += (
            ['AMP_OPT_LEVEL', 'O0'] if precision == 'float32' else ['AMP_OPT_LEVEL', 'O1', 'AMP_DTYPE', precision]
        )
    if score is not None:
        options += ['MODEL.BOX.SCORE', float(score)]
    if Path(checkpoint).suffix.lower() == '.onnx':
        if weights != 'auto' or cfg is not None or precision not in (None, 'float32'):
            raise ConfigError(
                f'{checkpoint} is an exported file, in float32, with its own weights and config: leave out weights, '
                f'cfg and precision'
            )
        return ImageDetector(load_exported_detector(Path(checkpoint).expanduser(), options), batch_size)
    return ImageDetector(load_predictor(network_args(checkpoint, options, weights, cfg), TASK), batch_size)
