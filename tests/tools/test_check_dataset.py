import json
import re
import shutil

import pytest

from tests.helpers.datasets import BAD, ODD, WRITERS, as_shards, as_zip, cut, flip_byte
from tests.helpers.processes import error_line, run_here


def check(folder, *flags, run=run_here):
    return run('-m', 'tools.check_dataset', folder, '--workers', '1', *flags)


@pytest.mark.parametrize('name', WRITERS)
def test_a_good_dataset_has_exit_code_0(image_tree, tmp_path, name):
    done = check(WRITERS[name](image_tree, tmp_path / name))
    assert done.returncode == 0
    assert done.stdout == 'images: 24 in train, 12 in val; 0 broken, 0 empty, 0 in train and val\n'


@pytest.mark.parametrize('name', WRITERS)
def test_every_bad_image_is_listed(image_tree, tmp_path, name):
    bad = {kind: content for kind, (content, _) in BAD.items() if not kind.startswith('bomb')}
    for kind, content in bad.items():
        (image_tree / 'train' / 'class_1' / f'{kind}.png').write_bytes(content())
    for kind, content in ODD.items():
        (image_tree / 'train' / 'class_2' / f'{kind}.png').write_bytes(content())
    for copy in ('class_1/copy.png', 'class_2/second.png'):
        shutil.copy(image_tree / 'train' / 'class_0' / '3.png', image_tree / 'val' / copy)
    (image_tree / 'val' / 'class_0' / 'empty.png').touch()  # as in train, but that is no shared image
    report = tmp_path / 'report.json'
    done = check(WRITERS[name](image_tree, tmp_path / name), '--json', report)
    assert done.returncode == 1
    *lines, numbers = done.stdout.splitlines()
    images = {'train': 24 + len(bad) + len(ODD), 'val': 15}
    assert numbers.endswith('; 1 rotated by their EXIF tag: DATA.EXIF True turns them upright')
    assert numbers.startswith(f'images: {images["train"]} in train, 15 in val; {len(bad) - 1} broken, 2 empty, 2 in')
    listed = json.loads(report.read_text())
    assert listed == {
        'images': images,
        'rotated': 1,
        'problems': [dict(zip(('kind', 'text'), line.split('\t'), strict=True)) for line in lines],
    }
    found = {(problem['kind'], re.search(r'(\w+)\.png', problem['text'])[1]) for problem in listed['problems']}
    assert found == {('empty' if kind == 'empty' else 'broken', kind) for kind in bad} | {('same', '3')}
    same = [problem['text'] for problem in listed['problems'] if problem['kind'] == 'same']
    assert [re.findall(r'\w+.png', text) for text in same] == [['3.png', 'copy.png'], ['3.png', 'second.png']]


def test_a_missing_file_is_broken_and_not_empty(image_tree):
    path = image_tree / 'val' / 'class_0' / 'link.png'
    path.symlink_to('nowhere')
    assert check(image_tree).stdout.startswith(f'broken\timage {path} cannot be read (No such file or directory)')


def test_an_empty_class_is_listed_and_the_others_are_checked(image_tree):
    for path in (image_tree / 'val' / 'class_1').iterdir():
        path.unlink()
    (image_tree / 'val' / 'class_2' / '0.png').write_bytes(b'no image')
    (image_tree / 'train' / 'class_3').mkdir()
    done = check(image_tree)
    assert done.returncode == 1
    assert [line.split(' ', 2)[:2] for line in done.stdout.splitlines()[:3]] == [
        ['empty\tclass', f'{image_tree}/train/class_3'],
        ['empty\tclass', f'{image_tree}/val/class_1'],
        ['broken\timage', f'{image_tree}/val/class_2/0.png'],
    ]
    assert 'broken\ttrain/ and val/ in' in done.stdout  # have other classes
    assert done.stdout.splitlines()[-1].startswith('images: 24 in train, 8 in val; 2 broken, 2 empty')


@pytest.mark.parametrize('file', ['shard_00001.tar', 'samples.npy'])
def test_a_flipped_byte_in_shards_is_found(image_tree, tmp_path, file):
    """It is in the tar's padding or a table, so every image still decodes."""
    folder = as_shards(image_tree, tmp_path / 'shards')
    flip_byte(folder / 'val' / file, -1 if file.endswith('tar') else 200)
    done = check(folder)
    assert done.returncode == 1
    assert re.fullmatch(f'broken\t.*val/{file}.* has changed since it was written.*', done.stdout.splitlines()[0])
    assert '; 1 broken, 0 empty, 0 in train and val' in done.stdout


def test_what_cannot_be_opened_is_listed(image_tree, tmp_path):
    folder = as_zip(image_tree, tmp_path / 'zip')
    cut(folder / 'train.zip', 5000)
    done = check(folder)
    assert done.returncode == 1
    assert done.stdout.startswith(f'broken\t{folder}/train.zip cannot be read')
    assert 'images: 12 in val; 1 broken' in done.stdout


def test_mistakes_are_one_line(image_tree, tmp_path):
    assert 'nowhere does not exist: give the folder of a dataset' in check(tmp_path / 'nowhere', run=error_line)
    message = 'holds neither train nor val of the format zip'
    assert message in check(image_tree, '--format', 'zip', run=error_line)
    assert 'No such file' in check(image_tree, '--json', tmp_path / 'nowhere' / 'x.json', run=error_line)
