import json

import pytest

from data import DataError
from data.image_folder import ClassFolders
from tests.helpers.images import damage, noise
from tests.helpers.processes import run_here
from tools.pack_dataset import pack_split
from tools.sample_images import FileSamples, find_samples, make_jpegs

QUICK = ['--images', '6', '--rounds', '1']


def test_rates_of_both_pipelines_their_stages_and_loaders(tmp_path):
    done = run_here('-m', 'tools.benchmark_data', *QUICK, '--workers', '2', '--json', tmp_path / 'rates.json')
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / 'rates.json').read_text())
    for split in ('train', 'eval'):
        rates = result[split]
        assert rates['ratio'] == pytest.approx(rates['fast'] / rates['published'])
        assert min(rates['decoder'], rates['shards']['fast'], rates['shards']['published']) > 0
        assert rates['stages_ms']['fast'].keys() == rates['stages_ms']['published'].keys()
        assert all(f'| {split}: {name} |' in done.stdout for name in rates['stages_ms']['fast'])
    assert result['workers'].keys() == {'published', 'fast'}
    assert result['workers']['fast'].keys() == {'1', '2'}
    assert result['environment']['cpu']


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
    done = run_here('-m', 'tools.benchmark_data', *QUICK, '--data-path', tmp_path)
    assert done.returncode == 1
    assert 'Traceback' not in done.stderr
    assert 'broken.jpg cannot be read' in done.stderr
