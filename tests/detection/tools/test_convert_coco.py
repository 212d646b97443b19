"""Exports in COCO's format: layouts, names of images, ids, categories, masks without area."""

import json
from urllib.parse import quote

import pytest

from data import DataError
from detection.data import CocoDataset
from detection.tools.convert_dataset.__main__ import convert
from detection.tools.convert_dataset.coco import read_coco
from detection.tools.convert_dataset.formats import detect_format
from tests.helpers.coco_data import read_tree
from tests.helpers.exports import write_image
from tests.helpers.processes import run_here

SQUARE = [[5, 5, 25, 5, 25, 25, 5, 25]]


def tree_of(names, categories=((1, 'cat'), (2, 'dog')), **keys):
    """An object of each image, categories in turn."""
    images = [{'id': i, 'file_name': name, 'width': 200, 'height': 100} for i, name in enumerate(names)]
    ids = [number for number, _ in categories]
    objects = [
        {'id': i, 'image_id': i, 'category_id': ids[i % len(ids)], 'bbox': [5, 5, 20, 20]} | keys
        for i in range(len(names))
    ]
    return {
        'images': images,
        'annotations': objects,
        'categories': [{'id': number, 'name': name} for number, name in categories],
    }


def write_json(path, tree, encoding='utf-8'):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(json.dumps(tree, ensure_ascii=False).encode(encoding))
    return path


@pytest.mark.parametrize(
    ('file', 'given', 'image', 'source'),
    [
        ('result.json', 'images/{}.png', 'images/{}.png', '.'),  # Label Studio
        ('result.json', 'images\\\\{}.png', 'images/{}.png', 'result.json'),  # the same on Windows
        ('result.json', '/data/upload/3/{}.png', 'images/{}.png', 'result.json'),
        ('annotations/instances_default.json', '{}.png', 'images/default/{}.png', '.'),  # CVAT
        ('annotations/instances_default.json', 'b/{}.png', 'images/b/{}.png', 'annotations/instances_default.json'),
        ('annotations/instances_train2017.json', '{}.png', 'train2017/{}.png', '.'),
        ('all.json', 'https://example.org/x/{}%20a.png', '{} a.png', '.'),
        ('all.json', quote('é ü') + '/{}.png', 'é ü/{}.png', '.'),
    ],
)
def test_a_single_file_is_read_and_divided(tmp_path, file, given, image, source):
    write_json(tmp_path / file, tree_of([given.format(i) for i in range(5)]))
    for i in range(5):
        write_image(tmp_path / image.format(i))
    done = run_here('-m', 'detection.tools.convert_dataset', tmp_path / source, '--output', tmp_path / 'out')
    assert done.returncode == 0, done.stderr
    assert (
        'there are no validation images: 1 of 5 training images, a random but fixed choice, become val' in done.stderr
    )
    assert [len(read_tree(tmp_path / 'out', split)['images']) for split in ('train', 'val')] == [4, 1]
    assert 'MODEL.NUM_CLASSES 2' in done.stdout


def test_categories_are_matched_by_name(tmp_path):
    for split, categories in (('train', [(1, 'cat'), (2, 'dog')]), ('val', [(0, 'dog'), (7, 'cat'), (9, 'owl')])):
        names = [f'{split}{i}.png' for i in range(2)]
        write_json(tmp_path / 'annotations' / f'instances_{split}.json', tree_of(names, categories))
        for name in names:
            write_image(tmp_path / split / name)
    assert detect_format(tmp_path) == 'coco'
    source = read_coco(tmp_path)
    assert source.categories == ['cat', 'dog', 'owl']
    assert [x['category'] for item in source.splits['val'] for x in item.objects] == ['dog', 'cat']
    assert any('has other categories than the split before it: they are matched by name' in x for x in source.notes)
    convert(source, tmp_path / 'out')
    assert CocoDataset(tmp_path / 'out', 'val', with_masks=False)[0][1]['labels'].tolist() == [2]


