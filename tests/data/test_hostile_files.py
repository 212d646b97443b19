"""Files from elsewhere: whatever is in them, a dataset opens and reads, or says in one line why not."""

import io
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tracemalloc
import unicodedata
import warnings
import zipfile
import zlib
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import DataError, images
from data.formats import find_format, open_samples
from data.image_folder import ClassFolders
from data.images import decode_image, load_image, read_file, read_header
from data.shards import INDEX, NAMES, Shards, sha256_of
from data.zip_archive import ZipArchive
from tests.helpers.bad_files import VALUES, bad_contents
from tests.helpers.datasets import as_huggingface, as_shards, as_zip, encoded, photograph
from tests.helpers.images import write_images
from tests.helpers.paths import ROOT

CASES = 200


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('tree') / 'tree', classes=2, train=3, val=2)


def check_one_line(error):
    assert len(str(error).splitlines()) == 1


# Generated files


@pytest.mark.parametrize('text', ['[]', 'null', '1', '"x"', '[' * 100_000, b'\xff\xfe{}', '{"format": 1}', ''])
def test_other_indices_of_shards(tree, tmp_path, text):
    folder = as_shards(tree, tmp_path / 'shards')
    (folder / 'train' / INDEX).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=r'index.json (cannot be read|is not JSON) \(.*\): remove .*train and pack it'):
        open_samples('shards', folder, 'train')


@pytest.mark.parametrize('key', ['classes', 'fingerprint', 'samples', 'shards', 'tables'])
def test_indices_with_a_value_of_another_type(tree, tmp_path, key):
    folder = as_shards(tree, tmp_path / 'shards')
    path = folder / 'train' / INDEX
    index = json.loads(path.read_text())
    for value in [x for x in VALUES if type(x) is not type(index[key])]:
        path.write_text(json.dumps(index | {key: value}))
        with pytest.raises(DataError, match=r'index.json cannot be read \(.*\): remove .*train and pack it'):
            Shards(folder, 'train')


def test_names_in_shards_stay_in_their_folder(tree, tmp_path):
    folder = as_shards(tree, tmp_path / 'shards')
    root = folder / 'train'
    names = bytes(np.load(root / NAMES)).replace(b'class_1/0', b'../../1/0')
    np.save(root / NAMES, np.frombuffer(names, np.uint8))
    index = json.loads((root / INDEX).read_text())
    index['tables'][NAMES] = sha256_of(root / NAMES)
    (root / INDEX).write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"names '\.\./\.\./1/0.png', which leads out of its folder"):
        Shards(folder, 'train')


def test_generated_rows_of_saved_datasets(tree, tmp_path):
    import datasets

    samples = open_samples('huggingface', as_huggingface(tree, tmp_path / 'saved'), 'train')
    good = samples.read(0)
    names = ['/dev/zero', '/etc/passwd', '../tree', 'train', 'train/state.json', '', 'x\0y', 'a' * 5000, '~', None]
    rng = random.Random(0)
    contents = [None, b'', good, next(bad_contents(good, seed=0)), b'\xff' * 100]
    rows = [{'bytes': rng.choice(contents), 'path': rng.choice(names)} for _ in range(CASES)]
    rows = [row if row['bytes'] is not None or row['path'] is not None else None for row in rows]
    samples.rows = datasets.Dataset.from_dict({'image': rows}, datasets.Features({'image': datasets.Image()}))
    samples.names = samples.names.of(map(str, range(len(rows))))
    read = 0
    for index, row in enumerate(rows):
        try:
            assert samples.read(index) == row['bytes'] or row['path'] in names[4:]
            read += 1
        except DataError as error:
            check_one_line(error)
    assert 0 < read < CASES


def test_generated_images():
    """Of every format that is read."""
    kinds = ['JPEG', 'PNG', 'WEBP', 'TIFF', 'BMP', 'PPM', 'GIF', 'AVIF', 'JPEG2000']
    assert set(kinds) == set(images.IMAGE_FORMATS)
    contents = [encoded(photograph(40, 30), kind) for kind in kinds]
    for seed in range(CASES):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            try:
                decode_image(next(bad_contents(contents[seed % len(contents)], seed)), 'image', upright=seed % 2 == 0)
            except DataError as error:
                check_one_line(error)


# What is no regular file, or too large


