import json
import multiprocessing
import os
import re
import shutil
import signal

import pytest

from data import DataError
from data.image_folder import ClassFolders
from data.shards import read_index
from tests.helpers.datasets import BAD, WRITERS, as_shards, flip_byte, samples_of
from tests.helpers.processes import error_line, run_here
from tools.pack_dataset import pack_split


def pack(source, target, *flags, run=run_here):
    return run('-m', 'tools.pack_dataset', source, target, *flags)


def snapshot(folder):
    """Content and time of change of each finished file below a folder."""
    paths = [path for path in folder.rglob('*') if path.suffix in ('.tar', '.json', '.npy')]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def in_child(function, *args):
    """Exit code of a forked process that calls a function."""
    process = multiprocessing.get_context('fork').Process(target=function, args=args)
    process.start()
    process.join(60)
    return process.exitcode


class InterruptedFolders(ClassFolders):
    """Class folders that call a function before sample 12 is read."""

    def __init__(self, folder, split, function):
        super().__init__(folder, split)
        self.function = function

    def read(self, index):
        if index == 12:
            self.function()
        return super().read(index)


@pytest.mark.parametrize('name', WRITERS)
def test_shards_hold_the_samples_of_every_format(image_tree, tmp_path, name):
    source, target = WRITERS[name](image_tree, tmp_path / name), tmp_path / 'target'
    done = pack(source, target, '--samples-per-shard', '10')
    assert done.stdout.splitlines() == [
        f'{target}/train: 24 images in 3 shard(s), verified',
        f'{target}/val: 12 images in 2 shard(s), verified',
    ]
    for split, shards in (('train', 3), ('val', 2)):
        assert samples_of('shards', target, split) == samples_of(name, source, split)
        names = ['.lock', 'index.json', 'names.npy', 'samples.npy', *(f'shard_0000{i}.tar' for i in range(shards))]
        assert sorted(path.name for path in (target / split).iterdir()) == names


