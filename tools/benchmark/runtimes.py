"""Time classifiers with random weights as exported files, in onnxruntime and OpenVINO on the CPU.

All networks are exported by tools.export's functions and settings, with a dynamic batch size: the rewriting for a
runtime applies to the linear layers and norms of other networks, too. Int8 files are calibrated on random images. The
last network is the peer that the others are compared with.
"""

import argparse
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

from tools.benchmark.classifiers import build_network, image_channels
from tools.benchmark.comparison import Result, require_distinct_names, short_name, show_progress
from tools.benchmark.report import write_groups
from tools.benchmark.timing import time_interleaved
from tools.export import formats
from tools.export.openvino_files import run_openvino, write_openvino
from tools.export.quantization import quantize
from tools.export.rewrite import rewrite_for_runtimes
from utils import home_path, positive_int

# Runtimes, with the format of their files and what runs them
RUNTIMES = {'onnxruntime': ('onnx', formats.run_onnx), 'openvino': ('openvino', run_openvino)}
CALIBRATION_IMAGES = 8


class FileCase(NamedTuple):
    """A network in a runtime and precision."""

    network: str
    runtime: str
    precision: str


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `runtimes`."""
    add = parser.add_argument
    add('networks', nargs='+', metavar='NETWORK', help='config file, or name in timm or torchvision (timm:NAME)')
    add('--runtimes', nargs='+', choices=RUNTIMES, default=list(RUNTIMES), help='default: both')
    add('--int8', action='store_true', help='time int8 files, too')
    add('--batches', nargs='+', type=positive_int, default=[1, 8], metavar='N', help='images per batch (default: 1 8)')
    add('--size', type=positive_int, default=224, metavar='N', help='image size in pixels (default: 224)')
    add('--threads', nargs='+', type=positive_int, default=[1], metavar='N', help='CPU threads (default: 1)')
    add('--rounds', type=positive_int, default=10, metavar='N', help='how often each is timed (default: 10)')
    add(
        '--files',
        type=home_path,
        metavar='FOLDER',
        help='keep the files in this folder, and use those that are there: exporting takes minutes',
    )


def run(args: argparse.Namespace) -> None:
    """Measure the networks that the command line names."""
    require_distinct_names(args.networks)
    for runtime in args.runtimes:
        formats.require_packages(formats.PACKAGES[RUNTIMES[runtime][0]] + (('nncf',) if args.int8 else ()))
    cases = [
        FileCase(*case) for case in product(args.networks, args.runtimes, ('fp32', 'int8') if args.int8 else ('fp32',))
    ]
    with TemporaryDirectory() if args.files is None else nullcontext(args.files) as folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        files = {case: write_file(case, args.size, Path(folder)) for case in cases}
        groups = (
            measure(files, threads, batch, args.size, args.rounds)
            for threads, batch in product(args.threads, args.batches)
        )
        write_groups(groups, args.output, torch.device('cpu'))


def write_file(case: FileCase, size: int, folder: Path) -> Path:
    """Export a network for a runtime, and quantize it for int8; a file that is there already is left as it is.

    Args:
        case: what to write.
        size: image size, in pixels.
        folder: where to write.

    Raises:
        UserError: the network is unknown, or cannot be exported or quantized.
    """
    format_, _ = RUNTIMES[case.runtime]
    path = folder / f'{short_name(case.network)}_{size}_{case.runtime}_{case.precision}{formats.FORMATS[format_]}'
    if path.exists():
        return path
    show_progress(f'{path.name}: exporting')
    if case.precision == 'int8':
        source = write_file(case._replace(precision='fp32'), size, folder)
        generator = torch.Generator().manual_seed(0)
        shape = (CALIBRATION_IMAGES, 1, channels(case.network, size), size, size)
        quantize(format_, source, path, list(torch.randn(shape, generator=generator).numpy()))
        return path
    network = build_network(case.network, size).eval().requires_grad_(False)
    graph = rewrite_for_runtimes(network, for_onnxruntime=case.runtime == 'onnxruntime')
    images = torch.zeros(2, image_channels(network), size, size)
    program = formats.trace_graph(graph, images, {0: torch.export.Dim('batch', min=1)})
    write = {'onnx': formats.write_onnx, 'openvino': write_openvino}[format_]
    write(program, path, ['logits'], {0: 'batch'})
    return path


def channels(name: str, size: int) -> int:
    """Channels of a network's images."""
    with torch.device('meta'):
        return image_channels(build_network(name, size))


def measure(files: dict[FileCase, Path], threads: int, batch: int, size: int, rounds: int) -> list[Result]:
    """Time all files on the same random images, interleaved.

    Args:
        files: by what they are; the network of the last one is the peer.
        threads: CPU threads.
        batch: images per call.
        size: image size, in pixels.
        rounds: how often each is timed.

    Returns:
        A result for each file.
    """
    show_progress(f'{threads} thread(s), batch {batch}: {rounds} rounds')
    before = torch.get_num_threads()
    torch.set_num_threads(threads)  # which both runtimes take
    try:
        callables = {}
        for case, path in files.items():
            _, load = RUNTIMES[case.runtime]
            callables[case] = partial(load(path), torch.randn(batch, channels(case.network, size), size, size))
            callables[case]()
        times = time_interleaved(callables, rounds, torch.device('cpu'))
    finally:
        torch.set_num_threads(before)
    *_, peer = files
    has_others = len({case.network for case in files}) > 1
    return [
        Result(
            name=short_name(case.network),
            setting=f'{case.runtime}, {case.precision}, {threads} thread(s), batch {batch}, {size} px',
            times=times[case],
            images=batch,
            peer_times=times[case._replace(network=peer.network)] if has_others else None,
        )
        for case in files
    ]
