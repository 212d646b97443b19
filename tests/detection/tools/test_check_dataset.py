import json
import shutil

import pytest
from PIL import Image

from detection.data.coco import SplitFiles
from detection.tools.check_dataset import check_dataset
from tests.helpers.coco_data import crowd, read_tree, rectangle, update_tree
from tests.helpers.images import damage
from tests.helpers.processes import error_line, run_here, start

PROGRAM = ['-m', 'detection.tools.check_dataset']
SPLITS = ['--opts', 'DATA.TRAIN_SPLIT', 'train', 'DATA.VAL_SPLIT', 'val']


@pytest.fixture
def sound(coco):
    """A dataset without faults: the third category has an object too."""
    annotations = read_tree(coco, 'train')['annotations']
    update_tree(coco, 'train', annotations=[annotations[0] | {'category_id': 90}, *annotations[1:]])
    return coco


def check(root, *flags, workers=0):
    """The exit code, the printed summary, and the content of the JSON file."""
    file = root / 'faults.json'
    done = run_here(*PROGRAM, '--data-path', root, '--workers', workers, '--json', file, *flags, *SPLITS)
    assert done.stderr == ''
    return done.returncode, done.stdout.splitlines(), json.loads(file.read_text())


def faults(root, *flags):
    """The kinds of the faults, and their texts."""
    code, _, tree = check(root, *flags)
    assert code == 1
    return [x['kind'] for x in tree['faults']], ' '.join(x['text'] for x in tree['faults'])


def test_a_sound_dataset_has_no_faults(sound):
    annotations = [*read_tree(sound, 'val')['annotations'], crowd(64, 48, rows=10) | {'image_id': 5}]
    update_tree(sound, annotations=annotations)
    code, lines, tree = check(sound)
    assert (code, lines[-1], tree['faults']) == (0, 'no faults', [])
    assert tree['splits']['train']['images'] == 6
    assert lines[1] == f'val: 4 images, {len(annotations) - 1} objects, 1 crowd regions, 3 categories'
    assert check(sound, '--split', 'val')[2]['splits'].keys() == {'val'}


def test_images_are_read_and_compared(sound):
    images = read_tree(sound, 'val')['images']
    (sound / 'val' / '0.png').unlink()
    damage(sound / 'val' / '1.png', 'truncated')
    update_tree(sound, images=[*images[:2], images[2] | {'width': 61}, images[3]])
    shutil.copy(sound / 'train' / '3.png', sound / 'val' / '3.png')
    kinds, texts = faults(sound)
    assert kinds == ['missing', 'broken', 'size', 'same']
    assert 'val/0.png does not exist' in texts
    assert 'has 60 x 44 pixels, and its entry 61 x 44' in texts
    assert f'{sound}/val/3.png is the same file as {sound}/train/3.png' in texts


def test_images_that_are_encoded_again_are_similar(sound):
    picture = Image.linear_gradient('L').rotate(30).resize((64, 64)).convert('RGB')
    picture.save(sound / 'train' / '3.png')
    picture.resize((80, 80)).resize((64, 64)).save(sound / 'val' / '3.png')
    kinds, texts = faults(sound)
    assert (kinds, 'val/3.png looks like' in texts) == (['similar'], True)


def test_annotations_are_checked_one_by_one(sound):
    bad = [
        rectangle(0, 0, 9, 9) | {'image_id': 99},
        rectangle(0, 0, 9, 9) | {'image_id': 5, 'category_id': 4},
        rectangle(0, 0, 9, 9) | {'image_id': 5, 'bbox': [0, 0, -9, 9]},
        rectangle(0, 0, 9, 9) | {'image_id': 5, 'segmentation': {'size': [1, 1], 'counts': [1]}},
        {'image_id': 5, 'category_id': 3},
    ]
    odd = [
        rectangle(10, 10, 0, 9) | {'image_id': 5},
        rectangle(60, 10, 9, 9) | {'image_id': 5},
        rectangle(10, 10, 9, 9) | {'image_id': 5, 'bbox': [30, 30, 9, 9]},
        rectangle(10, 10, 9, 9) | {'image_id': 5, 'segmentation': [[1, 1, 2, 2]]},
        rectangle(10, 10, 9, 9) | {'image_id': 5},
    ]
    good = read_tree(sound, 'val')['annotations']
    update_tree(sound, annotations=[*bad, *good, *odd, good[0]])
    kinds, texts = faults(sound)
    expected = ['entry'] * 4 + ['duplicate'] + ['entry'] + ['box'] * 3 + ['mask', 'duplicate', 'duplicate']
    assert sorted(kinds) == sorted(expected)
    for text in (
        'image 99, which is not among the images',
        'has no bbox: add it',
        'less than a pixel is in the image',
        'leaves the image of 64 x 48 pixels by 5',
        'but its mask is in [10, 10, 9, 9]',
        'fewer than three corners',
        'two of the annotations have the id 0',
        'has the category and the box of another object',
    ):
        assert text in texts
    assert '  and 2 more, which --json lists' in check(sound)[1]