@pytest.fixture(params=['pipe', 'device', 'link to a device', 'socket', 'folder'])
def odd_file(request, tmp_path):
    path = tmp_path / 'odd.png'
    if request.param == 'pipe':
        os.mkfifo(path)
    elif request.param == 'device':
        path = '/dev/zero'
    elif request.param == 'link to a device':
        path.symlink_to('/dev/zero')
    elif request.param == 'socket':
        with closing(socket.socket(socket.AF_UNIX)) as server:
            server.bind(str(path))
    else:
        path.mkdir()
    return path


@pytest.mark.parametrize('read', [read_file, load_image, read_header])
def test_only_regular_files_are_read(odd_file, read):
    with pytest.raises(DataError, match=r'cannot be read \((not a regular file|Is a directory)\): replace'):
        read(odd_file)


def test_archives_and_indices_are_regular_files(tree, tmp_path):
    for make, files in ((as_zip, ['train.zip', 'train_map.txt']), (as_shards, ['train/index.json', 'train/names.npy'])):
        for number, name in enumerate(files):
            folder = make(tree, tmp_path / f'{make.__name__}{number}')
            (folder / name).unlink()
            os.mkfifo(folder / name)
            with pytest.raises(DataError, match=r'is not a file|has no index.json|not a regular file'):
                open_samples('zip' if make is as_zip else 'shards', folder, 'train')


def test_a_saved_dataset_reads_only_its_own_files(tree, tmp_path):
    folder = as_huggingface(tree, tmp_path / 'saved')
    (name,) = (path.name for path in (folder / 'train').glob('*.arrow'))
    shutil.copy(folder / 'train' / name, tmp_path / 'elsewhere.arrow')
    path = folder / 'train' / 'state.json'
    path.write_text(path.read_text().replace(name, '../../elsewhere.arrow'))
    with pytest.raises(DataError, match=r'\(../../elsewhere.arrow is not a file in its folder\): save it again'):
        open_samples('huggingface', folder, 'train')


def test_large_files_are_not_read(tmp_path):
    path = tmp_path / 'large.png'
    with path.open('wb') as file:
        file.truncate(images.MAX_IMAGE_BYTES + 1)  # a hole
    with pytest.raises(DataError, match=r'bytes are more than the limit of 536,870,912\): replace or remove it'):
        read_file(path)


def test_large_images_are_not_decoded(tmp_path):
    """Up to twice its limit, Pillow only warns of them."""
    Image.new('1', (20_000, 9_000)).save(tmp_path / 'large.png')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for read in (load_image, read_header):
            with pytest.raises(DataError, match=r'is too large \(.*180000000 pixels'):
                read(tmp_path / 'large.png')


def test_formats_that_run_programs_are_not_decoded():
    """Pillow hands EPS to Ghostscript."""
    with pytest.raises(DataError, match='no known image format'):
        decode_image(encoded(photograph(), 'EPS'), 'image')


# Zip archives that are larger than they look


def write_archive(folder, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(folder / 'train.zip', 'w', compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    (folder / 'train_map.txt').write_text(''.join(f'{name}\t0\n' for name in members))


def forge(folder, **values):
    """Change fields of the directory's first entry."""
    positions = {'crc': 16, 'compressed': 20, 'size': 24, 'offset': 42, 'flags': 8}
    data = bytearray((folder / 'train.zip').read_bytes())
    start = data.index(b'PK\x01\x02')
    for field, value in values.items():
        width = 2 if field == 'flags' else 4
        data[start + positions[field] : start + positions[field] + width] = value.to_bytes(width, 'little')
    (folder / 'train.zip').write_bytes(data)


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'size': 100}, 'its size differs'),  # it inflates to more
        ({'size': 2**31}, 'bytes are more than the limit'),
        ({'compressed': 2**31}, 'overlap|more than the limit'),
        ({'compressed': 10**6}, 'overlap|cut short'),
        ({'offset': 10**6}, 'cut short|unpack requires'),
        ({'flags': 1}, 'it is encrypted'),
        ({'crc': 1}, 'its checksum differs'),
    ],
)
def test_forged_entries_of_zip_archives(tmp_path, values, message):
    write_archive(tmp_path, {'a/0.png': bytes(10**6)}, zipfile.ZIP_DEFLATED)
    forge(tmp_path, **values)
    with pytest.raises(DataError, match=message) as error:
        ZipArchive(tmp_path, 'train').read(0)
    check_one_line(error.value)


def test_no_more_is_inflated_than_an_archive_declares(tmp_path):
    write_archive(tmp_path, {'a/0.png': bytes(10**8)}, zipfile.ZIP_DEFLATED)
    forge(tmp_path, size=100)
    samples = ZipArchive(tmp_path, 'train')
    tracemalloc.start()
    with pytest.raises(DataError, match='its size differs'):
        samples.read(0)
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


