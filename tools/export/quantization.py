"""Post-training quantization to int8, and the check that it costs little accuracy and makes the file faster."""

import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.file_loader import evaluation_loader
from data.images import choose_images, find_images
from data.preprocess import Preprocess
from tools.export.check import Latency, time_against_others
from tools.export.formats import Runner
from tools.export.network import ExportError, Network
from tools.export.openvino_files import quantize_openvino
from utils import available_cores, first_line, printable

FORMATS = ('onnx', 'openvino')  # of int8 files
CALIBRATION_IMAGES = 256
LATENCY_BATCHES = (1, 8)
WORKERS = min(available_cores(), 4)


class LabelledImages(NamedTuple):
    """Images of known classes.

    Attributes:
        paths: the images.
        labels: index of each one's class.
    """

    paths: Sequence[Path]
    labels: Tensor


class Scores(NamedTuple):
    """Top-1 accuracy of eager execution and of a file, and on how many images both answer the same, in percent."""

    images: int
    eager: float
    file: float
    agreement: float

    @property
    def drop(self) -> float:
        """Points of accuracy that the file loses."""
        return self.eager - self.file


class Int8Images(NamedTuple):
    """Images that an int8 file is calibrated on, and others on which it is scored."""

    calibration: Sequence[Path]
    labelled: LabelledImages


