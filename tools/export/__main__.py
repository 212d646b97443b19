"""Export a trained network as ONNX, for torch.export, or as safetensors, and compare its outputs with eager execution.

    python -m tools.export --resume ckpt.pth --format onnx --output msg.onnx --always-pad --latency
    python -m tools.export --resume ckpt.pth --format torch_export --output msg.pt2 --size 480 640

A classifier is exported whole, of a detector its backbone (safetensors: all weights). The batch size is dynamic. With
--always-pad, so are height and width: each from one patch to 4096 pixels. Otherwise, a file has one image size. The
file is run on real images at several sizes, and kept only if no output differs by more than 1e-4; weights are read
back and compared. FILE.json has the differences, the range, versions, classes, preprocessing and config.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from engine.predictor import add_network_flags
from models.pyramid import Size
from models.registry import stored_weights
from tools.convert_checkpoint import convert
from tools.export import formats
from tools.export.check import TOLERANCE, check_sizes, check_weights, compare, load_images, make_batch, measure_latency
from tools.export.formats import FORMATS, GRAPHS, OPSET, Runner
from tools.export.network import ExportError, Network, load_network
from tools.output_files import prepare_output, refuse_overwriting
from utils import (
    atomic_write,
    environment,
    exit_on_user_error,
    home_path,
    positive_int,
    printable,
    report_write_errors,
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
    add('--output', required=True, type=home_path, metavar='FILE', help='file to write: .onnx, .pt2 or .safetensors')
    add('--always-pad', action='store_true', help='dynamic height and width, each from one patch to 4096 pixels')
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
    add('--rounds', type=positive_int, default=20, metavar='N', help='how often each is timed (20)')
    args = parser.parse_args(argv)
    if any(len(size) > 2 for size in args.size):
        parser.error('--size takes one number, or height and width: write --size again for another')
    if args.format not in GRAPHS and (args.always_pad or args.latency or args.size or args.images):
        parser.error('safetensors holds weights, for any size: leave out --always-pad, --latency, --size and --images')
    args.size = [Size.of(size[0] if len(size) == 1 else size) for size in args.size]
    return args


def main() -> None:
    """Export, check, write."""
    args = parse_option()
    with exit_on_user_error():
        check_output(args)
        if args.format == 'onnx':
            formats.require_onnx()
        network = load_network(args)
        if network.is_detector and args.format in GRAPHS:
            print("the detector's backbone is exported: a whole detector cannot be traced", file=sys.stderr)
        any_size = args.always_pad or args.format not in GRAPHS
        sizes = check_sizes(network, args.size, any_size)
        report = describe(network, args, any_size, sizes)
        with TemporaryDirectory() as folder:
            file = Path(folder) / args.output.name
            if args.format in GRAPHS:
                report |= write_graph(network, args, sizes, file)
            else:
                convert(Path(args.resume), file, args.pretrained_weights)
                check_weights(file, Path(args.resume), args.pretrained_weights)
                report |= {'checked': [], 'max_abs_difference': 0.0}
            save(file, args.output, report)
        print_report(args.output, report)


def check_output(args: argparse.Namespace) -> None:
    """Refuse an output that cannot be written, before minutes of work.

    Raises:
        ExportError: an unknown suffix.
        OutputError: its folder cannot be written to, or it is a folder, or the checkpoint itself.
    """
    output, suffix = args.output, FORMATS[args.format]
    if output.suffix != suffix:
        raise ExportError(f'{output} has another suffix: write {suffix} for {args.format}')
    prepare_output(output)
    refuse_overwriting([output], args.resume)


def write_graph(network: Network, args: argparse.Namespace, sizes: Sequence[Size], file: Path) -> dict[str, Any]:
    """Write a network as a graph, and compare it with eager execution.

    Args:
        network: the network.
        args: the command line.
        sizes: image sizes to compare at; without `--always-pad`, the one of the file.
        file: the file.

    Returns:
        The differences and, if asked for, the latency, as plain data.

    Raises:
        ExportError: the network cannot be exported so, or the file fails or differs.
    """
    images = load_images(args.images, network.normalization[0])
    run = trace_and_write(network, args, None if args.always_pad else sizes[0], file)
    comparisons = compare(network, run, images, sizes)
    report: dict[str, Any] = {
        'checked': [comparison._asdict() for comparison in comparisons],
        'max_abs_difference': max(comparison.difference for comparison in comparisons),
    }
    if args.latency:
        report['latency'] = measure_latency(network, run, make_batch(network, images, sizes[0], 1), args.rounds)
    return report


def trace_and_write(network: Network, args: argparse.Namespace, size: Size | None, file: Path) -> Runner:
    """Trace a network at an image size, None for any, write the graph, and return what runs the file.

    Raises:
        ExportError: the network cannot be exported so.
    """
    print('tracing', file=sys.stderr)
    program = formats.trace(network, size)
    print('writing', file=sys.stderr)
    if args.format == 'torch_export':
        formats.write_torch_export(program, file)
        return formats.run_torch_export(file)
    axes = {axis: name for axis, (name, _, _) in formats.dynamic_axes(network, size).items()}
    formats.write_onnx(program, file, network.outputs, axes)
    return formats.run_onnx(file)


def describe(network: Network, args: argparse.Namespace, any_size: bool, sizes: Sequence[Size]) -> dict[str, Any]:
    """What the file is, as plain data."""
    size = None if any_size else sizes[0]
    shape: list[int | str] = [0, network.channels, *(size or (0, 0))]
    ranges = {}
    for axis, (name, low, high) in formats.dynamic_axes(network, size).items():
        shape[axis], ranges[name] = name, [low, high]
    packages = ('onnx', 'onnxscript', 'onnxruntime') if args.format == 'onnx' else ()
    return {
        'format': args.format,
        'network': "detector's backbone" if network.is_detector else 'classifier',
        'input': {'name': 'images', 'dtype': 'float32', 'shape': shape, 'range': ranges},
        'outputs': network.outputs,
        'opset': OPSET if args.format == 'onnx' else None,
        'preprocessing': network.preprocessing,
        'classes': network.class_names,
        'tolerance': TOLERANCE,
        'environment': environment(torch.device('cpu')) | {name: version(name) for name in packages},
        'config': network.plain_config,
    }


def save(file: Path, output: Path, report: dict[str, Any]) -> None:
    """Put a file that passed its check, and its report, in place.

    Raises:
        OutputError: they cannot be written.
    """
    text = json.dumps(report, indent=2)
    with report_write_errors(output.parent), file.open('rb') as source:
        atomic_write(output, lambda target: shutil.copyfileobj(source, target))
        atomic_write(Path(f'{output}.json'), lambda target: target.write(text.encode()))


def print_report(output: Path, report: dict[str, Any]) -> None:
    """Print the differences and the latency."""
    for size, batch, difference in (comparison.values() for comparison in report['checked']):
        print(f'{size}, batch {batch}: differs by {difference:.1e}')
    if report['checked']:
        print(f'largest difference from eager execution: {report["max_abs_difference"]:.1e}')
    else:
        print('all weights read back equal')
    if latency := report.get('latency'):
        batch, _, height, width = latency['shape']
        ms = ', '.join(f'{name} {1e3 * seconds:.1f} ms' for name, seconds in latency['median_seconds'].items())
        times = ', '.join(f'{x["median"]:.2f} x {name}' for name, x in latency['time_relative_to'].items())
        print(f'latency at {height} x {width}, batch {batch}: {ms}; the file takes {times}')
    print(printable(f'{output}, {output}.json'))


if __name__ == '__main__':
    main()
