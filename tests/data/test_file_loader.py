import os

import pytest
import torch

from data.file_loader import SOME_UNREADABLE, InferenceLoader
from data.images import DataError
from tests.helpers.images import damage


def decode(data, name):
    """The first pixels of a PNG's or JPEG's content, as a tensor that depends on nothing else."""
    if name.endswith('refused.png') or not data:
        raise DataError(f'{name} is refused')
    return torch.frombuffer(bytearray(data[:200].ljust(200)), dtype=torch.uint8)


def batches(config, paths, batch_size, workers=0):
    loader = InferenceLoader(config, paths, decode, batch_size=batch_size, workers=workers)
    return list(loader), loader


@pytest.mark.parametrize('workers', [0, 2])
def test_batches_have_the_order_of_the_files_and_bad_ones_are_reported(tiny_config, image_tree, capsys, workers):
    paths = sorted((image_tree / 'train').rglob('*.png'))[:9][::-1]
    damage(paths[4], 'empty')
    paths[6].unlink()
    paths[7].rename(paths[7].with_name('refused.png'))
    paths[7] = paths[7].with_name('refused.png')
    loaded, loader = batches(tiny_config(), paths, 2, workers)
    assert [batch.indices for batch in loaded] == [[0, 1], [2, 3], [5], [], [8]]
    assert [[*batch.errors] for batch in loaded] == [[], [], [4], [6, 7], []]
    for batch in loaded:
        for index, image in zip(batch.indices, batch.images if batch.indices else (), strict=True):
            assert bytes(image.numpy()) == paths[index].read_bytes()[:200].ljust(200)
    assert loaded[3].images is None
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(' ')[0] for line in lines] == ['error:'] * 3
    assert [str(paths[i]) in line for i, line in zip((4, 6, 7), lines, strict=True)] == [True] * 3
    with pytest.raises(SystemExit) as exit_:
        loader.exit_if_unreadable()
    assert exit_.value.code == SOME_UNREADABLE
    assert capsys.readouterr().err == 'error: 3 of 9 images cannot be read: see above\n'


@pytest.mark.slow
def test_names_need_not_be_unicode(tiny_config, image_tree):
    path = image_tree / os.fsdecode(b'name \xff.png')
    (image_tree / 'val' / 'class_0' / '0.png').rename(path)
    loaded, loader = batches(tiny_config(), [path], 1)
    assert loaded[0].indices == [0]
    loader.exit_if_unreadable()  # which does nothing