def test_a_killed_run_goes_on_where_it_stopped(image_tree, tmp_path):
    root = tmp_path / 'target' / 'train'
    killed = InterruptedFolders(image_tree, 'train', lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert in_child(pack_split, killed, root, 5) == -signal.SIGKILL
    assert len(list(root.glob('*.tmp'))) == 1
    finished = {path: state for path, state in snapshot(root).items() if path.suffix == '.tar'}
    assert sorted(path.name for path in finished) == ['shard_00000.tar', 'shard_00001.tar']
    with pytest.raises(DataError, match='train has no index.json: make shards with'):
        samples_of('shards', tmp_path / 'target')
    pack_split(ClassFolders(image_tree, 'train'), root, 5)
    assert finished.items() <= snapshot(root).items()
    assert samples_of('shards', tmp_path / 'target') == samples_of('imagenet', image_tree)
    whole = as_shards(image_tree, tmp_path / 'whole') / 'train'
    assert {x.name: x.read_bytes() for x in root.iterdir()} == {x.name: x.read_bytes() for x in whole.iterdir()}


def test_the_same_command_again_writes_nothing(image_tree, tmp_path):
    first = pack(image_tree, tmp_path / 'target')
    before = snapshot(tmp_path / 'target')
    assert pack(image_tree, tmp_path / 'target').stdout == first.stdout
    assert snapshot(tmp_path / 'target') == before


@pytest.mark.parametrize(
    ('file', 'message'),
    [
        ('shard_00001.tar', 'shard .*train/shard_00001.tar has changed since it was written: remove its folder and'),
        ('samples.npy', 'train/samples.npy cannot be read .*has changed since it was written.*remove .*train and pack'),
        ('names.npy', 'train/names.npy cannot be read .*has changed since it was written.*remove .*train and pack'),
    ],
)
def test_a_flipped_byte_is_found(image_tree, tmp_path, file, message):
    target = as_shards(image_tree, tmp_path / 'target')
    flip_byte(target / 'train' / file, 700 if file.endswith('tar') else 200)
    with pytest.raises(DataError, match=message):
        as_shards(image_tree, target)


def test_a_flipped_byte_in_a_finished_shard_of_a_killed_run_is_found(image_tree, tmp_path):
    in_child(pack_split, InterruptedFolders(image_tree, 'train', lambda: os._exit(1)), tmp_path / 'train', 5)
    flip_byte(tmp_path / 'train' / 'shard_00001.tar', 700)
    with pytest.raises(DataError, match='shard_00001.tar has changed since it was written'):
        pack_split(ClassFolders(image_tree, 'train'), tmp_path / 'train', 5)


@pytest.mark.parametrize('killed', [False, True])
@pytest.mark.parametrize('change', ['samples', 'samples_per_shard'])
def test_shards_of_something_else_are_kept(image_tree, tmp_path, killed, change):
    root = tmp_path / 'train'
    function = (lambda: os._exit(1)) if killed else (lambda: None)
    assert in_child(pack_split, InterruptedFolders(image_tree, 'train', function), root, 5) == killed
    before = snapshot(root)
    if change == 'samples':
        (image_tree / 'train' / 'class_2' / '7.png').unlink()
    with pytest.raises(DataError, match='train holds shards of another dataset, or with another --samples-per-shard'):
        pack_split(ClassFolders(image_tree, 'train'), root, 5 if change == 'samples' else 6)
    assert snapshot(root) == before


def test_a_second_process_is_told_of_the_first(image_tree, tmp_path):
    def pack_another():
        with pytest.raises(DataError, match='another process packs into .*train: wait for it, or give another TARGET'):
            pack_split(ClassFolders(image_tree, 'train'), tmp_path / 'train', 6)

    codes = []
    samples = InterruptedFolders(image_tree, 'train', lambda: codes.append(in_child(pack_another)))
    pack_split(samples, tmp_path / 'train', 5)
    assert codes == [0]
    assert samples_of('shards', tmp_path) == samples_of('imagenet', image_tree)


@pytest.mark.parametrize('kept', ['train', 'val'])
def test_one_split_is_enough(image_tree, tmp_path, kept):
    shutil.rmtree(image_tree / ('val' if kept == 'train' else 'train'))
    pack(image_tree, tmp_path / 'target')
    assert [path.name for path in (tmp_path / 'target').iterdir()] == [kept]
    assert samples_of('shards', tmp_path / 'target', kept) == samples_of('imagenet', image_tree, kept)


def test_shards_can_be_packed_anew(image_tree, tmp_path):
    source = as_shards(image_tree, tmp_path / 'source')
    pack(source, tmp_path / 'target', '--samples-per-shard', '100')
    assert len(read_index(tmp_path / 'target' / 'train')['shards']) == 1
    assert samples_of('shards', tmp_path / 'target') == samples_of('imagenet', image_tree)


def test_mistakes_are_one_line(image_tree, tmp_path):
    bad = image_tree / 'train' / 'class_0' / '0.png'
    for source, target, message in (
        (tmp_path / 'nowhere', tmp_path / 'x', 'nowhere does not exist: give the folder of a dataset'),
        (image_tree / 'val' / 'class_0', tmp_path / 'x', 'holds neither train nor val of the format imagenet'),
        (image_tree, image_tree / 'val' / '..', 'is the source: give another TARGET'),
        (image_tree, bad, 'output folder .*0.png/train: Not a directory'),
    ):
        assert re.search(message, pack(source, target, run=error_line)), message
    bad.unlink()
    bad.symlink_to('nothing')
    assert f'image {bad} cannot be read (No such file' in pack(image_tree, tmp_path / 'x', run=error_line)


def test_bad_images_are_packed_as_they_are(image_tree, tmp_path):
    """`tools.check_dataset` finds them, and ON_ERROR says what a run does with them."""
    for number, kind in enumerate(BAD):
        (image_tree / 'train' / 'class_1' / f'{number}.png').write_bytes(BAD[kind][0]())
    target = as_shards(image_tree, tmp_path / 'target')
    assert samples_of('shards', target) == samples_of('imagenet', image_tree)
    assert json.loads((target / 'train' / 'index.json').read_text())['samples'] == 25