def test_ids_may_be_texts_and_unused_keys_of_any_type(tmp_path):
    tree = tree_of(['a.png', 'b.png'], width=30.5, name=None)
    for x in tree['images']:
        x['id'] = f'3f2-{x["id"]}'
    for x in tree['annotations']:
        x |= {'id': f'77-{x["id"]}', 'image_id': f'3f2-{x["image_id"]}', 'category_id': f'c{x["category_id"]}'}
    for x in tree['categories']:
        x |= {'id': f'c{x["id"]}', 'supercategory': None}
    for x in ('a', 'b'):
        write_image(tmp_path / f'{x}.png')
    source = read_coco(write_json(tmp_path / 'x.json', tree))
    assert [x['category'] for item in source.splits['train'] for x in item.objects] == ['cat', 'dog']


@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16', 'utf-16-be', 'utf-32'])
def test_encodings_are_recognised(tmp_path, encoding):
    write_image(tmp_path / 'a.png')
    file = write_json(tmp_path / 'x.json', tree_of(['a.png'], [(1, '汽车')]), encoding)
    assert read_coco(file).categories == ['汽车']


def test_masks_without_area_are_left_out_and_ignored_objects_become_crowds(tmp_path):
    names = [f'{i}.png' for i in range(4)]
    tree = tree_of(names, segmentation=SQUARE)
    tree['annotations'][0]['segmentation'] = [[]]
    tree['annotations'][1]['segmentation'] = [[5, 5, 25, 25]]
    tree['annotations'][2]['ignore'] = 1
    for name in names:
        write_image(tmp_path / name)
    source = read_coco(write_json(tmp_path / 'x.json', tree))
    objects = [x for item in source.splits['train'] for x in item.objects]
    assert ['segmentation' in x for x in objects] == [False, False, True, True]
    assert ['iscrowd' in x for x in objects] == [False, False, True, False]
    assert any('2 masks of fewer than three corners are left out, and the boxes kept' in x for x in source.notes)


def test_sizes_that_are_absent_are_read_from_the_images(tmp_path):
    tree = tree_of(['a.png', 'b.png'])
    tree['images'][0] |= {'width': 200.0, 'height': 100.0}
    tree['images'][1] |= {'width': 0, 'height': None}
    for name in ('a.png', 'b.png'):
        write_image(tmp_path / name)
    source = read_coco(write_json(tmp_path / 'x.json', tree))
    assert [item.size for item in source.splits['train']] == [(200, 100)] * 2
    assert any('1 images have no width and height, which are read from the images' in x for x in source.notes)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            lambda t: t['annotations'][0].update(image_id='0'),
            "annotation 1 is of image '0', which the file does not have",
        ),
        (lambda t: t['annotations'][0].update(category_id=3), 'annotation 1 is of category 3, which the file does not'),
        (lambda t: t['categories'][0].update(name='dog'), 'has two categories of one name or id'),
        (lambda t: t['images'][0].update(file_name=None), 'an image has the file_name None: write text'),
        (lambda t: t['images'][0].update(file_name='no.png'), 'image no.png of .*x.json is not in'),
        (lambda t: t['images'][0].update(id=1), 'two images have the same id'),
        (lambda t: t.pop('categories'), "is not in COCO's format: KeyError 'categories'"),
        (lambda t: t.update(images=[3]), "is not in COCO's format: TypeError"),
    ],
)
def test_mistakes_are_named(tmp_path, change, message):
    tree = tree_of(['a.png', 'b.png'])
    change(tree)
    for name in ('a.png', 'b.png'):
        write_image(tmp_path / name)
    with pytest.raises(DataError, match=message):
        read_coco(write_json(tmp_path / 'x.json', tree))


def test_files_of_unknown_splits_are_not_guessed(tmp_path):
    for name in ('first', 'second'):
        write_json(tmp_path / f'{name}.json', tree_of(['a.png']))
    with pytest.raises(DataError, match='has first.json, second.json, whose names do not tell the splits'):
        read_coco(tmp_path)