def test_zip_archives_whose_files_overlap(tmp_path):
    write_archive(tmp_path, {'a/0.png': b'first' * 100, 'a/1.png': b'second'})
    data = (tmp_path / 'train.zip').read_bytes()
    length = 10**3
    forge(tmp_path, compressed=length, size=length, crc=zlib.crc32(data[37 : 37 + length]))
    with pytest.raises(DataError, match=r'its files overlap'):
        ZipArchive(tmp_path, 'train')


# Names


def test_names_in_zip_archives(tmp_path):
    """UTF-8 with and without the flag, another code page, backslashes, and what macOS adds."""
    word = 'größe'
    stored = {f'{word}/0.png': b'0', 'other\\1.png': b'1', 'other/2.png': b'2'}
    with zipfile.ZipFile(tmp_path / 'train.zip', 'w') as archive:
        for name, content in {'other/': b'', '__MACOSX/other/._2.png': b'x', **stored}.items():
            archive.writestr(name, content)
        archive.writestr('plain/caf0.png', b'3')
        archive.writestr('plain/caf9.png', b'4')
    data = (tmp_path / 'train.zip').read_bytes()
    data = data.replace(b'caf9', b'caf\xe9')  # Latin-1
    data = data.replace(b'caf0', 'ca\xe9'.encode())  # UTF-8 without the flag
    (tmp_path / 'train.zip').write_bytes(data)
    lines = [
        unicodedata.normalize('NFD', f'{word}/0.png').encode() + b'\t0',
        b'other/1.png\t1',
        b'.\\other\\2.png\t1',
        b'__MACOSX/other/._2.png\t1',
        b'other/._2.png\t1',
        'plain/ca\xe9.png'.encode() + b'\t2',
        b'plain/caf\xe9.png\t2',
    ]
    (tmp_path / 'train_map.txt').write_bytes(b'\xef\xbb\xbf' + b'\r\n'.join(lines) + b'\r\n')
    samples = ZipArchive(tmp_path, 'train')
    assert samples.classes == [word, 'other', 'plain']
    assert [samples.read(i) for i in range(len(samples))] == [b'0', b'1', b'2', b'3', b'4']


def test_a_class_may_be_composed_in_one_split_and_decomposed_in_the_other(tree, tmp_path):
    tree = shutil.copytree(tree, tmp_path / 'tree')
    for split, form in (('train', 'NFC'), ('val', 'NFD')):
        (tree / split / 'class_0').rename(tree / split / unicodedata.normalize(form, 'café'))
        (tree / split / 'class_1').rename(tree / split / 'cafz')
    for name, make in (('imagenet', lambda tree, _: tree), ('shards', as_shards), ('zip', as_zip)):
        folder = make(tree, tmp_path / name)
        splits = [open_samples(name, folder, split) for split in ('train', 'val')]
        assert splits[0].classes == splits[1].classes == ['cafz', 'café']
        assert [len(samples.read(len(samples) - 1)) > 0 for samples in splits] == [True, True]
    (tree / 'val' / 'café').mkdir()
    with pytest.raises(DataError, match=r"two folders for class café.*\('cafe\\u0301', 'caf\\xe9'\): move the images"):
        ClassFolders(tree, 'val')


def test_classes_that_look_alike_are_shown_with_escapes(tree, tmp_path):
    tree = shutil.copytree(tree, tmp_path / 'tree')
    (tree / 'val' / 'class_1').rename(tree / 'val' / 'class_1\u200b')
    with pytest.raises(DataError, match=r"val/ has no 'class_1', train/ has no 'class_1\\u200b'"):
        open_samples('imagenet', tree, 'val')


def test_archives_of_a_mac_leave_no_class(tree, tmp_path):
    tree = shutil.copytree(tree, tmp_path / 'tree')
    (tree / 'val' / '__MACOSX' / 'class_0').mkdir(parents=True)
    (tree / 'val' / 'class_0' / '__MACOSX').mkdir()
    (tree / 'val' / 'class_0' / '__MACOSX' / '0.png').touch()
    assert ClassFolders.find_classes(tree, 'val') == ['class_0', 'class_1']
    assert len(ClassFolders(tree, 'val')) == 4


def test_links_to_folders_above_are_not_followed(tree, tmp_path):
    tree = shutil.copytree(tree, tmp_path / 'tree')
    (tree / 'val' / 'class_0' / 'circle').symlink_to(tree / 'val')
    assert len(ClassFolders(tree, 'val')) == 4


