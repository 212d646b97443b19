"""The charts of docs, drawn from the results that are stored next to them."""

import json
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from data.figure_style import CHART_STYLE, add_margin
from tools.benchmark.cases import Setting
from tools.benchmark.chart import PANEL, draw_curves
from tools.benchmark.comparison import Result
from tools.study.chart import chart

DOCS = Path(__file__).parents[2] / 'docs'
LABELS = {  # of names in growth.json
    'msg_tiny_p4_win7_224': 'MSG-T',
    'msg_small_p4_win7_224': 'MSG-S',
    'msg_base_p4_win7_224': 'MSG-B',
    'swin_tiny_patch4_window7_224': 'Swin-T',
    '1 thread(s)': '1 thread',
    '2 thread(s)': '2 threads',
}


def draw_study() -> Figure:
    """Draw the study of MSG tokens."""
    return chart(json.loads((DOCS / 'study.json').read_text(encoding='utf-8')))


def draw_exchange_study() -> Figure:
    """Draw the study of exchanges."""
    return chart(json.loads((DOCS / 'exchange_study.json').read_text(encoding='utf-8')))


def draw_growth() -> Figure:
    """Draw how time and memory grow with the image (above), and with the batch (below)."""
    sizes, batches = (read_growth(key) for key in ('sizes', 'batches'))
    with matplotlib.rc_context(CHART_STYLE):
        figure = Figure(figsize=(2 * PANEL[0], 2 * PANEL[1]), layout='constrained')
        add_margin(figure)
        for part, results in zip(figure.subfigures(2, 1), (sizes, batches), strict=True):
            draw_curves(part, results, LABELS)
    return figure


def read_growth(key: str) -> list[Result]:
    """Read the results of growth.json over 'sizes' or 'batches'."""
    results = []
    for row in json.loads((DOCS / 'growth.json').read_text(encoding='utf-8'))[key]:
        setting = Setting('inference', 'fp32', 'eager', row['batch'], row['size'], row['threads'])
        memory = row['memory_MB'] * 2**20
        results.append(Result(row['name'], setting, [row['seconds']], pixels=setting.pixels, memory=memory))
    return results
