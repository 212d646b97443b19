"""Exported classifiers, run by onnxruntime or OpenVINO in place of the network that they were made from."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from data.transforms import image_mode
from engine.config_tree import stated_task
from engine.exported_file import ExportedFileError, read_report, reason, report_file
from engine.predictor import Predictor
from engine.weights import check_same_network
from main import TASK
from tools.export.formats import MAX_SIDE, Runner, require_packages, run_onnx
from tools.export.openvino_files import files_of, run_openvino
from utils import printable

# Backends by name: the function that loads a file, and the suffixes of what it loads
BACKENDS: dict[str, tuple[Callable[[Path], Runner], tuple[str, ...]]] = {
    'onnxruntime': (run_onnx, ('.onnx',)),
    'openvino': (run_openvino, ('.xml', '.onnx')),
}


def backend_of(path: str | Path) -> str | None:
    """The backend for a file by its suffix; None if no backend runs it."""
    return next((name for name, (_, suffixes) in BACKENDS.items() if Path(path).suffix in suffixes), None)


def files_read(path: Path) -> list[Path]:
    """All files that belong to an exported file."""
    return [*files_of(path), report_file(path)]


class ExportedNetwork(nn.Module):
    """A classifier in an exported file.

    Args:
        path: the file.
        run: runs it.
    """

    def __init__(self, path: Path, run: Runner):
        super().__init__()
        self.path, self.run = path, run

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of normalised images (B, C, H, W), float32, on the CPU.

        Raises:
            ExportedFileError: the file does not take these images, or has other outputs.
        """
        shape = ' x '.join(map(str, images.shape[1:]))
        try:
            outputs = self.run(images)
        except Exception as error:  # the backends document no exceptions of their own
            raise ExportedFileError(
                f'{self.path} fails on images of {shape}, as its config makes them: {reason(error)}'
            ) from error
        if len(outputs) != 1 or outputs[0].ndim != 2 or len(outputs[0]) != len(images):
            shapes = ', '.join(str(tuple(x.shape)) for x in outputs)
            raise ExportedFileError(
                f'{self.path} has outputs of shape {shapes} for {len(images)} images: it is not a classifier'
            )
        return outputs[0].float()


def load_exported(backend: str, path: Path, opts: Sequence[str] = ()) -> Predictor:
    """Load an exported classifier; say on stderr what it is.

    Args:
        backend: key of `BACKENDS`.
        path: the file, with FILE.json and, of OpenVINO, the .bin file next to it.
        opts: keys and values that override those of the config in FILE.json, but those of the network.

    Raises:
        UserError: the file or FILE.json cannot be used, or a key cannot be overridden.
    """
    load, suffixes = BACKENDS[backend]
    if path.suffix not in suffixes:
        raise ExportedFileError(f'{path} is not a file for {backend}: give a file with the suffix {suffixes[0]}')
    for file in files_of(path):
        if not file.is_file():
            problem = 'is a folder' if file.is_dir() else 'does not exist'
            raise ExportedFileError(f'{file} {problem}: give a file that tools.export has written')
    report = read_classifier_report(path)
    saved, class_names = report['config'], list(report['classes'])
    config = TASK.tree.load(None, opts, saved)
    window = ('MODEL.MSG.WINDOW_SIZE',)
    check_same_network(config, {'config': saved, 'task': TASK.name}, path, TASK.tree, window)
    check_inputs(config, report, path)
    require_packages([backend])
    try:
        network = ExportedNetwork(path, load(path))
    except Exception as error:  # see `ExportedNetwork`
        raise ExportedFileError(f'{backend} cannot load {path}: {reason(error)}') from error
    size = config.DATA.IMG_SIZE
    classes = network(torch.zeros(1, config.MODEL.MSG.IN_CHANS, size, size)).shape[1]
    if classes != len(class_names):
        raise ExportedFileError(
            f'{path} has {classes} outputs, and {report_file(path)} names {len(class_names)} classes: '
            f'export the network again'
        )
    precision = report.get('precision')
    what = f'{precision}, run by {backend}' if precision in ('fp32', 'int8') else f'run by {backend}'
    print(printable(f'{path}: {what}'), file=sys.stderr)
    return Predictor(config, network.eval(), class_names, torch.device('cpu'))


def read_classifier_report(path: Path) -> dict[str, Any]:
    """The report of `tools.export` on a classifier, of which `config` and `classes` have their form.

    Raises:
        ExportedFileError: it cannot be read, is not such a report, or is about another network.
    """
    file, report = report_file(path), read_report(path)
    if not report.get('config') or 'classes' not in report:
        raise ExportedFileError(f'{file} is not a report of tools.export: export the network again')
    if stated_task(report['config']) not in (None, TASK.name) or report.get('network') != 'classifier':
        with_detector = report.get('network') == 'detector'
        remedy = 'detection.tools.predict --backend' if with_detector else 'a checkpoint, --resume'
        raise ExportedFileError(f'{path} is not a classifier: predict with {remedy}')
    if not report['classes']:
        raise ExportedFileError(f'{path} has no classes')
    return report


def check_inputs(config: CfgNode, report: Mapping[str, Any], path: Path) -> None:
    """Check that a file can take the images that a config describes.

    Args:
        config: the config tree.
        report: of the file.
        path: the file.

    Raises:
        UserError: it cannot, or a key says otherwise.
    """
    if config.DEVICE not in ('auto', 'cpu'):
        raise ExportedFileError(f'DEVICE is {config.DEVICE}, and exported files run on the CPU: write DEVICE cpu')
    size, fixed = config.DATA.IMG_SIZE, fixed_size(report)
    if size > MAX_SIDE:
        raise ExportedFileError(f'DATA.IMG_SIZE is {size}: exported files take images of up to {MAX_SIDE} pixels')
    if fixed and fixed != [size, size]:
        is_square = fixed[0] == fixed[1]
        option = f'write --opts DATA.IMG_SIZE {fixed[0]}, or export' if is_square else 'export'
        raise ExportedFileError(
            f'{path} takes images of {fixed[0]} x {fixed[1]}, and DATA.IMG_SIZE is {size}: {option} the network with '
            f'--always-pad'
        )
    image_mode(config)  # refuses other numbers of channels than it knows


def fixed_size(report: Mapping[str, Any]) -> list[int]:
    """Height and width that a file takes, as its report says; empty where it takes any, or the report says nothing."""
    about = report.get('input')
    shape = about.get('shape') if isinstance(about, Mapping) else None
    size = shape[2:] if isinstance(shape, list) and len(shape) == 4 else []
    return size if all(isinstance(x, int) for x in size) else []