def find_int8_images(network: Network, calibrate: Path, labelled: Path | None, limit: int | None) -> Int8Images:
    """Find the images for an int8 file.

    Args:
        network: the network.
        calibrate: folder of images; at most `CALIBRATION_IMAGES` are chosen, at random but always the same.
        labelled: folder of class folders; None for the images of `calibrate` that are not chosen. Then, at most half of
            that folder's images are chosen.
        limit: of the images to score, likewise chosen; None takes all.

    Raises:
        DataError: a folder does not exist, or has no images.
        ExportError: the network has no classes, no folder has the name of one, or an image is in both folders.
    """
    if network.is_detector or not network.class_names:
        kind = "a detector's backbone" if network.is_detector else 'a network without classes'
        raise ExportError(
            f'an int8 file is checked by its top-1 accuracy, which {kind} does not have: leave out --int8'
        )
    available = find_images([calibrate])
    if labelled is None:
        calibration = choose_images(available, min(CALIBRATION_IMAGES, max(1, len(available) // 2)))
        chosen = set(calibration)
        images = [path for path in available if path not in chosen]
    else:
        calibration, images = choose_images(available, CALIBRATION_IMAGES), find_images([labelled])
    indices = {name: index for index, name in enumerate(network.class_names)}
    paths = [path for path in images if path.parent.name in indices]
    folder = labelled or calibrate
    if not paths:
        names = ', '.join(network.class_names[:3])
        advice = 'give another --labelled' if labelled else 'add --labelled'
        raise ExportError(f'{folder} has no images to score in folders with names of classes ({names}, ...): {advice}')
    if len(paths) < len(images):
        others = len(images) - len(paths)
        print(
            printable(f'{folder}: {others} images left out: their folders are not named after classes'), file=sys.stderr
        )
    paths = choose_images(paths, limit)
    both = {path.resolve() for path in calibration} & {path.resolve() for path in paths}
    if both:
        raise ExportError(
            f'{len(both)} images are in both --calibrate and --labelled, such as {min(both)}: give --labelled a folder '
            f'of other images'
        )
    return Int8Images(calibration, LabelledImages(paths, torch.tensor([indices[path.parent.name] for path in paths])))


def calibration_inputs(network: Network, paths: Sequence[Path]) -> list[np.ndarray]:
    """Images as evaluation sees them, each (1, C, H, W), normalised; those that cannot be read are left out.

    Raises:
        ExportError: none can be read.
    """
    preprocess = Preprocess(network.config, torch.device('cpu'))
    batches = (batch.images for batch in evaluation_loader(network.config, paths, 32, WORKERS))
    inputs = [image[None].numpy() for images in batches if images is not None for image in preprocess.prepare(images)]
    if not inputs:
        raise ExportError('no image of --calibrate can be read: see above')
    return inputs


def quantize_onnx(source: Path, target: Path, images: Sequence[np.ndarray]) -> None:
    """Quantize an ONNX file to int8 with onnxruntime, statically, in the form of QDQ.

    Matrix products with weights and convolutions are quantized, with a scale for each output channel of the weights.

    Args:
        source: the file in fp32.
        target: the file to write.
        images: to calibrate with, each (1, C, H, W).
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.inputs = ({'images': image} for image in images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.inputs, None)

    prepared = target.with_suffix('.prepared.onnx')
    quant_pre_process(source, prepared)
    quantization.quantize_static(
        prepared,
        target,
        Images(),
        quant_format=quantization.QuantFormat.QDQ,
        op_types_to_quantize=['Conv', 'Gemm'],  # the MatMuls are those of attention: see `tools.export.rewrite`
        per_channel=True,
        reduce_range=True,  # without VNNI, products of 8 bits overflow
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )
    prepared.unlink()


def quantize(format_: str, source: Path, target: Path, images: Sequence[np.ndarray]) -> None:
    """Quantize a file to int8; nothing is printed on stdout.

    Args:
        format_: `onnx` or `openvino`.
        source: the file in fp32.
        target: the file to write.
        images: to calibrate with, each (1, C, H, W).

    Raises:
        ExportError: onnxruntime or NNCF refuses.
    """
    function = {'onnx': quantize_onnx, 'openvino': quantize_openvino}[format_]
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)  # onnxruntime warns there of what is done here
    try:
        with redirect_stdout(sys.stderr):
            function(source, target, images)
    except Exception as error:  # neither documents exceptions of its own
        raise ExportError(f'the network cannot be quantized: {first_line(error)}') from error
    finally:
        logging.root.setLevel(level)


@torch.inference_mode()
def score(network: Network, run: Runner, images: LabelledImages) -> Scores:
    """Score eager execution and a file on labelled images, as evaluation sees them.

    Args:
        network: the network.
        run: runs the file.
        images: those that cannot be read are reported, and left out.

    Raises:
        ExportError: the file fails, its outputs are not finite, or no image can be read.
    """
    preprocess = Preprocess(network.config, torch.device('cpu'))
    count = right_eager = right_file = same = 0
    for batch in evaluation_loader(network.config, images.paths, 16, WORKERS):
        if batch.images is None:
            continue
        inputs, labels = preprocess.prepare(batch.images), images.labels[batch.indices]
        (expected,), (outputs,) = network.run(inputs), run_file(run, inputs)
        eager, file = expected.argmax(dim=1), outputs.argmax(dim=1)  # (B,)
        count += len(labels)
        right_eager += (eager == labels).sum().item()
        right_file += (file == labels).sum().item()
        same += (eager == file).sum().item()
    if not count:
        raise ExportError('none of the images to score can be read: see above')
    return Scores(count, *(100 * x / count for x in (right_eager, right_file, same)))


def run_file(run: Runner, inputs: Tensor) -> list[Tensor]:
    """The outputs of an int8 file.

    Raises:
        ExportError: the file fails, or its outputs are not finite.
    """
    shape = ' x '.join(map(str, inputs.shape))
    try:
        outputs = run(inputs)
    except Exception as error:  # of whatever runs the file
        raise ExportError(f'the int8 file fails on images of {shape}, and is not kept: {first_line(error)}') from error
    if not all(x.isfinite().all() for x in outputs):
        raise ExportError(f'the int8 file has outputs that are not finite on images of {shape}, and is not kept')
    return outputs


def check_gain(scores: Scores, latencies: Mapping[int, Latency], max_drop: float) -> None:
    """Check that an int8 file is accurate and fast enough to be kept.

    Args:
        scores: of the file.
        latencies: by batch size, of `int8` against the others.
        max_drop: points of accuracy that it may lose.

    Raises:
        ExportError: it loses more than `max_drop` points of accuracy, or is not faster than the unquantized file at a
            batch size; the message has the figures.
    """
    problems = []
    if scores.drop > max_drop + 1e-9:
        problems.append(
            f'its top-1 accuracy on {scores.images} images is {scores.file:.2f} %, {scores.drop:.2f} points below '
            f'eager execution, more than --max-drop {max_drop:g}'
        )
    for batch, latency in latencies.items():
        relative = latency.time_relative_to['unquantized'].median
        if relative >= 1:
            int8, unquantized = (1e3 * latency.median_seconds[name] for name in ('int8', 'unquantized'))
            problems.append(f'at batch size {batch} it takes {int8:.1f} ms, the unquantized file {unquantized:.1f} ms')
    if problems:
        raise ExportError(f'the int8 file is not kept: {"; ".join(problems)}')


def score_and_time(
    network: Network,
    runners: Mapping[str, Runner],
    labelled: LabelledImages,
    inputs: Tensor,
    max_drop: float,
    rounds: int,
) -> dict[str, Any]:
    """Score and time an int8 file, and check that it is worth keeping.

    Args:
        network: the network.
        runners: `int8` and `unquantized` run the files.
        labelled: images to score.
        inputs: images to time with, as many as the largest of `LATENCY_BATCHES`.
        max_drop: points of accuracy that the file may lose.
        rounds: how often each is timed.

    Returns:
        Accuracy, agreement and latency, as plain data.

    Raises:
        ExportError: see `score` and `check_gain`.
    """
    scores = score(network, runners['int8'], labelled)
    runners = {**runners, 'eager': network.run}
    latencies = {}
    for batch in LATENCY_BATCHES:
        calls = {name: partial(run, inputs[:batch]) for name, run in runners.items()}
        latencies[batch] = time_against_others('int8', calls, rounds)
    check_gain(scores, latencies, max_drop)
    return {
        'scored_images': scores.images,
        'top1': {'eager': scores.eager, 'file': scores.file},
        'agreement': scores.agreement,
        'max_drop': max_drop,
        'rounds': rounds,
        'latency': [{'batch': batch, **latency.as_dict()} for batch, latency in latencies.items()],
    }