@pytest.mark.parametrize('suffix', ['.jfif', '.GIF', '.avif', '.Jpe'])
def test_one_list_of_suffixes(tree, tmp_path, suffix):
    tree = shutil.copytree(tree, tmp_path / 'tree')
    kind = {'.GIF': 'GIF', '.avif': 'AVIF'}.get(suffix, 'JPEG')
    path = tree / 'val' / 'class_0' / f'9{suffix}'
    path.write_bytes(encoded(photograph(), kind))
    samples = ClassFolders(tree, 'val')
    assert list(samples.names)[2] == f'class_0/9{suffix}'
    assert decode_image(samples.read(2), 'image').size == (160, 120)
    assert path in images.find_images([tree / 'val'])


def test_a_class_of_other_kinds_says_which(tree, tmp_path):
    tree = shutil.copytree(tree, tmp_path / 'tree')
    for path in (tree / 'val' / 'class_0').iterdir():
        path.rename(path.with_suffix('.HEIC'))
    message = r'class .*val/class_0 holds no images, but 2 file\(s\) of other kinds \(2 .heic\): convert images of'
    with pytest.raises(DataError, match=message):
        open_samples('imagenet', tree, 'val')
    with pytest.raises(DataError, match=r'no images in .*class_0, but 2 file\(s\) of other kinds \(2 .heic\): convert'):
        images.find_images([tree / 'val' / 'class_0'])


# Few file descriptors


FEW_FILES = """
import resource, sys
from pathlib import Path
from data.formats import open_samples
samples = open_samples('shards', Path(sys.argv[1]), 'train')
for limit in 128, 8:
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    try:
        print(sum(bool(samples.read(index)) for index in range(0, 2 * len(samples), 2) for index in [index % 199]))
    except Exception as error:
        print(type(error).__name__, error)
    samples = open_samples('shards', Path(sys.argv[1]), 'train') if limit == 128 else samples
"""


def test_shards_need_few_open_files(tmp_path):
    tree = write_images(tmp_path / 'tree', classes=1, train=200, val=1, size=4)
    folder = as_shards(tree, tmp_path / 'shards', samples_per_shard=1)
    command = [sys.executable, '-c', FEW_FILES, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    first, second = done.stdout.splitlines()
    assert first == '200', done.stderr
    assert re.match(
        r'OpenFilesError image class_0/.* cannot be opened \(Too many open files\): raise the limit', second
    )
    assert '`ulimit -n 65536`' in second


def test_formats_are_found_with_odd_files_about(tmp_path):
    os.mkfifo(tmp_path / 'dataset_dict.json')
    assert find_format(tmp_path) in ('huggingface', 'imagenet')


def test_paths_that_no_file_can_have(tmp_path, monkeypatch):
    """Too long, or with a zero byte: on the command line, in a list, or for a whole dataset."""
    long = tmp_path / ('x' * 5000)
    with pytest.raises(DataError, match='does not exist: give image files or folders'):
        images.find_images([long])
    lines = b'\n'.join([os.fsencode(long), b'a\0b.png', b'\xff.png', b'C:\\x.png'])
    monkeypatch.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO(lines)))
    for path in images.find_images([Path('-')]):
        with pytest.raises(DataError, match='cannot be read'):
            read_file(path)
    for name in ('imagenet', 'shards', 'zip', 'huggingface'):
        with pytest.raises(DataError):
            open_samples(name, long, 'train')


def test_lists_may_be_written_on_windows(tree, monkeypatch):
    monkeypatch.chdir(tree)
    monkeypatch.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO(b'val\\class_0\\0.png\r\ntrain\\class_1\r\n')))
    assert images.find_images([Path('-')]) == [Path('val/class_0/0.png'), *sorted(Path('train/class_1').iterdir())]


def test_folders_that_cannot_be_listed_are_named(tree, monkeypatch):
    def walk(top, onerror, followlinks):
        onerror(PermissionError(13, 'Permission denied', str(top)))

    monkeypatch.setattr('data.image_folder.os.walk', walk)
    with pytest.raises(DataError, match='data folder .*class_0 cannot be read .Permission denied.: make it readable'):
        ClassFolders(tree, 'val')


def test_photographs_of_two_frames_are_read():
    """MPO, as some phones write it under the suffix of a JPEG."""
    data = encoded(photograph(), 'MPO', save_all=True, append_images=[photograph(80, 60)])
    assert decode_image(data, 'image').size == (160, 120)
