import pytest
import torch

from models.windows import (
    add_msg_token,
    join_windows,
    relative_position_index,
    shuffle_msg_tokens,
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


def test_shuffle_transposes_chunks_within_a_region():
    # Channel k of the token at (row, column) holds 100 * row + 10 * column + k.
    row, column, k = torch.meshgrid(torch.arange(4), torch.arange(2), torch.arange(8), indexing='ij')
    msg = (100 * row + 10 * column + k).unsqueeze(0)
    shuffled = shuffle_msg_tokens(msg, 2)
    # New token 1 (row 0, column 1) of the first region: chunk 1 of tokens 0, 1, 2 and 3.
    assert shuffled[0, 0, 1].tolist() == [2, 3, 12, 13, 102, 103, 112, 113]
    # New token 2 (row 3, column 0) of the second: chunk 2 of each.
    assert shuffled[0, 3, 0].tolist() == [204, 205, 214, 215, 304, 305, 314, 315]
    assert torch.equal(shuffle_msg_tokens(shuffled, 2), msg)  # its own inverse
    assert shuffle_msg_tokens(msg, 1) is msg


def test_a_token_keeps_its_chunk_where_its_partner_is_padding():
    msg = torch.arange(3 * 5 * 8.0).view(1, 3, 5, 8)
    shuffled = shuffle_msg_tokens(msg, 2)
    assert torch.equal(shuffled[:, :2, :4], shuffle_msg_tokens(msg[:, :2, :4], 2))
    for row, column in [(2, 0), (2, 3), (0, 4), (1, 4), (2, 4)]:  # in regions cut by the border
        top, left = row - row % 2, column - column % 2
        chunks = []
        for i in range(4):  # the region's positions in row-major order
            y, x = top + i // 2, left + i % 2
            own, position = msg[0, row, column].view(4, 2), 2 * (row - top) + column - left
            chunks.append(msg[0, y, x].view(4, 2)[position] if y < 3 and x < 5 else own[i])
        assert torch.equal(shuffled[0, row, column], torch.cat(chunks))
    assert torch.equal(shuffled.flatten().sort()[0], msg.flatten())  # nothing is lost


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
