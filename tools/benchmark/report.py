"""Results as Markdown tables and as JSON."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from tools.benchmark.timing import Result, Variant, network_name, ratio
from utils import environment


def table(results: Sequence[Result]) -> str:
    """Results as a Markdown table."""
    lines = [
        '| network | setting | ms (quartiles) | images/s | x peer | % of matmul peak | memory, MB | multiply-adds |',
        '|---|---|---|---|---|---|---|---|',
    ]
    for r in results:
        ms = [1e3 * value for value in r.seconds]
        speedup = f'{r.speedup.median:.2f} ({r.speedup.low:.2f} to {r.speedup.high:.2f})' if r.speedup else ''
        lines.append(
            f'| {r.network} | {r.setting} | {ms[0]:.1f} ({ms[1]:.1f} to {ms[2]:.1f}) | '
            f'{r.setting.batch / r.seconds.median:.1f} | {speedup} | {100 * r.matmul_fraction.median:.0f} | '
            f'{r.memory / 2**20:.0f} | {r.multiply_adds / 1e9:.2f}G |'
        )
    return '\n'.join(lines)


def compare_fastest(results: Sequence[Result]) -> str:
    """Each network's fastest compile mode against the peer's fastest, among results measured together; a line each."""
    fastest: dict[str, Result] = {}
    for r in results:
        name = network_name(r.network)
        if name not in fastest or r.seconds.median < fastest[name].seconds.median:
            fastest[name] = r
    *others, peer = fastest.values()
    lines = []
    for r in others:
        speedup = ratio(peer.times, r.times)
        lines.append(
            f'{r.setting._replace(compile_mode="fastest of each")}: {r.network} {r.setting.compile_mode}, '
            f'{peer.network} {peer.setting.compile_mode}: {speedup.median:.2f} ({speedup.low:.2f} to '
            f'{speedup.high:.2f}) x'
        )
    return '\n'.join(lines)


def variants_table(variants: Sequence[Variant]) -> str:
    """Variants of inference as a Markdown table."""
    lines = ['| variant | ms (quartiles) | error |', '|---|---|---|']
    for variant in variants:
        median, low, high = (1e3 * value for value in variant.seconds)
        lines.append(f'| {variant.name} | {median:.1f} ({low:.1f} to {high:.1f}) | {variant.error:.2g} |')
    return '\n'.join(lines)


def write(results: Sequence[Result], summary: Sequence[str], output: Path, device: torch.device) -> str:
    """Write `<output>.md` and `<output>.json`.

    Args:
        results: the measurements.
        summary: lines below the table.
        output: path without suffix.
        device: that they were measured on.

    Returns:
        The Markdown.
    """
    hardware = environment(device)
    footer = ' | '.join(f'{name} {value}' for name, value in hardware.items())
    text = '\n\n'.join([table(results), '\n'.join(summary), footer]) + '\n'
    Path(f'{output}.md').write_text(text)
    records = {'environment': hardware, 'results': [result.record() for result in results]}
    Path(f'{output}.json').write_text(json.dumps(records, indent=1) + '\n')
    return text
