"""A whole detector in an ONNX file, run by onnxruntime in place of the network that it was made from.

    from detection.detector import load_detector

    detector = load_detector('detector.onnx')

`tools.export --detector` writes such files. docs/export.md describes their inputs and outputs.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from detection.config import TREE
from detection.data.transforms import resized_shape
from detection.models.build import build_detector_transform
from detection.models.masks import BoxMasks
from engine.config_tree import stated_task
from engine.exported_file import ExportedFileError, onnx_session, read_report, reason, report_file
from engine.predictor import Predictor
from models.pyramid import Size
from utils import leaves, printable

# From a batch (B, 3, H, W) and the sizes of its images (B, 2) to boxes, scores, labels and perhaps masks; see
# `detection.export.FixedDetector`.
RunBatch = Callable[[Tensor, Tensor], Sequence[Tensor]]

INPUTS = ('images', 'sizes')
OUTPUTS = ('boxes', 'scores', 'labels', 'masks')


class ExportedDetector(nn.Module):
    """Detects objects as `Detector.detect` does, by a graph that takes batches of one shape.

    Images are resized as in evaluation, or to a smaller size if they would not fit, and padded with zeros. Padding can
    change scores slightly.

    Args:
        config: the config tree of the detector.
        size: height and width of the padded images.
        batch_size: number of images of a batch; a smaller one is filled with empty images.
        run: runs the graph.
    """

    def __init__(self, config: CfgNode, size: Size, batch_size: int, run: RunBatch):
        super().__init__()
        self.size, self.batch_size, self.run, self.inputs = size, batch_size, run, config.INPUT
        self.min_score = config.MODEL.BOX.SCORE
        self.transform = build_detector_transform(config, multiple=1).eval()

    def detect(self, images: Sequence[Tensor], short: int | None = None) -> list[dict[str, Tensor | BoxMasks]]:
        """Detections of each image; see `Detector.detect`.

        Args:
            images: (3, height, width), in [0, 1].
            short: short side to resize them to, in pixels; None for that of the config.
        """
        results = []
        for first in range(0, len(images), self.batch_size):
            chunk = images[first : first + self.batch_size]
            batch, sizes = self.prepare(chunk, short)
            results += self.finish(self.run(batch, sizes), sizes, chunk)
        return results

    def prepare(self, images: Sequence[Tensor], short: int | None = None) -> tuple[Tensor, Tensor]:
        """The inputs of the graph, for at most as many images as it takes.

        Args:
            images: (3, height, width), in [0, 1].
            short: see `detect`.

        Returns:
            Normalised, resized and padded images (B, 3, H, W); height and width of each without padding, (B, 2).
        """
        batch = torch.zeros(self.batch_size, 3, *self.size)
        sizes = torch.tensor([self.size] * self.batch_size, dtype=torch.float32)
        for i, image in enumerate(images):
            height, width = self.resized_shape(image, short or self.inputs.TEST_SHORT)
            normed = self.transform.normalize(image.cpu())
            batch[i, :, :height, :width] = F.interpolate(normed[None], (height, width), mode='bilinear')[0]
            sizes[i] = torch.tensor((height, width))
        return batch, sizes

    def resized_shape(self, image: Tensor, short: int) -> Size:
        """Height and width of a resized image: as in evaluation, or smaller, so that they fit into `size`."""
        height, width = image.shape[1:]
        shape = Size(*resized_shape(height, width, short, self.inputs.MAX_LONG))
        if shape.height <= self.size.height and shape.width <= self.size.width:
            return shape
        scale = min(self.size.height / height, self.size.width / width)
        return Size(max(round(height * scale), 1), max(round(width * scale), 1))

    def finish(
        self, outputs: Sequence[Tensor], sizes: Tensor, images: Sequence[Tensor]
    ) -> list[dict[str, Tensor | BoxMasks]]:
        """Detections in the pixels of the images, without the empty rows.

        Args:
            outputs: of the graph.
            sizes: height and width of each resized image, (B, 2).
            images: (3, height, width), as they were before resizing.
        """
        results = []
        for i in range(len(images)):
            rows = dict(zip(OUTPUTS, (x[i] for x in outputs), strict=False))
            found = (rows['labels'] > 0) & (rows['scores'] > self.min_score)
            rows = {key: x[found] for key, x in rows.items()}
            if 'masks' in rows:
                rows['masks'] = rows['masks'][:, None]  # (n, 1, size, size)
            results.append(rows)
        resized = [(height, width) for height, width in sizes.int().tolist()][: len(images)]
        return self.transform.postprocess(results, resized, [tuple(image.shape[1:]) for image in images])


def run_onnx_detector(path: Path) -> RunBatch:
    """A function that runs an ONNX file with onnxruntime.

    Raises:
        ExportedFileError: onnxruntime is not installed, or cannot load the file.
    """
    try:
        session = onnx_session(path)
    except ExportedFileError:
        raise
    except Exception as error:  # onnxruntime documents no exceptions of its own
        raise ExportedFileError(f'onnxruntime cannot load {path}: {reason(error)}') from error

    def run(images: Tensor, sizes: Tensor) -> list[Tensor]:
        inputs = dict(zip(INPUTS, (images.numpy(), sizes.numpy()), strict=True))
        try:
            return [torch.from_numpy(x) for x in session.run(None, inputs)]
        except Exception as error:  # see above
            raise ExportedFileError(f'{path} fails: {reason(error)}') from error

    return run


def load_exported_detector(path: Path, opts: Sequence[Any] = ()) -> Predictor:
    """Load a detector that `tools.export --detector` has written; say on stderr what it is.

    Args:
        path: the ONNX file, with FILE.json next to it.
        opts: keys and values that override those of the config in FILE.json. `MODEL.BOX.SCORE` may be raised; other
            keys of `MODEL` are part of the graph.

    Raises:
        UserError: the file or FILE.json cannot be used, or a key cannot be overridden.
    """
    if not path.is_file():
        raise ExportedFileError(f'{path} does not exist: give a file that tools.export --detector has written')
    report = read_detector_report(path)
    fp32 = ['AMP_OPT_LEVEL', 'O0']  # whatever the precision of training was
    exported, config = (TREE.load(None, [*fp32, *options], report['config']) for options in ((), opts))
    batch_size, _, *sides = report['input']['images']
    size = Size(*sides)
    check_overrides(exported, config, path, size)
    model = ExportedDetector(config, size, batch_size, run_onnx_detector(path))
    print(printable(f'{path}: fp32, {model.size}, run by onnxruntime'), file=sys.stderr)
    return Predictor(config, model.eval(), list(report['classes']), torch.device('cpu'))


def read_detector_report(path: Path) -> dict[str, Any]:
    """Read the report of `tools.export` on a whole detector, and check the form of its entries.

    Raises:
        ExportedFileError: it cannot be read, is not such a report, or is about another network.
    """
    file, report = report_file(path), read_report(path)
    network, inputs = report.get('network'), report.get('input')
    shape = inputs.get('images') if isinstance(inputs, dict) else None
    if network in ('classifier', "detector's backbone"):
        raise ExportedFileError(f'{path} is a {network}: give a file that tools.export --detector has written')
    is_shape = isinstance(shape, list) and len(shape) == 4 and all(type(x) is int and x > 0 for x in shape)
    if network != 'detector' or not is_shape or not report.get('config') or not report.get('classes'):
        raise ExportedFileError(f'{file} is not a report of tools.export --detector: export the detector again')
    if stated_task(report['config']) not in (None, 'detection'):
        raise ExportedFileError(f'{path} is not a detector: give a file that tools.export --detector has written')
    if len(report['classes']) != TREE.load(None, (), report['config']).MODEL.NUM_CLASSES:
        raise ExportedFileError(
            f'{file} names {len(report["classes"])} classes, and its config has another number: export the detector '
            f'again'
        )
    return report


def check_overrides(exported: CfgNode, config: CfgNode, path: Path, size: Size) -> None:
    """Refuse config keys that cannot change, since they are part of the exported graph.

    Args:
        exported: the config that the file was exported with.
        config: with other values of some keys.
        path: the file.
        size: height and width of its images.

    Raises:
        ExportedFileError: a key differs that is part of the graph, images would be larger than the graph's, the device
            is not the CPU, or the precision is not float32.
    """
    if config.DEVICE not in ('auto', 'cpu'):
        raise ExportedFileError(f'DEVICE is {config.DEVICE}, and exported files run on the CPU: write DEVICE cpu')
    if config.AMP_OPT_LEVEL != 'O0':
        raise ExportedFileError(
            f'AMP_OPT_LEVEL is {config.AMP_OPT_LEVEL}, and exported files run in float32: leave it out'
        )
    for key, before, shorts in (
        ('INPUT.TEST_SHORT', [exported.INPUT.TEST_SHORT], [config.INPUT.TEST_SHORT]),
        ('TEST.SHORTS', exported.TEST.SHORTS, config.TEST.SHORTS),
    ):
        if list(shorts) != list(before) and shorts and max(shorts) > min(size):
            raise ExportedFileError(
                f'{key} has {max(shorts):g} pixels, and {path} takes images of {size}: write at most {min(size)}, or '
                f'export the detector with a larger --size'
            )
    before, after = dict(leaves(exported.MODEL)), dict(leaves(config.MODEL))
    for key in before:
        if key == 'BOX.SCORE' and after[key] >= before[key]:
            continue
        if after[key] != before[key]:
            limit = f'at least {before[key]}' if key == 'BOX.SCORE' else f'{before[key]}'
            raise ExportedFileError(
                f'MODEL.{key} is {after[key]}, and {path} was exported with {before[key]}: write {limit}, or export '
                f'the detector with --opts MODEL.{key} {after[key]}'
            )
