"""`tools.draw_figures`: the figures of the documents are those that it draws, with the numbers of the code."""

import base64
import html
import io
import re

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from config import load_config
from models import build_model
from models.exchange import EXCHANGES
from tests.helpers.documents import DOCUMENTS, links
from tests.helpers.paths import ROOT
from tests.helpers.processes import error_line, run_here
from tools.draw_figures.__main__ import FIGURES
from tools.draw_figures.architecture import CONFIG
from tools.draw_figures.charts import LABELS, read_growth
from tools.draw_figures.exchanges import token_shares

DOCS = ROOT / 'docs'
IMAGE = re.compile(r'base64,\s*([^"]+)"')
COLOR = re.compile(r'#[0-9a-f]{6}')


def texts(name):
    """The texts of a figure: Matplotlib draws outlines, and writes each text in a comment above."""
    return [html.unescape(text) for text in re.findall(r'<!-- (.*?) -->', (DOCS / name).read_text(), re.DOTALL)]


def pixels(encoded):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert('RGB')).astype(int)


def test_shares_of_tokens_are_those_that_the_module_mixes():
    """New token 1 of the first region: window b, beside a and above f; e is below a."""
    a, b, e, f = (slice(4 * token, 4 * token + 4) for token in (0, 1, 4, 5))
    shares = {name: token_shares(exchange)[b] for name, exchange in EXCHANGES.items()}  # (4, 32)
    for name, share in shares.items():
        assert share.sum(dim=1).tolist() == pytest.approx([1] * 4)
        others = share.clone()
        for token in (a, b, e, f):
            others[:, token] = 0
        assert (others.sum() > 0) == (name == 'global')
    assert torch.equal(shares['none'][:, b], torch.eye(4))
    assert [share.argmax().item() for share in shares['shuf']] == [1, 5, 17, 21]  # chunk 1 of each token
    assert [share.argmax().item() for share in shares['shift']] == [20, 21, 2, 3]  # of f, below and above, and of a
    assert torch.equal(shares['mean'][3, [3, 7, 19, 23]], torch.full((4,), 0.25))


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    """The folder with all figures, drawn by the command of `make docs`."""
    folder = tmp_path_factory.mktemp('figures')
    done = run_here('-m', 'tools.draw_figures', '--output', folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(folder / f'{name}.svg') for name in FIGURES]
    return folder


@pytest.mark.parametrize('name', FIGURES)
def test_figures_of_the_documents_are_those_that_the_command_draws(drawn, name):
    """Colours and pixels that a network or a photograph gives may differ a little with processor and libraries."""
    new, kept = ((folder / f'{name}.svg').read_text() for folder in (drawn, DOCS))
    assert len(kept) < 300_000
    stale = f'docs/{name}.svg is stale: run `make docs`'
    assert COLOR.sub('', IMAGE.sub('', new)) == COLOR.sub('', IMAGE.sub('', kept)), stale
    for before, after in zip(IMAGE.findall(kept), IMAGE.findall(new), strict=True):
        assert np.abs(pixels(before) - pixels(after)).mean() < 2, stale
    colors = [[to_rgb(color) for color in COLOR.findall(text)] for text in (new, kept)]
    assert np.abs(np.subtract(*colors)).max(initial=0) < (0.03 if name == 'influence' else 1e-9), stale


@pytest.mark.parametrize('name', ['study', 'exchange_study'])
def test_charts_for_papers_are_those_that_the_command_draws(tmp_path, name):
    path = f'{name}.pdf'
    done = run_here('-m', 'tools.draw_figures', '--output', tmp_path, '--figures', name, '--formats', 'pdf')
    assert done.stdout == f'{tmp_path / path}\n', done.stderr
    assert (tmp_path / path).read_bytes() == (DOCS / path).read_bytes(), f'docs/{path} is stale: run `make docs`'


def test_architecture_shows_the_numbers_of_the_network():
    model = build_model(load_config(str(ROOT / CONFIG))).eval()
    found = texts('architecture.svg')
    maps = model.forward_intermediates(torch.zeros(1, 3, 224, 224), intermediates_only=True)
    assert found.count('merge') == len(maps) - 1
    assert [text for text in found if re.fullmatch(r'\d+ × \d+ × \d+', text)] == [
        '224 × 224 × 3',
        *(f'{height} × {width} × {channels}' for _, channels, height, width in (x.shape for x in maps)),
    ]
    blocks = [stage.blocks[0] for stage in model.layers]
    windows = [x.shape[-1] // block.window_size for x, block in zip(maps, blocks, strict=True)]
    for label, row in {
        'window': [f'{block.window_size} × {block.window_size} patches' for block in blocks],
        'window in pixels': [f'{224 // n} × {224 // n}' for n in windows],
        'windows, MSG tokens': [f'{n} × {n}' if n > 1 else '1' for n in windows],
        'shuffle regions': [
            f'{(n // block.shuffle_size) ** 2} of {block.shuffle_size} × {block.shuffle_size} windows'
            if n > 1
            else 'no exchange'
            for n, block in zip(windows, blocks, strict=True)
        ],
        'heads': [str(block.attn.num_heads) for block in blocks],
        'blocks': [str(len(stage.blocks)) for stage in model.layers],
    }.items():
        start = found.index(label) + 1
        assert found[start : start + 4] == row, label
    assert f'{model.num_classes} classes' in found


def test_growth_chart_has_the_numbers_of_the_tables():
    page = (DOCS / 'performance_tables.md').read_text()
    rows = re.findall(r'^\| (MSG-[TSB]|Swin-T)(?:, (\d) threads?)?(, peak memory, MB)? \| (.*) \|$', page, re.MULTILINE)
    rows = [(*row[:3], [float(cell) for cell in row[3].split(' | ')]) for row in rows if '(' not in row[3]]
    sizes, batches = read_growth('sizes'), read_growth('batches')
    assert len(rows) == 20
    for name, threads, is_memory, values in rows:
        stored = [result for result in (sizes if len(values) == 6 else batches) if LABELS[result.name] == name]
        stored = [result for result in stored if result.setting.threads == int(threads or 2)]
        assert len(stored) == len(values)
        for result in stored:
            value = values[[224, 448, 672, 896, 1120, 1344].index(result.setting.size)] if len(values) == 6 else None
            value = value or values[[1, 4, 16, 64].index(result.setting.batch)]
            assert value == (result.memory / 2**20 if is_memory else result.seconds.median)


def test_every_figure_is_shown_by_a_document():
    shown = {(d.parent / link.partition('#')[0]).resolve() for d in DOCUMENTS for link in links(d.read_text())}
    figures = [path for suffix in ('svg', 'png', 'pdf') for path in DOCS.glob(f'*.{suffix}')]
    assert not [path.name for path in figures if path not in shown]
    assert len(figures) > 8


def test_an_output_that_is_no_folder_is_told_in_one_line():
    line = error_line('-m', 'tools.draw_figures', '--output', 'Makefile', '--figures', 'block')
    assert line.startswith('error: Makefile/block.svg: ')
