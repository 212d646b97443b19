"""Evaluate a detector in an ONNX file on a dataset and, on request, the checkpoint that it was exported from.

    python -m detection.tools.evaluate_onnx detector.onnx --data-path <coco>
    python -m detection.tools.evaluate_onnx detector.onnx --data-path <coco> --resume ckpt.pth

It prints COCO's metrics, as `detection.main --eval` does, and the time per image. With --resume, it also evaluates the
checkpoint on the CPU: once as `--eval` does, and once with each image padded as for the file. The file and the
checkpoint take turns on each image, so that their times can be compared.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import yaml
from torch import Tensor
from tqdm import tqdm
from yacs.config import CfgNode

from data import DataError
from detection.data import build_eval_loader
from detection.data.annotations import read_class_names
from detection.data.build import split_files
from detection.evaluation import CocoEvaluation
from detection.export import FixedDetector
from detection.exported import ExportedDetector, load_exported_detector
from detection.main import TASK
from detection.tta import Output, build_detect_fn
from engine.config_tree import add_options
from engine.experiment import compare_classes
from engine.exported_file import ExportedFileError
from engine.predictor import load_predictor, network_args
from engine.weights import changed_network
from utils import exit_on_user_error, home_path, printable, report_write_errors

FILE, EAGER, PADDED = 'file', 'eager', 'eager, padded'


class Result(NamedTuple):
    """Metrics of a detector, and its seconds for each image."""

    evaluation: CocoEvaluation
    seconds: list[float]


def parse_option() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        'python -m detection.tools.evaluate_onnx',
        description=__doc__.splitlines()[0],
        epilog=__doc__.split('\n\n', 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('file', type=home_path, help='ONNX file of tools.export --detector')
    add('--data-path', required=True, metavar='DIR', help='the dataset (DATA.DATA_PATH)')
    add('--resume', type=home_path, metavar='FILE', help='checkpoint to evaluate too')
    add_options(parser, 'config keys and values that override those of the file, such as DATA.VAL_LIMIT 100')
    add('--output', type=home_path, metavar='FILE', help="JSON to write: the file's detections in COCO's result format")
    return parser.parse_args()


def check_classes(config: CfgNode, classes: Sequence[str], file: Path) -> None:
    """Compare the classes of the evaluation split with those of the file; warn on stderr of other names.

    Args:
        config: the config tree; `DATA` is read.
        classes: of the detector in the file.
        file: the ONNX file, for messages.

    Raises:
        DataError: the data cannot be used, or have another number of classes.
    """
    annotations = split_files(config, 'VAL').annotations
    names = read_class_names(annotations, list(filter(None, config.DATA.CLASSES)))
    if len(names) != len(classes):
        raise DataError(
            f'{annotations} has {len(names)} categories, and {file} detects {len(classes)} classes: give --data-path a '
            f'dataset with the classes of the file'
        )
    for change in compare_classes(names, {'classes': classes}):
        text = f'{annotations} has {change} than {file}: metrics mean nothing unless classes stand for the same things'
        print(printable(f'warning: {text}'), file=sys.stderr)


@torch.inference_mode()
def evaluate(config: CfgNode, detectors: dict[str, Callable[[list[Tensor]], list[Output]]]) -> dict[str, Result]:
    """Evaluate detectors on the evaluation split, in turns on each image.

    Args:
        config: the config tree; `DATA` is read.
        detectors: by name, functions from images in [0, 1] to their detections.

    Raises:
        DataError: the data cannot be used.
    """
    loader = build_eval_loader(config)
    results = {name: Result(CocoEvaluation(loader.dataset), []) for name in detectors}
    for number, (images, targets) in enumerate(tqdm(loader, unit=' images', leave=False, disable=None)):
        names = list(detectors)
        first = number % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            found = detectors[name](images)
            results[name].seconds.append(time.perf_counter() - start)
            results[name].evaluation.update(targets, found)
    for evaluation, _ in results.values():
        evaluation.finish()
    return results


def describe(results: dict[str, Result]) -> str:
    """Tables of the metrics, and the median seconds per image."""
    parts = []
    for name, (evaluation, _) in results.items():
        parts.append(f'{name}: {len(evaluation.results())} detections\n{evaluation.table()}\n')
    for name, (_, seconds) in results.items():
        line = f'{name}: {1e3 * median(seconds):.0f} ms per image'
        if name != FILE:
            ratio = median(a / b for a, b in zip(results[FILE].seconds, seconds, strict=True))
            line += f'; the file takes {ratio:.2f} x as long'
        parts.append(line)
    return '\n'.join(parts)


def main() -> None:
    """Read the command line, evaluate and print."""
    args = parse_option()
    with exit_on_user_error():
        if args.output:
            with report_write_errors(args.output.parent):
                args.output.parent.mkdir(parents=True, exist_ok=True)
        predictor = load_exported_detector(args.file, [*args.opts, 'DATA.DATA_PATH', args.data_path])
        config, exported = predictor.config, predictor.model
        check_classes(config, predictor.class_names, args.file)
        detectors = {FILE: build_detect_fn(config, exported)}
        if args.resume:
            detectors |= eager_detectors(args, config, exported)
        results = evaluate(config, detectors)
        if args.output:
            results[FILE].evaluation.write(args.output)
        print(describe(results))


def eager_detectors(
    args: argparse.Namespace, config: CfgNode, exported: ExportedDetector
) -> dict[str, Callable[[list[Tensor]], list[Output]]]:
    """The detector of the checkpoint on the CPU, as evaluation runs it, and with images padded as for the file.

    Args:
        args: the command line.
        config: of the file.
        exported: the detector in the file.

    Raises:
        UserError: the checkpoint cannot be used, or is another network than that of the file.
    """
    opts = [*args.opts, 'DEVICE', 'cpu', 'MODEL.BOX.SCORE', config.MODEL.BOX.SCORE]
    predictor = load_predictor(network_args(args.resume, opts), TASK)
    checkpoint = {'config': yaml.safe_load(predictor.config.dump()), 'task': TASK.name}
    changed = changed_network(config, checkpoint, TASK.tree)
    if changed:
        raise ExportedFileError(
            f'{args.resume} is not the network of {args.file} ({"; ".join(map(str, changed))}): give the checkpoint '
            f'that the file was exported from'
        )
    model = predictor.model
    padded = ExportedDetector(config, exported.size, 1, FixedDetector(model, exported.size).eval())
    return {EAGER: build_detect_fn(config, model), PADDED: build_detect_fn(config, padded)}


if __name__ == '__main__':
    main()
