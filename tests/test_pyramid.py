import pytest

from models import MSGTransformer
from models.pyramid import PyramidError, plan_pyramid


@pytest.mark.parametrize(
    ('img_size', 'window', 'shuffle', 'grids', 'windows', 'regions'),
    [
        (224, 7, [4, 4, 2, 1], [56, 28, 14, 7], [7, 7, 7, 7], [4, 4, 2, 1]),
        (448, 7, [4, 4, 2, 1], [112, 56, 28, 14], [7, 7, 7, 7], [4, 4, 2, 1]),
        (384, 12, [4, 4, 2, 1], [96, 48, 24, 12], [12, 12, 12, 12], [4, 4, 2, 1]),
        (112, 7, [4, 2, 1], [28, 14, 7], [7, 7, 7], [4, 2, 1]),
        (224, 7, [8, 2, 1, 4], [56, 28, 14, 7], [7, 7, 7, 7], [8, 2, 1, 1]),  # one window: regions of one
        (20, 7, [3], [5], [5], [1]),  # smaller than a window: one window of the grid's side
    ],
)
def test_layouts(img_size, window, shuffle, grids, windows, regions):
    stages = plan_pyramid((img_size, img_size), 4, window, shuffle)
    assert [stage.grid for stage in stages] == [(grid, grid) for grid in grids]
    assert [stage.window for stage in stages] == windows
    assert [stage.region for stage in stages] == regions


def test_rectangles():
    stages = plan_pyramid((224, 448), 4, 7, [4, 4, 2, 1])
    assert [stage.msg_grid for stage in stages] == [(8, 16), (4, 8), (2, 4), (1, 2)]


@pytest.mark.parametrize(
    ('img_size', 'patch', 'window', 'shuffle', 'reason', 'works'),
    [
        ((200, 200), 4, 7, [4, 4, 2, 1], 'stage 1 do not divide into 7 x 7 windows', '224, 448'),
        ((225, 225), 4, 7, [4, 4, 2, 1], 'not a multiple of the patch size 4', '224, 448'),
        ((224, 224), 4, 7, [3, 4, 2, 1], 'stage 1 do not divide into shuffle regions of 3 x 3', '672'),
        ((112, 112), 4, 7, [4, 2, 1, 1], 'the 7 x 7 patches of stage 3 do not halve', '224'),
        ((32, 32), 4, 8, [1, 1], 'MSG tokens of stage 1 do not merge 2 x 2', '64'),
        ((224, 225), 4, 7, [4, 4, 2, 1], 'not a multiple', '224, 224 x 448'),
    ],
)
def test_sizes_that_do_not_tile_are_refused_with_sizes_that_do(img_size, patch, window, shuffle, reason, works):
    with pytest.raises(PyramidError) as error:
        plan_pyramid(img_size, patch, window, shuffle)
    assert reason in str(error.value)
    assert works in str(error.value).split('shuffle sizes')[1]


def test_the_sizes_named_do_build():
    with pytest.raises(PyramidError) as error:
        MSGTransformer(img_size=250, embed_dim=48, depths=(1, 1), num_heads=(1, 1), shuffle_size=(4, 2))
    sizes = [int(size) for size in str(error.value).rsplit(': ', 1)[1].split(', ')]
    assert sizes
    for size in sizes:
        MSGTransformer(img_size=size, embed_dim=48, depths=(1, 1), num_heads=(1, 1), shuffle_size=(4, 2))


def test_channels_that_do_not_divide_are_refused_with_a_width_that_does():
    with pytest.raises(PyramidError, match='embed_dim 100.*choose a multiple of 48'):
        MSGTransformer(embed_dim=100)
    MSGTransformer(embed_dim=48)
    with pytest.raises(PyramidError, match='multiple of 16'):
        MSGTransformer(embed_dim=24, num_heads=(1, 1, 1, 1))
    MSGTransformer(embed_dim=24, num_heads=(1, 1, 1, 1), manip_type='none')  # no shuffle, no chunks


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(PyramidError, match='one entry a stage'):
        MSGTransformer(depths=(2, 2, 6))
