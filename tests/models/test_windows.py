import pytest
import torch

from models.windows import (
    add_msg_token,
    join_windows,
    relative_position_index,
    split_windows,
    window_padding,
)

CPU = torch.device('cpu')


def test_windows_hold_their_msg_token_then_their_patches_in_row_major_order():
    patches = torch.arange(4 * 6).float().view(1, 4, 6, 1)
    msg = -torch.arange(1, 7).float().view(1, 2, 3, 1)
    windows = join_windows(patches, msg, 2)
    assert windows.shape == (1, 2, 3, 5, 1)
    assert windows[0, 0, 0, :, 0].tolist() == [-1, 0, 1, 6, 7]
    assert windows[0, 1, 2, :, 0].tolist() == [-6, 16, 17, 22, 23]
    back = split_windows(windows, 2, (4, 6))
    assert torch.equal(back[0], patches)
    assert torch.equal(back[1], msg)


def test_a_grid_that_windows_do_not_tile_is_padded_right_and_bottom_and_cropped_again():
    patches = torch.arange(1, 3 * 5 + 1).float().view(1, 3, 5, 1)
    msg = -torch.arange(1, 7).float().view(1, 2, 3, 1)
    windows = join_windows(patches, msg, 2)
    assert windows[0, 0, 2, :, 0].tolist() == [-3, 5, 0, 10, 0]
    assert windows[0, 1, 1, :, 0].tolist() == [-5, 13, 14, 0, 0]
    back = split_windows(windows, 2, (3, 5))
    assert torch.equal(back[0], patches)
    assert torch.equal(back[1], msg)


@pytest.mark.parametrize('grid', [(3, 5), (4, 5), (1, 1), (5, 2)])
def test_window_padding_marks_what_join_windows_adds(grid):
    H, W = grid
    nH, nW = -(-H // 2), -(-W // 2)
    patches, msg = torch.rand(2, H, W, 3) + 1, torch.rand(2, nH, nW, 3) + 1  # never 0
    windows = join_windows(patches, msg, 2)
    padding = window_padding(grid, 2, CPU)
    assert torch.equal(padding.is_padding.expand_as(windows[0]), windows[0] == 0)
    real = padding.remove(windows)
    assert real.shape == (2, H * W + nH * nW, 3)
    assert torch.equal(padding.restore(real), windows)
    assert torch.equal(padding.zero(windows + 1), padding.restore(real + 1))


def test_a_grid_that_tiles_has_no_padding():
    assert window_padding((4, 6), 2, CPU) is None


def test_relative_position_index_is_the_offset_of_query_from_key():
    w = 3
    index = relative_position_index(w)
    assert index.dtype == torch.int64
    for i in range(w * w):
        for j in range(w * w):
            rows, columns = i // w - j // w, i % w - j % w
            assert index[i, j] == (rows + w - 1) * (2 * w - 1) + columns + w - 1


def test_the_msg_token_is_added_to_the_position_index():
    index = add_msg_token(relative_position_index(3), 25)
    assert index.shape == (10, 10)
    assert torch.equal(index[1:, 1:], relative_position_index(3))
    assert (index[1:, 0] == 25).all()  # patch to MSG token
    assert (index[0] == 26).all()  # MSG token to all
