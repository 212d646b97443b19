"""Check an exported file: compare its outputs with eager execution on real images, and measure its latency."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.transforms.functional import normalize, to_tensor

from data.images import choose_images, find_images, load_image
from engine.checkpoint import load_checkpoint
from engine.weights import choose_weights
from models.pyramid import Size
from tools.benchmark.timing import Quartiles, time_interleaved
from tools.export.formats import MAX_SIDE, Runner
from tools.export.network import ExportError, Network
from utils import first_line

TOLERANCE = 1e-4
BATCHES = (1, 3)
ODD_SIZES = (Size(33, 57), Size(97, 130), Size(224, 224), Size(480, 640))


class Comparison(NamedTuple):
    """Largest absolute difference between a file's outputs and eager ones, at one size and batch."""

    size: Size
    batch: int
    difference: float


class Latency(NamedTuple):
    """Median seconds of calls by name, and quartiles of the time of one of them relative to each other one."""

    median_seconds: dict[str, float]
    time_relative_to: dict[str, Quartiles]

    def as_dict(self) -> dict[str, Any]:
        """The latency as plain data."""
        relative = {name: ratio._asdict() for name, ratio in self.time_relative_to.items()}
        return {'median_seconds': self.median_seconds, 'time_relative_to': relative}


def check_sizes(network: Network, asked: Sequence[Size], any_size: bool) -> list[Size]:
    """Choose the image sizes to compare at: the given sizes, or the network's default size.

    Args:
        network: the network.
        asked: sizes from the command line.
        any_size: whether the file takes images of any size; odd sizes and the corners of the range are added.

    Raises:
        ExportError: there is no size, a size is out of range, or a file of one size is to be compared at several.
    """
    p = network.patch_size
    for size in asked:
        if min(size) < p or max(size) > MAX_SIDE:
            raise ExportError(f'--size {size}: sides are from {p} (one patch) to {MAX_SIDE} pixels')
    own = [network.default_size] if network.default_size else []
    if any_size:
        corners = [Size(p, p), Size(p, MAX_SIDE), Size(MAX_SIDE, p)]
        fitting = [size for size in ODD_SIZES if min(size) >= p]
        return list(dict.fromkeys(chain(asked, own, fitting, corners)))
    sizes = list(dict.fromkeys(asked or own))
    if not sizes:
        raise ExportError("a detector's backbone has no default size: give --size, or --always-pad for all sizes")
    if len(sizes) > 1:
        raise ExportError(f'{len(sizes)} sizes: export one file for each, or one for all with --always-pad')
    return sizes


def load_images(paths: Sequence[Path], mode: str, limit: int = max(BATCHES)) -> list[Image.Image]:
    """Images among files and below folders, at most `limit` of them; scikit-learn's photographs without any path.

    Raises:
        DataError: there are none, or one cannot be read.
    """
    if paths:
        return [load_image(path, mode, upright=True) for path in choose_images(find_images(paths), limit)]
    return [Image.fromarray(photograph).convert(mode) for photograph in load_sample_images().images]


def make_batch(network: Network, images: Iterable[Image.Image], size: Size, batch: int) -> Tensor:
    """Images resized to `size` and normalised, (batch, channels, height, width); they repeat where there are fewer."""
    _, mean, std = network.normalization
    resized = (image.resize((size.width, size.height), Image.Resampling.BICUBIC) for image in cycle(images))
    return torch.stack([normalize(to_tensor(image), mean, std) for image in islice(resized, batch)])


def check_weights(file: Path, checkpoint: Path, choice: str) -> None:
    """Check that a file of weights reads back equal to the checkpoint that it was made from.

    Args:
        file: the file.
        checkpoint: the checkpoint.
        choice: which of its weights, as for `choose_weights`.

    Raises:
        ExportError: a tensor differs.
    """
    expected, _ = choose_weights(load_checkpoint(checkpoint), checkpoint, choice)
    weights = load_checkpoint(file)['model']
    differing = [
        name for name, value in expected.items() if name not in weights or not torch.equal(weights[name], value)
    ]
    if differing or len(weights) != len(expected):
        raise ExportError(f'the file does not read back equal, and is not kept: {", ".join(differing[:3])}')


@torch.inference_mode()
def compare(network: Network, run: Runner, images: Sequence[Image.Image], sizes: Sequence[Size]) -> list[Comparison]:
    """Compare a file with eager execution at sizes and batches.

    Args:
        network: the network.
        run: runs the file.
        images: to feed.
        sizes: to resize them to.

    Raises:
        ExportError: the file fails, or an output differs by more than `TOLERANCE`.
    """
    comparisons = []
    for size in sizes:
        for batch in BATCHES:
            inputs = make_batch(network, images, size, batch)
            expected = network.run(inputs)
            try:
                outputs = run(inputs)
            except Exception as error:  # of whatever runs the file
                raise ExportError(
                    f'the file fails at {size}, batch {batch}, and is not kept: {first_line(error)}'
                ) from error
            difference = largest_difference(outputs, expected)
            if not difference <= TOLERANCE:  # nor NaN
                raise ExportError(
                    f'the file differs by {difference:.2g} at {size}, batch {batch}, '
                    f'more than {TOLERANCE:g}, and is not kept'
                )
            comparisons.append(Comparison(size, batch, difference))
    return comparisons


def largest_difference(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest absolute difference of outputs; infinite where shapes differ, NaN where a value is."""
    if [x.shape for x in outputs] != [x.shape for x in expected]:
        return float('inf')
    return torch.stack([(x - y).abs().max() for x, y in zip(outputs, expected, strict=True)]).max().item()


@torch.inference_mode()
def time_against_others(name: str, callables: Mapping[str, Callable[[], object]], rounds: int) -> Latency:
    """Time calls on the CPU, interleaved, after two calls of each.

    Args:
        name: of the call that is compared with all others.
        callables: by name.
        rounds: how often each is timed.
    """
    for function in callables.values():
        function()
        function()
    times = time_interleaved(callables, rounds, torch.device('cpu'))
    return Latency(
        {other: Quartiles.from_values(values).median for other, values in times.items()},
        {other: Quartiles.of_ratios(times[name], values) for other, values in times.items() if other != name},
    )


def measure_latency(network: Network, run: Runner, inputs: Tensor, rounds: int) -> dict[str, Any]:
    """Seconds of the file, of eager and of compiled execution, interleaved, and the file's time relative to both.

    Args:
        network: the network.
        run: runs the file.
        inputs: the images of a call.
        rounds: how often each is timed.
    """
    compiled = torch.compile(network.graph)
    callables: dict[str, Callable[[], object]] = {
        'exported': lambda: run(inputs),
        'eager': lambda: network.run(inputs),
        'compiled': lambda: compiled(inputs),
    }
    latency = time_against_others('exported', callables, rounds)
    return {'shape': list(inputs.shape), 'rounds': rounds, **latency.as_dict()}
