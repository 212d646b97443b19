"""Export a trained network as ONNX, OpenVINO, torch.export or safetensors, and compare it with eager execution.

    python -m tools.export --resume ckpt.pth --format onnx --output msg.onnx --always-pad --latency
    python -m tools.export --resume ckpt.pth --format torch_export --output msg.pt2 --size 480 640
    python -m tools.export --resume ckpt.pth --format onnx --output detector.onnx --detector --size 800 1344
    python -m tools.export --resume ckpt.pth --format openvino --output msg.xml --int8 --calibrate train --labelled val

A classifier is exported whole. Of a detector, the backbone is exported (safetensors: all weights), or with --detector
the whole network with its NMS, for one batch size and one image size. Of other graphs, the batch size is dynamic. With
--always-pad, so are height and width: each from one patch to 4096 pixels. Otherwise, a file has one image size.

The file is run on real images at several sizes. It is kept only if no output differs by more than 1e-4 or, with
--detector, if it finds the same objects. Weights are read back and compared. FILE.json has the differences, the range,
versions, classes, preprocessing and config.

--int8 quantizes a classifier's ONNX or OpenVINO file on images of --calibrate. The int8 file is kept only if its top-1
accuracy on --labelled falls by at most --max-drop points, and if it is faster than the file without --int8.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image

from engine.exported_file import report_file
from engine.predictor import add_network_flags
from models.pyramid import Size
from models.registry import stored_weights
from tools.convert_checkpoint import convert
from tools.export import detector, formats, openvino_files, quantization
from tools.export.check import TOLERANCE, check_sizes, check_weights, compare, load_images, make_batch, measure_latency
from tools.export.exported import files_read
from tools.export.formats import FORMATS, GRAPHS, OPSET, PACKAGES, Runner
from tools.export.network import ExportError, Network, load_network
from tools.export.openvino_files import files_of
from tools.export.rewrite import rewrite_for_runtimes
from tools.output_files import prepare_output, refuse_overwriting
from utils import (
    atomic_write,
    environment,
    exit_on_user_error,
    home_path,
    non_negative_float,
    positive_int,
    printable,
    report_write_errors,
)

LABELLED_HELP = (
    'class folders of other images, to measure the accuracy (default: the images of --calibrate that are not chosen)'
)
SIZE_HELP = 'height and width of the images in pixels, or one number (DATA.IMG_SIZE); with --always-pad, also checked'


def parse_option(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        'python -m tools.export',
        description=__doc__.splitlines()[0],
        epilog=__doc__.split('\n\n', 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_network_flags(parser, stored_weights())
    add = parser.add_argument
    add('--format', required=True, choices=FORMATS, help='torch_export: a .pt2 file for torch.export.load')
    add(
        '--output',
        required=True,
        type=home_path,
        metavar='FILE',
        help=f'file to write: {", ".join(FORMATS.values())}; with .xml, also a .bin',
    )
    add('--always-pad', action='store_true', help='also allow any height and width, from one patch to 4096 pixels')
    add('--size', type=positive_int, nargs='+', action='append', default=[], metavar='N', help=SIZE_HELP)
    add(
        '--images',
        nargs='+',
        type=home_path,
        default=[],
        metavar='IMAGES',
        help='images for the comparison (default: two photographs of scikit-learn)',
    )
    add('--latency', action='store_true', help='time the file against eager and compiled execution: minutes')
    add('--rounds', type=positive_int, default=20, metavar='N', help='rounds of timing (20)')
    add_int8_flags(parser)
    detector.add_detector_flags(parser)
    args = parser.parse_args(argv)
    if any(len(size) > 2 for size in args.size):
        parser.error('--size takes one number, or height and width: write --size again for another')
    if args.format not in GRAPHS and (args.always_pad or args.latency or args.size or args.images):
        parser.error('safetensors holds weights, for any size: leave out --always-pad, --latency, --size and --images')
    detector.check_detector_flags(parser, args)
    check_int8_flags(parser, args)
    args.size = [Size.of(size[0] if len(size) == 1 else size) for size in args.size]
    return args


def add_int8_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for files in int8."""
    add = parser.add_argument_group('int8').add_argument
    add('--int8', action='store_true', help="quantize a classifier's ONNX or OpenVINO file; needs --calibrate")
    images = f'folder of training images that set the ranges of values; {quantization.CALIBRATION_IMAGES} are chosen'
    add('--calibrate', type=home_path, metavar='FOLDER', help=images)
    add('--labelled', type=home_path, metavar='FOLDER', help=LABELLED_HELP)
    add('--limit', type=positive_int, metavar='N', help='score only N of them, chosen at random but always the same')
    add(
        '--max-drop',
        type=non_negative_float,
        metavar='POINTS',
        help='points (percent) of top-1 accuracy that may be lost (0.5)',
    )


