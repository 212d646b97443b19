"""The fastest way to run inference of a classifier, among precisions and compile modes within an error."""

import copy
import warnings
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import nn

from tools.benchmark.cases import COMPILE_MODES, PRECISIONS, Setting, unavailable
from tools.benchmark.classifiers import ClassifierCase
from tools.benchmark.comparison import show_progress
from tools.benchmark.report import milliseconds
from tools.benchmark.timing import Quartiles, time_interleaved


class Variant(NamedTuple):
    """A way to run inference, its seconds and its relative error against fp32."""

    name: str
    seconds: Quartiles
    error: float


def find_fastest(
    network: nn.Module, setting: Setting, max_error: float, rounds: int, device: torch.device
) -> tuple[str | None, list[Variant]]:
    """Find the fastest way to run inference of a network.

    Args:
        network: the network.
        setting: batch and size.
        max_error: largest norm of the difference from fp32 logits, relative to their norm.
        rounds: how often each variant is timed.
        device: device to run on.

    Returns:
        The fastest variant within the error, if any, and all variants, fastest first.
    """
    reference = ClassifierCase(copy.deepcopy(network), setting, device)
    exact = reference()
    variants: dict[str, ClassifierCase] = {}
    for precision, compile_mode in product(PRECISIONS, COMPILE_MODES):
        candidate = setting._replace(precision=precision, compile_mode=compile_mode)
        if unavailable(candidate, device):
            continue
        label = f'{precision}, {compile_mode}'
        case = variants[label] = ClassifierCase(copy.deepcopy(network), candidate, device)
        case.images = reference.images.to(case.images.dtype)
        show_progress(f'{label}: warm-up')
        case.warm_up()
    if device.type == 'cpu':
        case = variants['int8 linears, eager'] = ClassifierCase(with_int8_linears(network), setting, device)
        case.images = reference.images
    errors = {label: ((case().float() - exact).norm() / exact.norm()).item() for label, case in variants.items()}
    times = time_interleaved(variants, rounds, device)
    results = [Variant(label, Quartiles.from_values(times[label]), errors[label]) for label in variants]
    results.sort(key=lambda variant: variant.seconds.median)
    return next((variant.name for variant in results if variant.error <= max_error), None), results


def with_int8_linears(network: nn.Module) -> nn.Module:
    """A copy with int8 linears: weights quantized per channel once, activations per tensor at run time."""
    from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # PyTorch moves this to torchao, whose int8 is slower than fp32 on CPUs
        return quantize_dynamic(copy.deepcopy(network).eval(), {nn.Linear: per_channel_dynamic_qconfig})


def variants_table(variants: Sequence[Variant]) -> str:
    """Variants of inference as a Markdown table."""
    lines = ['| variant | ms (quartiles) | error |', '|---|---|---|']
    lines += [f'| {variant.name} | {milliseconds(variant.seconds)} | {variant.error:.2g} |' for variant in variants]
    return '\n'.join(lines)