def test_ids_names_and_categories_are_checked(sound):
    tree = read_tree(sound, 'val')
    update_tree(
        sound,
        images=[*tree['images'], tree['images'][0]],
        categories=[*tree['categories'][:2], {'id': 8, 'name': 'cat'}],
    )
    update_tree(
        sound, 'train', annotations=[x for x in read_tree(sound, 'train')['annotations'] if x['category_id'] != 90]
    )
    kinds, texts = faults(sound)
    assert kinds == ['duplicate', 'duplicate', 'category', 'category', 'category']
    assert 'two of the images have the id 5' in texts
    assert "have the file_name '0.png'" in texts
    assert 'cat is a category of val only' in texts
    assert 'rare has no object' in texts


def test_ids_of_images_may_be_texts(sound):
    tree = read_tree(sound, 'val')
    for section, key in (('images', 'id'), ('annotations', 'image_id')):
        tree[section] = [x | {key: f'image {x[key]}'} for x in tree[section]]
    update_tree(sound, images=tree['images'], annotations=tree['annotations'])
    assert check(sound)[0] == 0


def test_files_that_cannot_be_used(sound):
    (sound / 'annotations' / 'instances_val.json').write_text('{"images": [')
    kinds, texts = faults(sound)
    assert (kinds, 'is not JSON' in texts) == (['file'], True)
    assert check(sound)[1][1] == 'val: not read'
    assert 'nowhere does not exist' in error_line(*PROGRAM, '--data-path', sound / 'nowhere')
    assert 'DATA.TRAIN_SPLITS' in error_line(*PROGRAM, '--data-path', sound, '--opts', 'DATA.TRAIN_SPLITS', 'x')
    path = sound / 'val' / '0.png' / 'faults.json'
    assert 'write another --output' in error_line(*PROGRAM, '--data-path', sound, '--json', path, *SPLITS)


@pytest.mark.parametrize(
    ('sections', 'kind', 'message'),
    [
        ({'annotations': []}, 'empty', 'has no objects to train on'),
        ({'images': [], 'annotations': []}, 'empty', 'has no valid images'),
        ({'categories': [], 'annotations': []}, 'empty', 'has no valid categories'),
        ({'annotations': None}, 'file', 'has no list "annotations"'),
    ],
)
def test_data_that_cannot_be_trained_on_are_one_fault(sound, sections, kind, message):
    update_tree(sound, 'train', **sections)
    files = {name: SplitFiles(sound / f'annotations/instances_{name}.json', sound / name) for name in ('train', 'val')}
    [fault] = check_dataset(files, upright=False, workers=0)[1]
    assert (fault.kind, fault.split) == (kind, 'train')
    assert message in fault.text


def test_entries_that_are_no_objects_are_left_out(sound):
    tree = read_tree(sound, 'train')
    update_tree(sound, 'train', annotations=[5, *tree['annotations'], None])
    kinds, texts = faults(sound, '--split', 'train')
    assert kinds == ['entry', 'entry']
    assert 'entry 0 of "annotations" is not an object: remove it' in texts


@pytest.mark.slow
def test_workers_find_the_same(sound):
    (sound / 'val' / '0.png').unlink()
    _, lines, _ = check(sound)
    done = start(*PROGRAM, '--data-path', sound, '--workers', '2', *SPLITS)
    assert (done.returncode, done.stdout.splitlines()) == (1, lines)
