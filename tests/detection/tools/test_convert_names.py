"""Names of converted images: nothing is written outside the folder, and nothing is overwritten."""

import json
import unicodedata

import pytest
from PIL import Image

from data.images import existing_path
from detection.tools.convert_dataset.names import UniqueNames, relative_name
from tests.helpers.coco_data import read_tree
from tests.helpers.processes import error_line, run_here

PROGRAM = ['-m', 'detection.tools.convert_dataset']


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        ('a.png', 'a.png'),
        ('b/a.png', 'b/a.png'),
        ('../../../photos/1.png', 'photos/1.png'),
        ('a/../../b.png', 'a/b.png'),
        ('/etc/passwd', 'etc/passwd'),
        ('..\\..\\b\\a.png', 'b/a.png'),
        ('C:\\Users\\me\\a.png', 'Users/me/a.png'),
        ('\\\\server\\share\\a.png', 'server/share/a.png'),
        ('./a.png', 'a.png'),
        ('..', 'image'),
    ],
)
def test_a_name_stays_in_its_folder(name, expected):
    assert relative_name(name) == expected


def test_equal_names_are_told_apart():
    names = UniqueNames()
    given = ['1.png', '../1.png', '1.PNG', 'b/1.png', 'b', '1.png/2.png', 'caf\u00e9.png', 'cafe\u0301.png']
    assert [names.add(name) for name in given] == [
        '1.png', '1_2.png', '1_3.PNG', 'b/1.png', 'b_2', '1.png_2_2.png', 'caf\u00e9.png', 'cafe\u0301_2.png'
    ]  # fmt: skip
    assert ('1.png', '1_2.png') in names.renamed
    assert len(names.renamed) == 5


def write_export(folder, names, images):
    """A COCO file with an entry for each name, and images; returns the file."""
    folder.mkdir(parents=True)
    for number, path in enumerate(images):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (80, 64), (0, 50 * number, 0)).save(path)
    entries = [{'id': i, 'file_name': str(name), 'width': 80, 'height': 64} for i, name in enumerate(names)]
    objects = [{'id': i, 'image_id': i, 'category_id': 1, 'bbox': [5, 5, 20, 20]} for i in range(len(names))]
    tree = {'images': entries, 'annotations': objects, 'categories': [{'id': 1, 'name': 'x'}]}
    (folder / 'result.json').write_text(json.dumps(tree))
    return folder / 'result.json'


@pytest.mark.parametrize('links', [[], ['--link']])
@pytest.mark.parametrize('spelling', ['dots', 'backslashes', 'absolute'])
def test_names_that_leave_the_folder_write_within_it(tmp_path, spelling, links):
    photos = [tmp_path / 'photos' / f'{i}.png' for i in (1, 2)]
    names = {
        'dots': ['../../photos/1.png', '../../photos/2.png'],
        'backslashes': ['..\\..\\photos\\1.png', '..\\..\\photos\\2.png'],
        'absolute': photos,
    }[spelling]
    file = write_export(tmp_path / 'a' / 'export', names, photos)
    victim = tmp_path / 'out' / 'photos' / '1.png'  # where the copy of ../../photos/1.png would go
    victim.parent.mkdir(parents=True)
    victim.write_text('precious')
    before = sorted(path for path in tmp_path.rglob('*'))
    done = run_here(*PROGRAM, file, '--output', tmp_path / 'out' / 'a' / 'coco', *links)
    assert done.returncode == 0, done.stderr
    assert victim.read_text() == 'precious'
    assert all(path.read_bytes()[:4] == b'\x89PNG' for path in photos)
    assert '2 images are outside' in done.stderr
    inside = tmp_path / 'out' / 'a'
    assert [x for x in sorted(tmp_path.rglob('*')) if x not in before and not x.is_relative_to(inside)] == []
    for split in ('train', 'val'):
        for entry in read_tree(inside / 'coco', split)['images']:
            path = inside / 'coco' / split / entry['file_name']
            assert path.is_symlink() == bool(links)
            assert path.resolve().is_relative_to(inside if not links else tmp_path)


def test_images_of_one_name_from_several_folders_are_all_kept(tmp_path):
    folders = [tmp_path / 'data' / name for name in ('a', 'b', 'c')]
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True)
        Image.new('RGB', (40 + number, 30)).save(folder / '1.png')
        (folder / '1.txt').write_text('0 0.5 0.5 0.4 0.4\n')
    (tmp_path / 'data' / 'data.yaml').write_text('names: [x]\ntrain: [a, b]\nval: c\n')
    done = run_here(*PROGRAM, tmp_path / 'data', '--output', tmp_path / 'out')
    assert done.returncode == 0, done.stderr
    assert 'train: 1 images of equal names are renamed: 1.png is 1_2.png' in done.stderr
    entries = {x['file_name']: x['width'] for x in read_tree(tmp_path / 'out', 'train')['images']}
    assert entries == {'1.png': 40, '1_2.png': 41}
    assert {name: Image.open(tmp_path / 'out' / 'train' / name).width for name in entries} == entries


def test_an_image_that_only_its_last_part_finds_is_not_taken_for_two(tmp_path):
    names = ['C:\\cam1\\1.png', 'C:\\cam2\\2.png']
    file = write_export(tmp_path / 'one', names, [tmp_path / 'one' / f'{i}.png' for i in (1, 2)])
    done = run_here(*PROGRAM, file, '--output', tmp_path / 'out')
    assert done.returncode == 0, done.stderr
    assert '2 images are found by the last part of their names, such as C:\\cam1\\1.png' in done.stderr
    file = write_export(tmp_path / 'two', ['/cam1/1.png', '/cam2/1.png'], [tmp_path / 'two' / '1.png'])
    assert 'are both found as' in error_line(*PROGRAM, file, '--output', tmp_path / 'other')


def test_names_may_be_composed_in_the_annotations_and_decomposed_in_the_folder(tmp_path):
    """As after a copy from a Mac."""
    photos = tmp_path / 'export' / unicodedata.normalize('NFD', 'größe.png')
    photos.parent.mkdir()
    Image.new('RGB', (80, 64)).save(photos)
    Image.new('RGB', (80, 64), 'red').save(photos.with_name('b.png'))
    tree = {'images': [], 'annotations': [], 'categories': [{'id': 1, 'name': 'x'}]}
    for number, name in enumerate(('größe.png', 'b.png'), start=1):
        tree['images'].append({'id': number, 'file_name': name, 'width': 80, 'height': 64})
        tree['annotations'].append({'id': number, 'image_id': number, 'category_id': 1, 'bbox': [5, 5, 20, 20]})
    (tmp_path / 'export' / 'a.json').write_text(json.dumps(tree))
    assert existing_path(photos.parent, 'größe.png') == photos
    done = run_here(*PROGRAM, tmp_path / 'export' / 'a.json', '--output', tmp_path / 'coco')
    assert done.returncode == 0, done.stderr
    assert sum(len(read_tree(tmp_path / 'coco', split)['images']) for split in ('train', 'val')) == 2
