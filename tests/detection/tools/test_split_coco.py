import json

import numpy as np
import pytest

from data import DataError
from detection.tools.split_coco import choose_val, split_tree
from tests.helpers.processes import error_line, run_here

PROGRAM = ['-m', 'detection.tools.split_coco']


def tree_of(counts, groups=1):
    """As many images of each class as given, with two objects each; consecutive images share a film."""
    labels = [label for label, count in enumerate(counts, start=1) for _ in range(count)]
    images = [
        {'id': i, 'file_name': f'{i}.jpg', 'width': 9, 'height': 9, 'film': i // groups} for i in range(len(labels))
    ]
    annotations = [
        {'id': 2 * i + j, 'image_id': i, 'category_id': label, 'bbox': [0, 0, 9, 9], 'own': 'kept'}
        for i, label in enumerate(labels)
        for j in range(2)
    ]
    categories = [{'id': label, 'name': f'c{label}'} for label in range(1, len(counts) + 1)]
    return {'info': {'year': 2026}, 'images': images, 'annotations': annotations, 'categories': categories}


def images_of(split, label):
    return len({x['image_id'] for x in split['annotations'] if x['category_id'] == label})


def test_each_class_is_divided_and_nothing_is_lost():
    tree = tree_of((100, 40, 10, 5, 1))
    splits = split_tree(tree, 'x.json', 0.2)
    assert [images_of(splits['val'], label) for label in range(1, 6)] == [20, 8, 2, 1, 0]
    assert len(splits['val']['images']) == 31
    for section, key in (('images', 'id'), ('annotations', 'id')):
        parts = sorted(x[key] for split in splits.values() for x in split[section])
        assert parts == [x[key] for x in tree[section]]
    for split in splits.values():
        assert {x['image_id'] for x in split['annotations']} == {x['id'] for x in split['images']}
        assert (split['info'], split['categories']) == (tree['info'], tree['categories'])
        assert split['annotations'][0]['own'] == 'kept'


def test_the_seed_chooses():
    tree = tree_of((30, 20))
    first, again, other = (split_tree(tree, 'x.json', 0.3, seed)['val'] for seed in (0, 0, 1))
    assert first == again != other


def test_images_of_several_classes_are_divided_in_proportion():
    rng = np.random.default_rng(0)
    shown = (rng.random((2000, 20)) < rng.uniform(0.01, 0.5, 20)).astype(int)
    shown = np.concatenate([shown, np.ones((2000, 1), int)], axis=1)
    fractions = shown[choose_val(shown, 0.1, 0)].sum(axis=0) / shown.sum(axis=0)
    assert np.abs(fractions - 0.1).max() < 0.02
    assert fractions[-1] == pytest.approx(0.1, abs=0.005)


def test_groups_stay_together():
    splits = split_tree(tree_of((60, 40), groups=5), 'x.json', 0.2, group_by='film')
    films = [{image['film'] for image in split['images']} for split in splits.values()]
    assert not films[0] & films[1]
    assert len(films[1]) == 4
    assert [images_of(splits['val'], label) for label in (1, 2)] == pytest.approx([12, 8], abs=5)


def test_there_is_always_an_image_on_both_sides():
    for fraction in (0.01, 0.99):
        splits = split_tree(tree_of((2, 1)), 'x.json', fraction)
        assert {len(split['images']) for split in splits.values()} == {1, 2}
    with pytest.raises(DataError, match='has 1 image, of which none is left'):
        split_tree(tree_of((1,)), 'x.json', 0.2)


@pytest.mark.parametrize(
    ('section', 'entries', 'message'),
    [
        ('categories', [], 'x.json has no categories, so there are no objects to divide'),
        ('annotations', [], 'x.json has no annotations, so there are no objects to divide'),
        ('categories', [{'id': 1, 'name': 'c1'}, {'id': 1, 'name': 'c2'}], 'two of the categories have the id 1'),
        (
            'categories',
            [{'id': 1, 'name': 'c'}, {'id': 2, 'name': 'c'}],
            "two of the categories have the name 'c'",
        ),
    ],
)
def test_files_that_cannot_be_split_are_refused(section, entries, message):
    with pytest.raises(DataError, match=message):
        split_tree(tree_of((3, 2)) | {section: entries}, 'x.json', 0.2)


def test_files_are_written_and_mistakes_named(tmp_path):
    path, output = tmp_path / 'all.json', tmp_path / 'new' / 'split'
    path.write_text(json.dumps(tree_of((8, 1))))
    done = run_here(*PROGRAM, path, '--val', '0.25', '--output', output)
    assert (done.returncode, done.stderr) == (0, '')
    lines = done.stdout.splitlines()
    assert lines[0] == f'{output}/instances_train.json: 7 images, 14 annotations'
    assert lines[1] == f'{output}/instances_val.json: 2 images, 4 annotations; no object of c2'
    assert f'DATA.VAL_ANNOTATIONS {output}/instances_val.json DATA.VAL_IMAGES .' in lines[2]
    assert len(json.loads((output / 'instances_val.json').read_text())['images']) == 2
    assert 'exists: write another --output' in error_line(*PROGRAM, path, '--output', output)
    flags = ['--output', tmp_path / 'other']
    line = error_line(*PROGRAM, path, *flags, '--group-by', 'video')
    assert 'image 0.jpg has no number or text video: it has file_name, film, height, id, width' in line
    assert "give a file in COCO's format" in error_line(*PROGRAM, tmp_path / 'none.json', *flags)
    path.write_text('[]')
    assert 'has no list "images"' in error_line(*PROGRAM, path, *flags)
    assert not (tmp_path / 'other').exists()
