"""Interleaved timing of networks and settings, with a plain matmul of as many multiply-adds as reference."""

import copy
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from engine.timing import Quartiles, time_interleaved
from tools.benchmark.cases import (
    COMPILE_MODES,
    FUSED,
    PRECISIONS,
    BenchmarkCase,
    Setting,
    build_network,
    short_name,
    tf32,
    unavailable,
)


class Result(NamedTuple):
    """Measurements of one network under one setting.

    Attributes:
        network: its name.
        setting: how it was run.
        times: seconds per run, in each round.
        peer_times: the peer's under the same setting, in the same rounds, in the faster of its forms; None without a
            peer.
        matmul_times: seconds of a plain matmul of as many multiply-adds, in the same rounds.
        memory: peak bytes.
        multiply_adds: multiply-adds of a run, counted over the real operators.
    """

    network: str
    setting: Setting
    times: list[float]
    peer_times: list[float] | None
    matmul_times: list[float]
    memory: int
    multiply_adds: int

    @property
    def seconds(self) -> Quartiles:
        """Seconds per run."""
        return Quartiles.from_values(self.times)

    @property
    def speedup(self) -> Quartiles | None:
        """The peer's time divided by this one's, within a round."""
        return self.peer_times and ratio(self.peer_times, self.times)

    @property
    def matmul_fraction(self) -> Quartiles:
        """The matmul's time divided by this one's, within a round: the fraction of the matmul peak."""
        return ratio(self.matmul_times, self.times)

    def record(self) -> dict[str, Any]:
        """The result as plain data."""
        quartiles = {'seconds': self.seconds, 'speedup': self.speedup, 'matmul_fraction': self.matmul_fraction}
        record = {'network': self.network, 'setting': self.setting._asdict()}
        record |= {name: value and value._asdict() for name, value in quartiles.items()}
        return record | {'memory': self.memory, 'multiply_adds': self.multiply_adds}


def network_name(name: str) -> str:
    """A network's name in either form of its attention."""
    return name.removesuffix(FUSED)


def ratio(times: Sequence[float], others: Sequence[float]) -> Quartiles:
    """Quartiles of the ratios of times of the same rounds."""
    return Quartiles.from_values([a / b for a, b in zip(times, others, strict=True)])


class MatmulReference:
    """One plain matmul: how fast a device multiplies and adds.

    Args:
        precision: precision of the matrices.
        device: device to run on.
        multiply_adds: approximate number; the attribute has the exact one.
    """

    def __init__(self, precision: str, device: torch.device, multiply_adds: int):
        size = min(4096 if device.type == 'cuda' else 1024, max(1, round(multiply_adds ** (1 / 3))))
        rows = max(1, round(multiply_adds / size**2))
        self.precision, self.multiply_adds = precision, rows * size**2
        self.left = torch.randn(rows, size, device=device, dtype=PRECISIONS[precision])
        self.right = torch.randn(size, size, device=device, dtype=PRECISIONS[precision])

    def __call__(self) -> Tensor:
        """Multiply once."""
        with tf32(self.precision == 'tf32'):
            return self.left @ self.right


def compare(
    names: Sequence[str], settings: Sequence[Setting], rounds: int, device: torch.device
) -> Iterator[list[Result]]:
    """Measure all networks, interleaved, under settings that differ in `compile_mode` only; then under the next ones.

    Args:
        names: networks to compare; the last one is the peer, with its form without `+fused` before it, if it has two.
        settings: how to run them.
        rounds: how often each is timed.
        device: device to run on.

    Yields:
        The results of settings that were measured together.
    """
    groups: dict[Setting, list[Setting]] = {}
    threads = torch.get_num_threads()
    for setting in settings:
        groups.setdefault(setting._replace(compile_mode=''), []).append(setting)
    for group in groups.values():
        torch.set_num_threads(group[0].threads or threads)
        cases = {
            (short_name(name), setting): BenchmarkCase(build_network(name, setting.size), setting, device)
            for name, setting in product(names, group)
        }
        for (name, setting), case in cases.items():
            show_progress(f'{name}: {setting}: warm-up')
            case.warm_up()
        case_of_network = {name: case for (name, _), case in cases.items()}  # in any compile mode
        counts = {name: case.multiply_adds() for name, case in case_of_network.items()}
        matmuls = {name: MatmulReference(group[0].precision, device, count) for name, count in counts.items()}
        for matmul in matmuls.values():
            matmul()
        show_progress(f'{group[0]}: {rounds} rounds')
        times = time_interleaved({**cases, **matmuls}, rounds, device)
        peers = [name for name in map(short_name, names) if network_name(name) == network_name(short_name(names[-1]))]
        others = len(peers) < len(names)
        fastest = {
            setting: min((times[peer, setting] for peer in peers), key=np.median) if others else None
            for setting in group
        }
        yield [
            Result(
                network=name,
                setting=setting,
                times=times[name, setting],
                peer_times=fastest[setting],
                matmul_times=[seconds * counts[name] / matmuls[name].multiply_adds for seconds in times[name]],
                memory=case.peak_memory(),
                multiply_adds=counts[name],
            )
            for (name, setting), case in cases.items()
        ]
    torch.set_num_threads(threads)


class Variant(NamedTuple):
    """A way to run inference, its seconds and its relative error against fp32."""

    name: str
    seconds: Quartiles
    error: float


def find_fastest(
    name: str, setting: Setting, max_error: float, rounds: int, device: torch.device
) -> tuple[str | None, list[Variant]]:
    """Find the fastest way to run inference of a network.

    Args:
        name: the network, as for `build_network`.
        setting: batch and size.
        max_error: largest norm of the difference from fp32 logits, relative to their norm.
        rounds: how often each variant is timed.
        device: device to run on.

    Returns:
        The fastest variant within the error, if any, and all variants, fastest first.
    """
    network = build_network(name, setting.size)
    reference = BenchmarkCase(copy.deepcopy(network), setting, device)
    exact = reference()
    variants: dict[str, Callable[[], Tensor]] = {}
    for precision, compile_mode in product(PRECISIONS, COMPILE_MODES):
        candidate = setting._replace(precision=precision, compile_mode=compile_mode)
        if unavailable(candidate, device):
            continue
        label = f'{precision}, {compile_mode}'
        case = variants[label] = BenchmarkCase(copy.deepcopy(network), candidate, device)
        case.images = reference.images.to(case.images.dtype)
        show_progress(f'{label}: warm-up')
        case.warm_up()
    if device.type == 'cpu':
        case = variants['int8 linears, eager'] = BenchmarkCase(_in_int8(network), setting, device)
        case.images = reference.images
    errors = {label: ((case().float() - exact).norm() / exact.norm()).item() for label, case in variants.items()}
    times = time_interleaved(variants, rounds, device)
    results = [Variant(label, Quartiles.from_values(times[label]), errors[label]) for label in variants]
    results.sort(key=lambda variant: variant.seconds.median)
    return next((variant.name for variant in results if variant.error <= max_error), None), results


def _in_int8(network: nn.Module) -> nn.Module:
    """A copy with int8 linears: weights quantized per channel once, activations per tensor at run time."""
    from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # PyTorch moves this to torchao, whose int8 is slower than fp32 on CPUs
        return quantize_dynamic(copy.deepcopy(network).eval(), {nn.Linear: per_channel_dynamic_qconfig})


def show_progress(text: str) -> None:
    """Print to standard error."""
    print(text, file=sys.stderr, flush=True)
