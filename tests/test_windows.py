import torch

from models.windows import join_windows, relative_position_index, shuffle_msg_tokens, split_windows


def test_windows_hold_the_msg_token_then_their_patches_row_by_row():
    patches = torch.arange(4 * 6).float().view(1, 4, 6, 1)
    msg = -torch.arange(1, 7).float().view(1, 2, 3, 1)
    windows = join_windows(patches, msg)
    assert windows.shape == (1, 2, 3, 5, 1)
    assert windows[0, 0, 0, :, 0].tolist() == [-1, 0, 1, 6, 7]
    assert windows[0, 1, 2, :, 0].tolist() == [-6, 16, 17, 22, 23]
    back = split_windows(windows, 2)
    assert torch.equal(back[0], patches)
    assert torch.equal(back[1], msg)


def test_shuffle_transposes_chunks_within_a_region():
    # Channel k of the token at (row, column) holds 100 * row + 10 * column + k.
    row, column, k = torch.meshgrid(torch.arange(4), torch.arange(2), torch.arange(8), indexing='ij')
    msg = (100 * row + 10 * column + k).unsqueeze(0)
    shuffled = shuffle_msg_tokens(msg, 2)
    # New token 1 (row 0, column 1) of the first region: chunk 1 of tokens 0, 1, 2 and 3.
    assert shuffled[0, 0, 1].tolist() == [2, 3, 12, 13, 102, 103, 112, 113]
    # New token 2 (row 3, column 0) of the second: its chunk 2 of each.
    assert shuffled[0, 3, 0].tolist() == [204, 205, 214, 215, 304, 305, 314, 315]
    assert torch.equal(shuffle_msg_tokens(shuffled, 2), msg)  # its own inverse
    assert shuffle_msg_tokens(msg, 1) is msg


def test_relative_position_index_is_the_offset_of_query_from_key():
    w = 3
    index = relative_position_index(w)
    assert index.dtype == torch.int64
    for i in range(w * w):
        for j in range(w * w):
            rows, columns = i // w - j // w, i % w - j % w
            assert index[i, j] == (rows + w - 1) * (2 * w - 1) + columns + w - 1