def check_int8_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program where flags for int8 do not go together."""
    if not args.int8:
        given = [name for name in ('calibrate', 'labelled', 'limit', 'max_drop') if getattr(args, name) is not None]
        if given:
            parser.error(f'--{given[0].replace("_", "-")} is for int8 files: add --int8, or leave it out')
        return
    if args.format not in quantization.FORMATS:
        parser.error(f'--int8 is for the formats {" and ".join(quantization.FORMATS)}: leave it out for {args.format}')
    if args.calibrate is None:
        parser.error('--int8 needs images: --calibrate FOLDER to quantize, and --labelled FOLDER to measure accuracy')
    if args.max_drop is None:
        args.max_drop = 0.5


def main() -> None:
    """Export, check, write."""
    args = parse_option()
    with exit_on_user_error():
        check_output(args)
        formats.require_packages(packages_of(args))
        if args.detector:
            export_whole_detector(args)
            return
        network = load_network(args)
        if network.is_detector and args.format in GRAPHS and not args.int8:
            print("the detector's backbone is exported: add --detector for the whole detector", file=sys.stderr)
        any_size = args.always_pad or args.format not in GRAPHS
        sizes = check_sizes(network, args.size, any_size)
        int8_images = find_int8_images(network, args, sizes) if args.int8 else None
        report = describe(network, args, any_size, sizes)
        with TemporaryDirectory() as folder:
            file = Path(folder) / args.output.name
            if args.format in GRAPHS:
                report |= write_graph(network, args, sizes, file, int8_images)
            else:
                convert(Path(args.resume), file, args.pretrained_weights)
                check_weights(file, Path(args.resume), args.pretrained_weights)
                report |= {'checked': [], 'max_abs_difference': 0.0}
            save(file, args.output, report)
        print_report(args.output, report)


def export_whole_detector(args: argparse.Namespace) -> None:
    """Export, check and write a whole detector, and print how the file agrees with eager execution.

    Raises:
        UserError: see `detector.export_detector`.
    """
    predictor = detector.load_whole_detector(args)
    with TemporaryDirectory() as folder:
        file = Path(folder) / args.output.name
        report = detector.export_detector(args, predictor, file)
        save(file, args.output, report)
    print(f'{report["images"]} images: the file has {detector.Agreement(**report["agreement"])}')
    print_latency(report)
    print_files(args.output)


def packages_of(args: argparse.Namespace) -> tuple[str, ...]:
    """Packages that the command line needs beyond requirements.txt."""
    names = PACKAGES.get(args.format, ())
    return (*names, 'nncf') if args.int8 and args.format == 'openvino' else names


def check_output(args: argparse.Namespace) -> None:
    """Refuse an output that cannot be written, before minutes of work.

    Raises:
        ExportError: an unknown suffix.
        OutputError: its folder cannot be written to, or it is a folder, or the checkpoint itself.
    """
    output, suffix = args.output, FORMATS[args.format]
    if output.suffix != suffix:
        raise ExportError(f'{output} has another suffix: write {suffix} for {args.format}')
    for path in files_read(output):
        prepare_output(path)
    refuse_overwriting(files_of(output), args.resume)


def find_int8_images(network: Network, args: argparse.Namespace, sizes: Sequence[Size]) -> quantization.Int8Images:
    """The images for `--int8`; see `quantization.find_images`.

    Raises:
        ExportError: see there, or the file does not take the images of evaluation.
    """
    images = quantization.find_int8_images(network, args.calibrate, args.labelled, args.limit)
    size = network.config.DATA.IMG_SIZE
    if not args.always_pad and sizes[0] != Size.of(size):
        raise ExportError(
            f'--size {sizes[0]}: accuracy is measured on images of {size} x {size}, as in evaluation: '
            f'leave out --size, or write --opts DATA.IMG_SIZE for another size of both'
        )
    return images


def write_graph(
    network: Network,
    args: argparse.Namespace,
    sizes: Sequence[Size],
    file: Path,
    int8_images: quantization.Int8Images | None,
) -> dict[str, Any]:
    """Write a network as a graph, and compare it with eager execution.

    Args:
        network: the network.
        args: the command line.
        sizes: image sizes to compare at; without `--always-pad`, the one of the file.
        file: the file.
        int8_images: for `--int8`.

    Returns:
        The differences and, if asked for, the accuracy in int8 and the latency, as plain data.

    Raises:
        ExportError: the network cannot be exported so, or the file fails, differs, or is not worth keeping in int8.
    """
    images = load_images(args.images, network.normalization[0])
    run = trace_and_write(network, args, None if args.always_pad else sizes[0], file)
    comparisons = compare(network, run, images, sizes)
    report: dict[str, Any] = {
        'checked': [comparison._asdict() for comparison in comparisons],
        'max_abs_difference': max(comparison.difference for comparison in comparisons),
    }
    if int8_images:
        run, report['int8'] = write_int8(network, args, sizes, file, run, images, int8_images)
    if args.latency:
        report['latency'] = measure_latency(network, run, make_batch(network, images, sizes[0], 1), args.rounds)
    return report


def write_int8(
    network: Network,
    args: argparse.Namespace,
    sizes: Sequence[Size],
    file: Path,
    run: Runner,
    images: Sequence[Image.Image],
    int8_images: quantization.Int8Images,
) -> tuple[Runner, dict[str, Any]]:
    """Replace a file by its int8 form, if that is accurate and faster.

    Args:
        network: the network.
        args: the command line.
        sizes: image sizes at which the file has to run.
        file: the file in fp32.
        run: runs it.
        images: to feed.
        int8_images: to calibrate with, and to score.

    Returns:
        What runs the int8 file; its accuracy and latency as plain data.

    Raises:
        ExportError: the network cannot be quantized, or the file in int8 is not worth keeping.
    """
    inputs = quantization.calibration_inputs(network, int8_images.calibration)
    print(f'quantizing with {len(inputs)} images', file=sys.stderr)
    target = file.parent / 'int8' / file.name
    target.parent.mkdir()
    quantization.quantize(args.format, file, target, inputs)
    run_int8 = runner_of(args.format)(target)
    for size in sizes:
        quantization.run_file(run_int8, make_batch(network, images, size, 1))
    print(f'scoring {len(int8_images.labelled.paths)} images, and timing', file=sys.stderr)
    timed = make_batch(network, images, Size.of(network.config.DATA.IMG_SIZE), max(quantization.LATENCY_BATCHES))
    runners = {'int8': run_int8, 'unquantized': run}
    report = quantization.score_and_time(network, runners, int8_images.labelled, timed, args.max_drop, args.rounds)
    for old, new in zip(files_of(file), files_of(target), strict=True):
        new.replace(old)
    return run_int8, {'calibration_images': len(inputs)} | report


def trace_and_write(network: Network, args: argparse.Namespace, size: Size | None, file: Path) -> Runner:
    """Trace a network at an image size, None for any, write the graph, and return what runs the file.

    Raises:
        ExportError: the network cannot be exported so.
    """
    print('tracing', file=sys.stderr)
    if args.format != 'torch_export':  # PyTorch has its own fused attention
        graph = rewrite_for_runtimes(network.graph, for_onnxruntime=args.format == 'onnx')
        network = network._replace(graph=graph)
    program = formats.trace(network, size)
    print('writing', file=sys.stderr)
    if args.format == 'torch_export':
        formats.write_torch_export(program, file)
    else:
        axes = {axis: name for axis, (name, _, _) in formats.dynamic_axes(network, size).items()}
        write = {'onnx': formats.write_onnx, 'openvino': openvino_files.write_openvino}[args.format]
        write(program, file, network.outputs, axes)
    return runner_of(args.format)(file)


def runner_of(format_: str) -> Callable[[Path], Runner]:
    """The function that loads a file of a format to run it."""
    functions = {'onnx': formats.run_onnx, 'openvino': openvino_files.run_openvino}
    return functions.get(format_, formats.run_torch_export)


def describe(network: Network, args: argparse.Namespace, any_size: bool, sizes: Sequence[Size]) -> dict[str, Any]:
    """What the file is, as plain data."""
    size = None if any_size else sizes[0]
    shape: list[int | str] = [0, network.channels, *(size or (0, 0))]
    ranges = {}
    for axis, (name, low, high) in formats.dynamic_axes(network, size).items():
        shape[axis], ranges[name] = name, [low, high]
    return {
        'format': args.format,
        'precision': 'int8' if args.int8 else 'fp32',
        'network': "detector's backbone" if network.is_detector else 'classifier',
        'input': {'name': 'images', 'dtype': 'float32', 'shape': shape, 'range': ranges},
        'outputs': network.outputs,
        'opset': OPSET if args.format == 'onnx' else None,
        'preprocessing': network.preprocessing,
        'classes': network.class_names,
        'tolerance': TOLERANCE,
        'environment': environment(torch.device('cpu')) | {name: version(name) for name in packages_of(args)},
        'config': network.plain_config,
    }


def save(file: Path, output: Path, report: dict[str, Any]) -> None:
    """Put a file that passed its check, and its report, in place.

    Raises:
        OutputError: they cannot be written.
    """
    text = json.dumps(report, indent=2)
    with report_write_errors(output.parent):
        for path, target in zip(files_of(file), files_of(output), strict=True):
            with path.open('rb') as source:
                atomic_write(target, partial(shutil.copyfileobj, source))
        atomic_write(report_file(output), lambda target: target.write(text.encode()))


def print_report(output: Path, report: dict[str, Any]) -> None:
    """Print the differences, the accuracy in int8 and the latency."""
    for size, batch, difference in (comparison.values() for comparison in report['checked']):
        print(f'{size}, batch {batch}: differs by {difference:.1e}')
    if report['checked']:
        before = ' before quantization' if 'int8' in report else ''
        print(f'largest difference from eager execution{before}: {report["max_abs_difference"]:.1e}')
    else:
        print('all weights read back equal')
    if int8 := report.get('int8'):
        print_int8(int8)
    print_latency(report)
    print_files(output)


def print_latency(report: dict[str, Any]) -> None:
    """Print the latency of a file, if it was measured."""
    if latency := report.get('latency'):
        batch, _, height, width = latency['shape']
        ms = ', '.join(f'{name} {1e3 * seconds:.1f} ms' for name, seconds in latency['median_seconds'].items())
        times = ', '.join(f'{x["median"]:.2f} x {name}' for name, x in latency['time_relative_to'].items())
        print(f'latency at {height} x {width}, batch {batch}: {ms}; the file takes {times}')


def print_files(output: Path) -> None:
    """Print the files that were written."""
    print(printable(', '.join(map(str, [*reversed(files_of(output)), report_file(output)]))))


def print_int8(int8: dict[str, Any]) -> None:
    """Print the accuracy and the latency of an int8 file."""
    eager, file = int8['top1'].values()
    print(f'int8, {int8["scored_images"]} images: top-1 accuracy {file:.2f} % (eager execution: {eager:.2f} %)')
    print(f'int8, {int8["scored_images"]} images: the same answer as eager execution for {int8["agreement"]:.1f} %')
    for latency in int8['latency']:
        ms = ', '.join(f'{name} {1e3 * seconds:.1f} ms' for name, seconds in latency['median_seconds'].items())
        times = ', '.join(f'{x["median"]:.2f} x {name}' for name, x in latency['time_relative_to'].items())
        print(f'int8, batch {latency["batch"]}: {ms}; the file takes {times}')


if __name__ == '__main__':
    main()
