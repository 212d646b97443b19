"""WebDataset tars of others: names of files, labels, members, mistakes; and timm reads our shards."""

import gzip
import io
import json
import os
import re
import tarfile

import pytest

from data import DataError, webdataset
from data.formats import find_format, open_samples
from data.webdataset import WebDataset
from tests.helpers.datasets import as_shards, as_webdataset, samples_of
from tests.helpers.images import write_images


def write_tar(path, members, **options):
    """Write a tar of members by name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w', **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def read(folder, split='train'):
    samples = WebDataset(folder, split)
    return [(samples.classes[target], samples.read(i)) for i, target in enumerate(samples.targets.tolist())]


PAIRS = [('.jpg', b'x'), ('.cls', b'1')], [('.cls', b'0\n'), ('.webp', b'y')]
SAMPLES = [(f'{i}{suffix}', content) for i, parts in enumerate(PAIRS) for suffix, content in parts]


@pytest.mark.parametrize(
    ('name', 'options'),
    [
        ('train/0.tar', {}),
        ('imagenet1k-train-0000.tar', {'format': tarfile.GNU_FORMAT}),
        ('train/x' + 'y' * 150 + '.tar', {'format': tarfile.PAX_FORMAT}),
    ],
)
def test_names_of_tars_and_kinds_of_members(tmp_path, name, options):
    samples = [(f'{"long" * 30}/{x}', content) for x, content in SAMPLES] if options else SAMPLES
    extra = [('README', b'text'), ('._0.jpg', b'of a Mac')]
    write_tar(tmp_path / name, [*extra, *samples], **options)
    write_tar(tmp_path / 'interval-2.tar', SAMPLES)  # is not of the split val
    assert read(tmp_path) == [('1', b'x'), ('0', b'y')]
    assert find_format(tmp_path) == 'webdataset'
    assert WebDataset.find_classes(tmp_path, 'val') == []


def test_labels_in_json_and_names_of_classes(tmp_path):
    def write(split, *entries):
        members = [(f'{i}.{suffix}', x) for i, y in enumerate(entries) for suffix, x in (('jpg', b''), ('json', y))]
        write_tar(tmp_path / split / '0.tar', members)

    write('train', b'{"label": "dog", "width": 3}', b'{"cls": "cat"}', b'{"label": "dog"}')
    write('validation', b'{"label": "cat"}')
    assert [name for name, _ in read(tmp_path)] == ['dog', 'cat', 'dog']
    assert read(tmp_path, 'val') == [('cat', b'')]  # with the number that it has in train
    assert WebDataset(tmp_path, 'val').targets.tolist() == [0]
    write('validation', b'{"label": "cow"}')
    with pytest.raises(
        DataError, match=r"\(val\) has images of class 'cow', which is none of the 2 classes of train or"
    ):
        read(tmp_path, 'val')
    write('train', b'{"label": 0}', b'{"label": 2}')
    (tmp_path / 'classnames.txt').write_text('tench\ngoldfish\ngreat white\n\n')
    assert [name for name, _ in read(tmp_path)] == ['tench', 'great white']
    with pytest.raises(DataError, match='class .*/goldfish holds no images: add some or remove it'):
        open_samples('webdataset', tmp_path, 'train')
    write('train', b'{"label": 3}')
    with pytest.raises(
        DataError, match="has images of class '3', which is none of the 3 classes of train or classname"
    ):
        read(tmp_path)
    (tmp_path / 'classnames.txt').write_text('sunglasses\nhat\nsunglasses\n\nshoe')
    assert WebDataset.find_classes(tmp_path, 'train') == ['sunglasses (0)', 'hat', 'sunglasses (2)', '(3)', 'shoe']


def test_samples_of_several_images_have_the_usual_one(tmp_path):
    write_tar(tmp_path / 'train/0.tar', [('0.seg.png', b'z'), ('0.png', b'y'), ('0.jpg', b'x'), ('0.cls', b'0')])
    assert read(tmp_path) == [('0', b'x')]


@pytest.mark.parametrize(
    ('members', 'message'),
    [
        (
            [('0.cls', b'0'), ('0.txt', b'')],
            r"sample '0' of .*0.tar \('.cls, .txt'\) has no image: write it as <key>.jpg",
        ),
        ([('0.jpg', b''), ('1.jpg', b'')], r"'0' of .*0.tar \('.jpg'\) has no class: write its index as <key>.cls"),
        ([('0.jpg', b''), ('0.cls', b'')], "has the class '': leave it out, or write its index"),
        ([('0.jpg', b''), ('0.cls', b'-1')], "has the class '-1': leave it out, or write its index"),
        ([('0.jpg', b''), ('0.cls', b'\xff')], 'has no class in UTF-8 or JSON: write its index as <key>.cls'),
        ([('0.jpg', b''), ('0.json', b'{"text": 1}')], 'has no class in its .json: write {"label": <class index>}'),
        ([('0.jpg', b''), ('0.json', b'[' * 10**5)], 'has no class in UTF-8 or JSON'),
        ([('0.jpg', b''), ('0.json', b'7')], 'has no class in UTF-8 or JSON'),
        ([('0.jpg', b''), ('0.json', b'{"label": [1]}')], 'has no class in its .json'),
        ([('0.jpg', b''), ('0.jpg', b''), ('0.cls', b'0')], r"cannot be read \('0.jpg' is in it twice\): download"),
        ([('a/../../0.jpg', b''), ('a/../../0.cls', b'0')], "has a tar with 'a/../../0.jpg', which leads out of its"),
        ([('README', b'')], '0.tar has no images, nor has a tar after it: give tars of <key>.jpg and <key>.cls'),
    ],
)
def test_mistakes_are_one_line(tmp_path, members, message):
    write_tar(tmp_path / 'train' / '0.tar', members)
    with pytest.raises(DataError) as error:
        read(tmp_path)
    assert re.search(message, str(error.value))
    assert '\n' not in str(error.value)


def test_tars_that_are_cut_short_damaged_or_compressed(tmp_path):
    members = [('0.cls', b'0'), ('0.jpg', b'x' * 2000), ('1.cls', b'0'), ('1.jpg', b'')]
    path = write_tar(tmp_path / 'train' / '0.tar', members)
    good = path.read_bytes()
    path.write_bytes(good[:2000])
    with pytest.raises(DataError, match=r"0.tar cannot be read \(it is cut short or damaged at '0.jpg'\): download or"):
        read(tmp_path)
    path.write_bytes(good[:3584] + b'x' + good[3585:])  # the header of 1.cls, at which tarfile only stops
    with pytest.raises(DataError, match=r'0.tar cannot be read \(it is damaged 3,584 bytes after its start\)'):
        read(tmp_path)
    path.write_bytes(good)
    samples = WebDataset(tmp_path, 'train')
    path.write_bytes(good[:1600])
    with pytest.raises(DataError, match=r'image 0.jpg in .*0.tar is cut short \(64 of 2000 bytes\)'):
        samples.read(0)
    write_tar(path, SAMPLES)
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(DataError, match='0.tar cannot be read'):
        read(tmp_path)
    path.rename(path.with_suffix('.tar.gz'))
    with pytest.raises(DataError, match=r'has no tars of train: name them .*, uncompressed'):
        read(tmp_path)


def test_headers_that_ask_for_much_memory(tmp_path):
    """A name of a gigabyte, and an image beyond the limit, in files of holes."""
    path = write_tar(tmp_path / 'train' / '0.tar', [('x' * 5000, b'')], format=tarfile.GNU_FORMAT)
    content = bytearray(path.read_bytes())
    header = tarfile.TarInfo.frombuf(bytes(content[:512]), 'utf-8', '')
    header.size = 2**31
    content[:512] = header.tobuf(tarfile.GNU_FORMAT)[:512]
    path.write_bytes(content)
    os.truncate(path, 2**31 + 10**4)
    with pytest.raises(DataError, match='0.tar cannot be read'):
        read(tmp_path)
    header.name, header.type, header.size = '0.jpg', tarfile.REGTYPE, 2**29 + 1
    label = write_tar(tmp_path / 'label.tar', [('0.cls', b'0')]).read_bytes()
    path.write_bytes(label[:1024] + header.tobuf())
    os.truncate(path, 2**30)
    with pytest.raises(DataError, match='image 0.jpg in .*0.tar cannot be read .536,870,913 bytes'):
        WebDataset(tmp_path, 'train').read(0)


def test_an_unfinished_packing_is_not_read(tmp_path):
    folder = as_shards(write_images(tmp_path / 'tree', classes=2, train=3, val=1, size=8), tmp_path / 'shards')
    assert [target for _, target, _ in samples_of('webdataset', folder)] == [0, 0, 0, 1, 1, 1]
    (folder / 'train' / 'index.json').unlink()
    with pytest.raises(DataError, match='train holds an unfinished packing: complete it with'):
        samples_of('webdataset', folder)


def test_tars_are_read_once_when_a_run_opens_both_splits(tmp_path, monkeypatch):
    folder = as_webdataset(write_images(tmp_path / 'tree'), tmp_path / 'tars', label='.json')
    paths = []
    find_images = webdataset._find_images
    monkeypatch.setattr(webdataset, '_find_images', lambda path: (paths.append(path), find_images(path))[1])
    for split in ('train', 'val'):
        open_samples('webdataset', folder, split)
    assert sorted(paths) == sorted(str(path) for path in folder.glob('*.tar'))


def test_timm_and_webdataset_read_our_shards(tmp_path):
    """They look for .jpg, .png and .webp."""
    pytest.importorskip('webdataset')
    from timm.data import create_dataset

    tree = write_images(tmp_path / 'tree', classes=2, train=3, val=1)
    for number, path in enumerate(sorted((tree / 'train').rglob('*.png'))):
        path.rename(path.with_suffix(('.JPEG', '.jfif', '.jpg', '.PNG')[number % 4]))
    shards = as_shards(tree, tmp_path / 'shards')
    with tarfile.open(shards / 'train' / 'shard_00000.tar') as tar:
        assert [os.path.splitext(name)[1] for name in tar.getnames()[::2]] == ['.jpg', '.jpg', '.jpg', '.png', '.jpg']
    dataset = create_dataset('wds/', root=str(shards), split='train/shard_{00000..00001}.tar|6', is_training=False)
    assert [target for _, target in dataset] == [0, 0, 0, 1, 1, 1]
    assert json.loads((shards / 'train' / 'index.json').read_text())['samples'] == 6
