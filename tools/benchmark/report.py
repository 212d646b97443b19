"""Results as a Markdown table, as JSON and as a chart."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from tools.benchmark.chart import chart
from tools.benchmark.comparison import Result, without_form
from tools.benchmark.timing import Quartiles
from tools.output_files import save_figure, write_text
from utils import environment, printable


def table(results: Sequence[Result]) -> str:
    """Results as a Markdown table, with the columns that any of them has a value for."""
    rows = [_cells(result) for result in results]
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    lines = [columns, ['---'] * len(columns), *([row[name] for name in columns] for row in rows)]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _cells(result: Result) -> dict[str, str]:
    return {
        'case': result.name,
        'setting': str(result.setting),
        'ms (quartiles)': milliseconds(result.seconds),
        'images/s': f'{result.images / result.seconds.median:.1f}',
        'x peer': '' if result.speedup is None else f'{result.speedup:.2f}',
        'x peer out of the box': '' if result.default_speedup is None else f'{result.default_speedup:.2f}',
        '% of matmul peak': '' if result.matmul_fraction is None else f'{100 * result.matmul_fraction.median:.0f}',
        'memory, MB': '' if result.memory is None else f'{result.memory / 2**20:.0f}',
        'multiply-adds': '' if result.multiply_adds is None else f'{result.multiply_adds / 1e9:.2f}G',
    }


def milliseconds(seconds: Quartiles) -> str:
    """Median and quartiles in milliseconds."""
    ms = Quartiles(*(1e3 * value for value in seconds))
    return f'{ms:.2f}' if ms.median < 10 else f'{ms:.1f}'


def compare_fastest(results: Sequence[Result]) -> str:
    """Each network's fastest compile mode against the peer's fastest, among results measured together; a line each."""
    fastest: dict[str, Result] = {}
    for result in results:
        name = without_form(result.name)
        if name not in fastest or result.seconds.median < fastest[name].seconds.median:
            fastest[name] = result
    *others, peer = fastest.values()
    lines = []
    for result in others:
        setting, speedup = result.setting, Quartiles.of_ratios(peer.times, result.times)
        lines.append(
            f'{setting._replace(compile_mode="fastest of each")}: {result.name} {setting.compile_mode}, '
            f'{peer.name} {peer.setting.compile_mode}: {speedup:.2f} x'
        )
    return '\n'.join(lines)


def write_groups(groups: Iterable[list[Result]], output: Path, device: torch.device) -> None:
    """Write and print results; the files are written after each group, since the next may fail.

    Args:
        groups: results of cases that were measured together.
        output: path without suffix.
        device: that they were measured on.

    Raises:
        OutputError: the files cannot be written.
    """
    results: list[Result] = []
    summary, text = [], ''
    for group in groups:
        results += group
        has_settings = not isinstance(group[0].setting, str)
        if has_settings and len({without_form(result.name) for result in group}) > 1:
            summary.append(compare_fastest(group))
        text = write(results, summary, output, device)
    print(text, printable(f'wrote {output}.md, {output}.json, {output}.png'), sep='\n')


def write(results: Sequence[Result], summary: Sequence[str], output: Path, device: torch.device) -> str:
    """Write `<output>.md`, `<output>.json` and `<output>.png`.

    Args:
        results: the measurements.
        summary: lines below the table.
        output: path without suffix.
        device: that they were measured on.

    Returns:
        The Markdown.

    Raises:
        OutputError: a file cannot be written.
    """
    hardware = environment(device)
    footer = ' | '.join(f'{name} {value}' for name, value in hardware.items())
    peaks = dict.fromkeys(str(result.peak) for result in results if result.peak)
    text = '\n\n'.join([table(results), *filter(None, ['\n'.join(summary)]), *peaks, footer]) + '\n'
    records = {'environment': hardware, 'results': [result.as_dict() for result in results]}
    write_text(Path(f'{output}.md'), [text])
    write_text(Path(f'{output}.json'), [json.dumps(records, indent=1), '\n'])
    save_figure(chart(results), Path(f'{output}.png'), dpi=120)
    return text
