import re

import pytest
import torch
import torch.fx.experimental._config as symbolic_shapes_config
from torch import nn

from models.exchange import EXCHANGES, Shuffle
from models.layers import EMBED_TYPES, OverlapPatchMerging, PatchMerging
from models.symbolic import crop, is_known_multiple, pad_to_multiple, padding_to_multiple, to_convolution_input
from models.windows import join_windows, split_windows, window_padding
from tests.helpers.golden import fill_
from tests.helpers.paths import ROOT


class IncrementedWindows(nn.Module):
    """Join windows, add 1 to every token, remove and restore the padding, split, and shuffle the MSG tokens."""

    def forward(self, patches):
        """Patches (B, H, W, 8) to patches and MSG tokens."""
        grid = patches.shape[1:3]
        msg = pad_to_multiple(patches, 3)[:, ::3, ::3]
        padding = window_padding(grid, 3, patches.device)
        windows = join_windows(patches, msg, 3) + 1
        if padding is not None:
            windows = padding.restore(padding.remove(padding.zero(windows)))
        patches, msg = split_windows(windows, 3, grid)
        return patches, Shuffle(8, 2)(msg)


def export_any_size(module, example, height_axis, smallest=1):
    """Export a module with dynamic batch, height and width; returns a function of the input."""
    axes = {0: torch.export.Dim('batch', min=1)}
    for i, name in enumerate(('height', 'width')):
        axes[height_axis + i] = torch.export.Dim(name, min=smallest, max=512)
    with torch.no_grad(), symbolic_shapes_config.patch(backed_size_oblivious=True):
        return torch.export.export(module.eval(), (example,), dynamic_shapes=(axes,)).module()


GRID_MODULES = {
    'windows': IncrementedWindows(),
    'v1': PatchMerging(8, nn.LayerNorm),
    'exchanges': nn.Sequential(*[exchange(8, 2) for exchange in EXCHANGES.values()]),
}


@torch.no_grad()
@pytest.mark.parametrize('name', GRID_MODULES)
def test_one_graph_gives_the_eager_outputs_for_grids_of_any_size(name):
    module, tolerance = GRID_MODULES[name], 1e-5 if name == 'exchanges' else 0
    fill_(module).eval().requires_grad_(False)  # or `torch.matmul` traces another path than in tools.export
    graph = export_any_size(module, torch.randn(2, 12, 18, 8), height_axis=1)
    for shape in ((2, 12, 18), (1, 1, 1), (3, 7, 4), (1, 13, 30)):
        x = torch.randn(*shape, 8)
        torch.testing.assert_close(graph(x), module(x), rtol=0, atol=tolerance)


@torch.no_grad()
def test_compile_with_dynamic_sizes_needs_one_graph():
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    module = IncrementedWindows().eval()
    compiled = torch.compile(module, dynamic=True, fullgraph=True, backend=backend)
    for shape in ((2, 12, 18), (3, 7, 31), (5, 13, 30)):  # no window grid is 1: PyTorch compiles again for it
        x = torch.randn(*shape, 8)
        torch.testing.assert_close(compiled(x), module(x), rtol=0, atol=0)
    assert len(graphs) == 1


@torch.no_grad()
@pytest.mark.parametrize('kind', EMBED_TYPES)
def test_one_graph_embeds_images_of_any_size(kind):
    module = fill_(EMBED_TYPES[kind](4, 3, 8, nn.LayerNorm)).eval()
    graph = export_any_size(module, torch.randn(2, 3, 32, 48), height_axis=2, smallest=4)
    for shape in ((2, 3, 32, 48), (1, 3, 4, 4), (1, 3, 33, 57)):
        x = torch.randn(shape)
        torch.testing.assert_close(graph(x), module(x))


@torch.no_grad()
def test_one_graph_merges_grids_of_any_size_by_convolution():
    module = fill_(OverlapPatchMerging(8, nn.LayerNorm)).eval()
    graph = export_any_size(module, torch.randn(2, 12, 18, 8), height_axis=1)
    for shape in ((2, 12, 18), (1, 1, 1), (3, 7, 4)):
        x = torch.randn(*shape, 8)
        torch.testing.assert_close(graph(x), module(x))


def test_plain_sizes_are_neither_padded_nor_copied_without_need():
    x = torch.randn(1, 4, 6, 3)
    assert pad_to_multiple(x, 2) is x
    assert pad_to_multiple(x, 4).shape == (1, 4, 8, 3)
    assert crop(x, (3, 5)).data_ptr() == x.data_ptr()
    assert to_convolution_input(x[:, :3], stride=2).shape == (1, 3, 3, 6)
    assert to_convolution_input(x, stride=2).data_ptr() == x.data_ptr()
    assert is_known_multiple((4, 6), 2)
    assert not is_known_multiple((4, 6), 4)
    assert [padding_to_multiple(size, 4) for size in (1, 4, 5)] == [3, 0, 3]


def test_no_other_file_of_the_networks_branches_on_symbolic_sizes():
    files = {*ROOT.glob('models/*.py'), *ROOT.glob('detection/models/*.py')} - {ROOT / 'models' / 'symbolic.py'}
    assert [path.name for path in files if re.search(r'SymInt|\bis_symbolic\b', path.read_text())] == []
