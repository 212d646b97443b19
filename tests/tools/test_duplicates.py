"""Copies of pictures: found by hash, across classes and splits, and kept together when a dataset is split."""

import io
import json
import random
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from data import DataError
from data.image_folder import ClassFolders
from tests.helpers.datasets import encoded
from tests.helpers.photographs import write_photographs
from tests.helpers.processes import run_here
from tools.check_dataset import check_dataset
from tools.duplicates import MAX_DISTANCE, content_hash, group_copies, perceptual_hash, similar_pairs
from tools.split_dataset import split_classes, split_dataset


def distance(one, other):
    bits = [np.unpackbits(np.frombuffer(x, np.uint8)) for x in (one, other)]
    return int((bits[0] != bits[1]).sum())


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    return write_photographs(tmp_path_factory.mktemp('photographs') / 'tree', 8)


def test_photographs_that_are_encoded_again_or_resized_have_similar_hashes(photographs):
    paths = sorted(photographs.rglob('*.jpg'))
    pictures = [Image.open(path).convert('RGB') for path in paths]
    hashes = [perceptual_hash(picture) for picture in pictures]
    found = 0
    for picture, before in zip(pictures, hashes, strict=True):
        half = picture.resize([side // 2 for side in picture.size])
        for data in (encoded(picture, 'JPEG', quality=60), encoded(half, 'PNG'), encoded(picture, 'WEBP', quality=80)):
            found += distance(perceptual_hash(Image.open(io.BytesIO(data))), before) <= MAX_DISTANCE
    assert found >= 0.9 * 3 * len(pictures)
    assert len(similar_pairs(hashes)) == 0  # different pieces of the same photographs
    assert min(distance(x, y) for i, x in enumerate(hashes) for y in hashes[:i]) > 2 * MAX_DISTANCE


def test_flat_images_are_not_similar():
    assert perceptual_hash(Image.new('RGB', (50, 40), 'white')) == b''
    assert len(similar_pairs([b'', b''])) == 0


def test_similar_pairs_are_those_of_a_comparison_of_all():
    rng = random.Random(0)
    hashes = [rng.randbytes(32) for _ in range(300)]
    for number in range(100):
        bits = int.from_bytes(hashes[number], 'little')
        for place in rng.sample(range(256), rng.choice([0, 3, 15, 16, 17, 20])):
            bits ^= 1 << place
        hashes.append(bits.to_bytes(32, 'little'))
    hashes[5] = b''
    expected = [
        [i, j]
        for i in range(400)
        for j in range(i + 1, 400)
        if hashes[i] and hashes[j] and distance(hashes[i], hashes[j]) <= MAX_DISTANCE
    ]
    assert similar_pairs(hashes).tolist() == expected


def test_similar_pairs_take_no_quadratic_time():
    """Also where all hashes agree in most parts, or are equal."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (10_000, 32), dtype=np.uint8)
    codes[:2000, 8:] = 0
    codes[2000:4000] = 7
    start = time.process_time()
    pairs = similar_pairs([code.tobytes() for code in codes])
    assert time.process_time() - start < 10
    assert len(pairs) >= 1999


def test_copies_have_one_number():
    contents = np.array([content_hash(x) for x in (b'a', b'b', b'a', b'c', b'd')], np.uint64)
    groups = group_copies(contents, np.array([[2, 3]]))
    assert groups[0] == groups[2] == groups[3]
    assert len(set(groups.tolist())) == 3


@pytest.fixture
def tree(photographs, tmp_path):
    """`train/` and `val/` of photographs, with copies between them and between classes."""
    root = tmp_path / 'data'
    for label in ('china', 'flower'):
        for number in range(8):
            folder = root / ('val' if number < 3 else 'train') / label
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(photographs / label / f'{number:02d}.jpg', folder)
    shutil.copy(root / 'train' / 'china' / '03.jpg', root / 'train' / 'flower' / 'equal.jpg')
    shutil.copy(root / 'train' / 'china' / '04.jpg', root / 'val' / 'flower' / 'shared.jpg')
    resized = Image.open(root / 'train' / 'china' / '05.jpg').resize((90, 90))
    resized.save(root / 'val' / 'china' / 'resized.png')
    return root


def test_copies_are_listed(tree):
    problems = []
    images, _ = check_dataset(tree, 'imagenet', 0, problems.append)
    assert images == {'train': 11, 'val': 8}
    train, val = tree / 'train', tree / 'val'
    assert [tuple(problem) for problem in problems] == [
        (
            'classes',
            f'{train}/china/03.jpg is the same file as {train}/flower/equal.jpg, in the classes china and flower',
        ),
        ('same', f'{train}/china/04.jpg is the same file as {val}/flower/shared.jpg, in the classes china and flower'),
        ('similar', f'{train}/china/05.jpg looks like {val}/china/resized.png'),
    ]


def test_copies_are_counted_and_the_remedy_is_said(tree, tmp_path):
    done = run_here('-m', 'tools.check_dataset', tree, '--workers', '1', '--json', tmp_path / 'report.json')
    assert done.returncode == 1
    counts = '0 broken, 0 empty, 1 in train and val, 1 in two classes, 1 similar (encoded again or resized)'
    assert done.stdout.splitlines()[-1] == f'images: 11 in train, 8 in val; {counts}'
    assert 'python -m tools.split_dataset, which keeps copies together' in done.stderr
    assert len(json.loads((tmp_path / 'report.json').read_text())['problems']) == 3


def test_a_split_keeps_copies_together(photographs, tmp_path, capsys):
    tree = shutil.copytree(photographs, tmp_path / 'tree')
    Image.open(tree / 'china' / '01.jpg').save(tree / 'flower' / 'again.png')
    Image.open(tree / 'china' / '02.jpg').resize((80, 80)).save(tree / 'china' / 'small.png')
    shutil.copy(tree / 'china' / '03.jpg', tree / 'flower' / 'equal.jpg')
    samples = ClassFolders(tree.parent, tree.name)
    names = list(samples.names)
    together = [('china/01.jpg', 'flower/again.png'), ('china/02.jpg', 'china/small.png')]
    together.append(('china/03.jpg', 'flower/equal.jpg'))
    for seed in range(8):
        val = {names[index] for index in split_classes(samples, 0.4, seed)['val']}
        assert all((one in val) == (other in val) for one, other in together)
        for label in ('china', 'flower'):
            assert 0 < sum(name.startswith(label) for name in val) < sum(name.startswith(label) for name in names)
    split_dataset(tree, tmp_path / 'out', 0.4)
    err = capsys.readouterr().err
    assert '3 duplicate image(s) stay in the split of their original, such as china/01.jpg and flower/again.png' in err
    assert '2 of them are in another class than their original: for example china/01.jpg and flower/again.png' in err


def test_classes_of_the_same_pictures_cannot_be_split(photographs, tmp_path):
    tree = tmp_path / 'tree'
    for label in ('a', 'b', 'c'):
        (tree / label).mkdir(parents=True)
        for number in {'a': (0, 1), 'b': (1, 2), 'c': (0, 2)}[label]:
            shutil.copy(photographs / 'china' / f'{number:02d}.jpg', tree / label)
    with pytest.raises(DataError, match=r'class [bc] of .* shares its pictures with other classes'):
        split_classes(ClassFolders(tree.parent, tree.name), 0.5)


def test_a_class_of_similar_pictures_only_is_split_by_equal_files(photographs, tmp_path):
    tree = tmp_path / 'tree'
    (tree / 'film').mkdir(parents=True)
    picture = Image.open(photographs / 'china' / '00.jpg')
    for quality in (70, 80, 90):
        picture.save(tree / 'film' / f'{quality}.jpg', quality=quality)
    splits = split_classes(ClassFolders(tree.parent, tree.name), 0.3)
    assert [len(splits[split]) for split in ('train', 'val')] == [2, 1]
