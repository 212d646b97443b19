import pytest

from models import MSGTransformer
from models.pyramid import Size, patch_grids, plan_pyramid


def plan(img_size, window=7, shuffle=(4, 4, 2, 1), patch_size=4, embed_dim=2304):
    img_size = img_size and (Size(img_size, img_size) if isinstance(img_size, int) else Size(*img_size))
    ones = (1,) * len(shuffle)
    layouts = plan_pyramid(img_size, patch_size, window, embed_dim, ones, ones, shuffle)
    return [layout.window_size for layout in layouts], [layout.shuffle_size for layout in layouts]


@pytest.mark.parametrize(
    ('img_size', 'window', 'shuffle', 'windows', 'regions'),
    [
        (224, 7, (4, 4, 2, 1), [7, 7, 7, 7], [4, 4, 2, 1]),
        (448, 7, (4, 4, 2, 1), [7, 7, 7, 7], [4, 4, 2, 1]),
        (384, 12, (4, 4, 2, 1), [12, 12, 12, 12], [4, 4, 2, 1]),
        (112, 7, (4, 2, 1), [7, 7, 7], [4, 2, 1]),
        (224, 7, (8, 2, 1, 4), [7, 7, 7, 7], [8, 2, 1, 1]),  # one window: regions of one
        (20, 7, (3,), [5], [1]),  # one window of the grid's size
        ((20, 40), 7, (1,), [5], [1]),
    ],
)
def test_layouts_that_tile(img_size, window, shuffle, windows, regions):
    assert plan(img_size, window, shuffle) == (windows, regions)


@pytest.mark.parametrize(
    ('img_size', 'window', 'shuffle'),
    [
        (200, 7, (4, 4, 2, 1)),  # windows do not tile
        (225, 7, (4, 4, 2, 1)),  # nor patches
        (224, 7, (3, 4, 2, 1)),  # nor regions
        (112, 7, (4, 2, 1, 4)),  # an odd grid before the last stage
        (32, 8, (1, 4)),  # MSG tokens do not merge 2 x 2
        (None, 7, (4, 4, 2, 4)),
    ],
)
def test_where_something_does_not_tile_windows_and_regions_are_as_given(img_size, window, shuffle):
    assert plan(img_size, window, shuffle) == ([window] * len(shuffle), list(shuffle))


def test_grids_halve_and_round_up():
    assert patch_grids(Size(33, 57), 4, 4) == [(9, 15), (5, 8), (3, 4), (2, 2)]


def test_an_image_smaller_than_a_patch_is_refused():
    with pytest.raises(ValueError, match='image size 3 x 3 is smaller than one patch of 4 x 4 pixels'):
        plan(3)
    for img_size in ((3, 57), (57, 3)):
        with pytest.raises(ValueError, match='image size {} x {} is smaller'.format(*img_size)):
            MSGTransformer(img_size=img_size)


def test_channels_that_do_not_divide_are_refused_with_a_width_that_does():
    with pytest.raises(ValueError, match='embed_dim 100.*choose a multiple of 48'):
        MSGTransformer(embed_dim=100)
    MSGTransformer(embed_dim=48)
    with pytest.raises(ValueError, match='multiple of 16'):
        MSGTransformer(embed_dim=24, num_heads=(1, 1, 1, 1))
    MSGTransformer(embed_dim=24, num_heads=(1, 1, 1, 1), manip_type='none')  # no shuffle, no chunks


def test_a_stage_without_blocks_is_refused():
    with pytest.raises(ValueError, match=r'depths \[2, 0, 6, 2\] has a stage without blocks'):
        MSGTransformer(depths=(2, 0, 6, 2))


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match='write one entry per stage'):
        MSGTransformer(depths=(2, 2, 6))
    with pytest.raises(ValueError, match='write one entry per stage'):
        MSGTransformer(depths=(), num_heads=(), shuffle_size=())
