import json

import pytest

from data import DataError
from data.image_folder import ClassFolders
from tests.helpers.images import damage, noise
from tests.helpers.processes import run_here
from tools.benchmark import loader
from tools.pack_dataset import pack_split
from tools.sample_images import FileSamples, find_samples, make_jpegs

PROGRAM = ['-m', 'tools.benchmark', 'loader', '--images', '6', '--rounds', '1']


@pytest.mark.slow
def test_both_pipelines_their_stages_and_loaders_are_timed(tmp_path):
    done = run_here(*PROGRAM, '--workers', '1', '--output', tmp_path / 'loading')
    assert done.returncode == 0, done.stderr
    results = {(x['name'], x['setting']): x for x in json.loads((tmp_path / 'loading.json').read_text())['results']}
    settings = {setting for name, setting in results if name == 'fast'}
    assert settings == {setting for name, setting in results if name == 'published'}
    assert {'train, files', 'train, shards', 'eval, files', 'eval, shards'} < settings
    assert {'train, 1 loader process(es)', 'eval, 1 loader process(es)'} < settings
    assert {f'train: {x}' for x in ('read', 'decode, crop, resize', 'flip, policy')} < settings
    fast, published = (results[name, 'train, files']['seconds']['median'] for name in ('fast', 'published'))
    assert results['fast', 'train, files']['speedup']['median'] == pytest.approx(published / fast)
    assert results['plain decoder', 'whole images']['seconds']['median'] > 0
    assert '| fast | eval: decode, crop, resize | ' in done.stdout


def test_times_are_per_image(monkeypatch):
    monkeypatch.setattr(loader, 'time_interleaved', lambda cases, *_: {key: [12.0] for key in cases})
    fast, published = loader.measure({('fast', 'train'): lambda: 6, ('published', 'train'): lambda: 4}, rounds=1)
    assert (fast.times, fast.speedup.median, published.times) == ([2.0], 1.5, [3.0])


def test_any_folder_of_images_will_do(tmp_path):
    (tmp_path / 'a').mkdir()
    for name in ('a/0.jpg', 'a/1.png', '2.jpg'):
        noise(32, 24).save(tmp_path / name)
    assert len(find_samples(tmp_path, 10, tmp_path)) == 3
    assert len(find_samples(tmp_path, 2, tmp_path)) == 2
    with pytest.raises(DataError, match='nowhere does not exist'):
        find_samples(tmp_path / 'nowhere', 2, tmp_path)


def test_some_images_of_shards_are_chosen(image_tree, tmp_path):
    folder = ClassFolders(image_tree, 'train')
    pack_split(folder, tmp_path / 'shards' / 'train', samples_per_shard=10)
    chosen = find_samples(tmp_path / 'shards', 5, tmp_path)
    assert len(chosen) == len(chosen.targets) == len(set(chosen.names)) == 5
    encoded = {name: folder.read(i) for i, name in enumerate(folder.names)}
    assert [chosen.read(i) for i in range(5)] == [encoded[name] for name in chosen.names]


def test_the_built_in_jpegs_are_always_the_same(tmp_path):
    for name in ('one', 'other'):
        (tmp_path / name).mkdir()
    one, other = (FileSamples(make_jpegs(tmp_path / name, 3)) for name in ('one', 'other'))
    assert [one.read(i) for i in range(3)] == [other.read(i) for i in range(3)]
    assert len({one.read(i) for i in range(3)}) == 3


def test_a_broken_image_is_named(tmp_path):
    damage(tmp_path / 'broken.jpg', 'truncated')
    done = run_here(*PROGRAM, '--data-path', tmp_path, '--output', tmp_path / 'loading')
    assert done.returncode == 1
    assert 'Traceback' not in done.stderr
    assert 'broken.jpg cannot be read' in done.stderr
