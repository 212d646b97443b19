import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.images import DataError
from tools import split_dataset as tool


def write_noise(folder, count):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(len(folder.name))
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / f'{i}.png')


def files(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob('*') if path.is_file())


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / 'pictures'
    for label, count in (('a', 10), ('b c', 3)):
        write_noise(folder / label, count)
    (folder / 'a' / 'deep').mkdir()
    (folder / 'a' / 'deep' / 'copy of 3.png').write_bytes((folder / 'a' / '3.png').read_bytes())
    (folder / 'a' / 'notes.txt').write_text('no image')
    (folder / '.hidden').mkdir()
    return folder


def test_every_image_is_copied_once_and_copies_stay_together(pictures, tmp_path):
    counts = tool.split_dataset(pictures, tmp_path / 'x' / 'out', 0.3)
    train, val = (files(tmp_path / 'x' / 'out' / split) for split in ('train', 'val'))
    assert counts == {'train': len(train), 'val': len(val)}
    assert sorted(train + val) == [path for path in files(pictures) if path.suffix == '.png']
    assert not set(train) & set(val)
    assert {path.parts[0] for path in train} == {path.parts[0] for path in val} == {'a', 'b c'}
    assert len([path for path in val if path.parts[0] == 'b c']) == 1
    assert (Path('a/3.png') in val) == (Path('a/deep/copy of 3.png') in val)
    contents = [{(tmp_path / 'x' / 'out' / split / path).read_bytes() for path in paths}
                for split, paths in (('train', train), ('val', val))]  # fmt: skip
    assert not contents[0] & contents[1]
    assert list((tmp_path / 'x').iterdir()) == [tmp_path / 'x' / 'out']


def test_copies_stay_together_wherever_they_fall(pictures):
    samples = tool.ClassFolders(pictures.parent, pictures.name)
    copies = {index for index, name in enumerate(samples.names) if '3.png' in name}
    assert len(copies) == 2
    in_val = set()
    for seed in range(20):
        val = copies & set(tool.split_classes(samples, 0.3, seed)['val'])
        assert val in (set(), copies)
        in_val.add(bool(val))
    assert in_val == {False, True}


def test_the_choice_is_fixed_by_the_seed(pictures, tmp_path):
    for name, seed in (('first', 0), ('again', 0), ('other', 1)):
        tool.split_dataset(pictures, tmp_path / name, 0.3, seed)
    first, again, other = (files(tmp_path / name) for name in ('first', 'again', 'other'))
    assert first == again != other


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, 'argv', ['split_dataset', *map(str, flags)])
    with pytest.raises(SystemExit) as exit_:
        tool.main()
    return exit_.value.code


def test_mistakes(pictures, tmp_path, monkeypatch, capsys):
    assert 'is not a folder: give the one' in run(monkeypatch, tmp_path / 'none', '--output', tmp_path / 'o')
    assert 'in ' in run(monkeypatch, pictures, '--output', pictures / 'o')
    assert 'exists: write another --output' in run(monkeypatch, pictures, '--output', tmp_path)
    (tmp_path / 'file').write_text('')
    assert 'error: ' in run(monkeypatch, pictures, '--output', tmp_path / 'file' / 'o')
    for value in ('0', '1', 'x', 'nan'):
        assert run(monkeypatch, pictures, '--output', tmp_path / 'o', '--val', value) == 2
        assert 'is not a number above 0 and below 1, such as 0.2' in capsys.readouterr().err
    write_noise(pictures / 'single', 1)
    with pytest.raises(DataError, match=r'class single of .* has 1 different image\(s\): give it two'):
        tool.split_dataset(pictures, tmp_path / 'o', 0.2)
    assert not (tmp_path / 'o').exists()


def test_a_failed_copy_leaves_nothing(pictures, tmp_path, monkeypatch):
    def copyfile(source, target):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(tool.shutil, 'copyfile', copyfile)
    assert 'No space left on device' in run(monkeypatch, pictures, '--output', tmp_path / 'x' / 'o')
    assert list((tmp_path / 'x').iterdir()) == []
