"""Round trips through other programs' formats: written here, converted, read by the dataset."""

import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from data import DataError
from detection.data import CocoDataset
from detection.tools.convert_dataset.__main__ import convert, new_folder
from detection.tools.convert_dataset.formats import READERS, detect_format, read_roboflow, read_voc, read_yolo
from tests.helpers.coco_data import read_tree, write_coco
from tests.helpers.images import set_orientation
from tests.helpers.processes import error_line, run_here

PROGRAM = ['-m', 'detection.tools.convert_dataset']


def coco_splits(root):
    """Split, annotation tree, and objects by image id."""
    for split in ('train', 'val'):
        tree = read_tree(root, split)
        objects = {image['id']: [] for image in tree['images']}
        for annotation in tree['annotations']:
            objects[annotation['image_id']].append(annotation)
        yield split, tree, objects


def as_roboflow(root, target):
    for split, tree, _ in coco_splits(root):
        folder = target / {'val': 'valid'}.get(split, split)
        shutil.copytree(root / split, folder)
        dummy = {'id': 0, 'name': 'shapes', 'supercategory': 'none'}
        categories = [dummy, *(x | {'supercategory': 'shapes'} for x in tree['categories'])]
        tree |= {'categories': categories, 'info': {'year': '2024'}, 'licenses': []}
        (folder / '_annotations.coco.json').write_text(json.dumps(tree))
    return target


def as_yolo(root, target, polygons=False, nested=True):
    for split, tree, objects in coco_splits(root):
        order = [x['id'] for x in tree['categories']]
        images = target / ('images' if nested else split) / (split if nested else 'images')
        labels = target / ('labels' if nested else split) / (split if nested else 'labels')
        shutil.copytree(root / split, images)
        labels.mkdir(parents=True)
        for image in tree['images']:
            width, height, lines = image['width'], image['height'], []
            for x in objects[image['id']]:
                left, top, w, h = x['bbox']
                numbers = [(left + w / 2) / width, (top + h / 2) / height, w / width, h / height]
                if polygons and isinstance(x['segmentation'], list):
                    numbers = [value / (height if i % 2 else width) for i, value in enumerate(x['segmentation'][0])]
                lines.append(' '.join([str(order.index(x['category_id'])), *(f'{value:.6f}' for value in numbers)]))
            if lines:  # an image without objects has no file
                (labels / image['file_name']).with_suffix('.txt').write_text('\n'.join(lines) + '\n')
    names = [x['name'] for x in tree['categories']]
    content = {'path': str(target), 'train': 'images/train', 'val': 'images/val', 'names': dict(enumerate(names))}
    if not nested:  # Roboflow's way
        content = {'train': '../train/images', 'val': '../val/images', 'nc': len(names), 'names': names}
    (target / 'data.yaml').write_text(yaml.safe_dump(content))
    return target


def as_voc(root, target, lists=True):
    for split, tree, objects in coco_splits(root):
        names = {x['id']: x['name'] for x in tree['categories']}
        stems = []
        for image in tree['images']:
            stem = f'{split}_{image["file_name"]}'.removesuffix('.png')
            folder = target / 'JPEGImages' if lists else target / split
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / split / image['file_name'], folder / f'{stem}.png')
            element = ElementTree.Element('annotation')
            ElementTree.SubElement(element, 'filename').text = f'{stem}.png'
            for x in objects[image['id']]:
                entry = ElementTree.SubElement(element, 'object')
                ElementTree.SubElement(entry, 'name').text = names[x['category_id']]
                box = ElementTree.SubElement(entry, 'bndbox')
                left, top, w, h = x['bbox']
                corners = {'xmin': left + 1, 'ymin': top + 1, 'xmax': left + w, 'ymax': top + h}
                for key, value in corners.items():
                    ElementTree.SubElement(box, key).text = str(round(value))
            path = (target / 'Annotations' if lists else target / split) / f'{stem}.xml'
            path.parent.mkdir(parents=True, exist_ok=True)
            ElementTree.ElementTree(element).write(path)
            stems.append(stem)
        if lists:
            (target / 'ImageSets' / 'Main').mkdir(parents=True, exist_ok=True)
            (target / 'ImageSets' / 'Main' / f'{split}.txt').write_text('\n'.join(stems) + '\n')
    return target


WRITERS = {
    'roboflow': as_roboflow,
    'yolo': as_yolo,
    'yolo-roboflow': lambda root, target: as_yolo(root, target, nested=False),
    'voc': as_voc,
    'voc-beside': lambda root, target: as_voc(root, target, lists=False),
}


@pytest.fixture(scope='module')
def original(tmp_path_factory):
    root = write_coco(tmp_path_factory.mktemp('coco') / 'coco', train=7, val=5)
    tree = read_tree(root, 'val')
    first = tree['images'][0]['id']  # an image without objects
    annotations = [x for x in tree['annotations'] if x['image_id'] != first]
    (root / 'annotations' / 'instances_val.json').write_text(json.dumps(tree | {'annotations': annotations}))
    return root


@pytest.mark.parametrize('name', WRITERS)
def test_boxes_classes_and_images_are_the_same_after_a_round_trip(original, tmp_path, name):
    folder = WRITERS[name](original, tmp_path / 'source')
    kind = name.partition('-')[0]
    assert detect_format(folder) == kind
    done = run_here(*PROGRAM, folder, '--output', tmp_path / 'out')
    assert done.returncode == 0, done.stderr
    for split in ('train', 'val'):
        expected = CocoDataset(original, split, with_masks=False)
        dataset = CocoDataset(tmp_path / 'out', split, with_masks=False)
        images = {entry['file_name'].removeprefix(f'{split}_'): i for i, entry in enumerate(dataset.images)}
        assert len(images) == len(expected)
        for i, entry in enumerate(expected.images):
            (image, target), (other, theirs) = expected[i], dataset[images[entry['file_name']]]
            assert torch.equal(image, other)
            torch.testing.assert_close(theirs['boxes'], target['boxes'], atol=0.5, rtol=0)
            assert names_of(dataset, theirs) == names_of(expected, target)
    assert cv2.imread(str(tmp_path / 'out' / 'samples.png')) is not None
    used = {x['category_id'] for _, tree, _ in coco_splits(original) for x in tree['annotations']}
    classes = len(used) if kind == 'voc' else 3
    assert f'--opts MODEL.NUM_CLASSES {classes} DATA.TRAIN_SPLIT train DATA.VAL_SPLIT val' in done.stdout
    assert ('MODEL.MASK.ENABLED False' in done.stdout) == (kind != 'roboflow')


def names_of(dataset, target):
    return [dataset.classes[label - 1] for label in target['labels']]


@pytest.mark.parametrize('name', ['roboflow', 'polygons'])
def test_masks_are_the_same_after_a_round_trip(original, tmp_path, name):
    folder = as_roboflow(original, tmp_path / 'in') if name == 'roboflow' else as_yolo(original, tmp_path / 'in', True)
    convert(READERS[detect_format(folder)](folder), tmp_path / 'out')
    expected, dataset = CocoDataset(original, 'train'), CocoDataset(tmp_path / 'out', 'train')
    for i in range(len(expected)):
        (_, target), (_, theirs) = expected[i], dataset[i]
        for mask, other, has in zip(target['masks'], theirs['masks'], theirs['has_mask'], strict=True):
            if has:  # YOLO's polygons; run lengths became boxes
                difference = (mask != other).sum().item()
                assert difference <= 0.02 * mask.sum().item() + 1


def test_the_written_data_train_without_other_settings(original, tmp_path):
    convert(read_yolo(as_yolo(original, tmp_path / 'in')), tmp_path / 'out')
    tree = read_tree(tmp_path / 'out', 'train')
    assert [x['id'] for x in tree['categories']] == [1, 2, 3]
    assert [x['name'] for x in tree['categories']] == ['box', 'wedge', 'rare']
    assert all(x['iscrowd'] == 0 and x['category_id'] in (1, 2, 3) for x in tree['annotations'])


def test_a_single_split_is_divided(original, tmp_path):
    folder = as_voc(original, tmp_path / 'in')
    shutil.rmtree(folder / 'ImageSets')
    source = read_voc(folder)
    assert list(source.splits) == ['train']
    assert convert(source, tmp_path / 'out', val_fraction=0.25) == {'train': 9, 'val': 3}
    names = [{x['file_name'] for x in read_tree(tmp_path / 'out', split)['images']} for split in ('train', 'val')]
    assert not names[0] & names[1]
    assert convert(read_voc(folder), tmp_path / 'again', val_fraction=0.25) == {'train': 9, 'val': 3}
    assert read_tree(tmp_path / 'again', 'val') == read_tree(tmp_path / 'out', 'val')


def test_difficult_objects_do_not_count(original, tmp_path):
    folder = as_voc(original, tmp_path / 'in')
    path = sorted((folder / 'Annotations').glob('train_*.xml'))[0]
    path.write_text(path.read_text().replace('</name>', '</name><difficult>1</difficult>', 1))
    crowds = [
        x for items in read_voc(folder).splits.values() for item in items for x in item.objects if x.get('iscrowd')
    ]
    assert len(crowds) == 1
    convert(read_voc(folder), tmp_path / 'out')
    dataset = CocoDataset(tmp_path / 'out', 'train', is_train=True, with_masks=False)
    assert any('1 crowd regions left out' in note for note in dataset.notes)


def test_relative_boxes_are_of_the_upright_image(tmp_path):
    images = tmp_path / 'train' / 'images'
    images.mkdir(parents=True)
    Image.fromarray(np.zeros((40, 80, 3), np.uint8)).save(images / 'a.jpg')
    set_orientation(images / 'a.jpg', 6)
    (tmp_path / 'train' / 'labels').mkdir()
    (tmp_path / 'train' / 'labels' / 'a.txt').write_text('0 0.5 0.5 0.5 0.25\n')
    (tmp_path / 'data.yaml').write_text('train: train/images\nnames: [thing]\n')
    (item,) = read_yolo(tmp_path).splits['train']
    assert item.size == (40, 80)
    assert item.objects[0]['bbox'] == [10, 30, 20, 20]


def test_images_are_copied_or_linked(original, tmp_path):
    folder = as_roboflow(original, tmp_path / 'in')
    convert(read_roboflow(folder), tmp_path / 'copies')
    convert(read_roboflow(folder), tmp_path / 'links', links=True)
    for name, is_link in (('copies', False), ('links', True)):
        path = tmp_path / name / 'train' / '0.png'
        assert path.is_symlink() == is_link
        assert path.read_bytes() == (folder / 'train' / '0.png').read_bytes()


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda f: (f / 'data.yaml').write_text('train: images/train\n'), 'data.yaml has no names of the classes'),
        (lambda f: (f / 'data.yaml').write_text('names: [a]\ntrain: none\n'), 'train is none, which does not exist in'),
        (lambda f: (f / 'data.yaml').write_text('names: [a'), 'data.yaml is not YAML'),
        (lambda f: (f / 'data.yaml').write_text('names: cat\n'), 'data.yaml has no names of the classes'),
        (lambda f: (f / 'data.yaml').write_text('names: {0: cat, x: dog}\n'), 'data.yaml has no names of the classes'),
        (lambda f: (f / 'data.yaml').write_text('names: [a, b, a]\n'), 'data.yaml has two classes of one name'),
        (lambda f: label(f).write_bytes(b'\xff'), 'is not text in UTF-8'),
        (lambda f: (f / 'data.yaml').write_text('names: [a]\n'), 'data.yaml has no train'),
        (lambda f: (f / 'data.yaml').unlink(), 'is of no known format'),
        (lambda f: label(f).write_text('0 0.5 0.5\n'), "line 1 is '0 0.5 0.5': write a class and a box, or corners"),
        (lambda f: label(f).write_text('0 20 30 40 50\n'), 'between 0 and 1'),
        (lambda f: label(f).write_text('\nbox 0.5 0.5 0.1 0.1\n'), 'line 2 is .*: write a class and numbers'),
        (lambda f: label(f).write_text('3 0.5 0.5 0.1 0.1\n'), 'has class 3, which names does not have'),
        (lambda f: image(f).write_bytes(b'no image'), '0.png cannot be read'),
    ],
)
def test_what_is_wrong_is_named_in_a_line_and_nothing_is_left(original, tmp_path, change, message):
    folder = as_yolo(original, tmp_path / 'in')
    change(folder)
    line = error_line(*PROGRAM, folder, '--output', tmp_path / 'out')
    assert line.startswith('error: ')
    assert re.search(message, line), line
    assert not (tmp_path / 'out').exists()


def label(folder):
    return folder / 'labels' / 'train' / '0.txt'


def image(folder):
    return folder / 'images' / 'train' / '0.png'


def test_other_mistakes(original, tmp_path):
    folder = as_roboflow(original, tmp_path / 'in')
    (tmp_path / 'out').mkdir()
    assert 'exists: write another --output' in error_line(*PROGRAM, folder, '--output', tmp_path / 'out')
    assert 'nowhere does not exist' in error_line(*PROGRAM, tmp_path / 'nowhere', '--output', tmp_path / 'new')
    path = folder / 'train' / '_annotations.coco.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'images': [{'id': 3}]}))
    assert 'is of image 5, which the file does not have: add it' in error_line(
        *PROGRAM, folder, '--output', tmp_path / 'new'
    )
    with pytest.raises(DataError, match='has no train/_annotations.coco.json'):
        read_roboflow(tmp_path)
    voc = as_voc(original, tmp_path / 'voc')
    xml = next((voc / 'Annotations').glob('*.xml'))
    xml.write_text('<annotation>')
    with pytest.raises(DataError, match='is not XML'):
        read_voc(voc)
    shutil.rmtree(voc / 'ImageSets')
    xml = xml.rename(xml.with_name('other.xml'))
    xml.write_text('<annotation><filename>none.png</filename></annotation>')
    with pytest.raises(DataError, match='image none.png is neither in'):
        read_voc(voc)


def test_numbers_of_yolo_classes_are_kept(original, tmp_path):
    folder = as_yolo(original, tmp_path / 'in')
    content = yaml.safe_load((folder / 'data.yaml').read_text())
    for text in folder.rglob('labels/**/*.txt'):  # the classes count from 10
        lines = [line.split(maxsplit=1) for line in text.read_text().splitlines()]
        text.write_text('\n'.join(f'{int(number) + 10} {box}' for number, box in lines))
    names = {str(i + 10): name for i, name in enumerate(content['names'].values())}
    (folder / 'data.yaml').write_text(yaml.safe_dump(content | {'names': names}))
    source, plain = read_yolo(folder), read_yolo(as_yolo(original, tmp_path / 'plain'))
    assert source.categories == plain.categories
    for split, items in plain.splits.items():
        assert [item.objects for item in source.splits[split]] == [item.objects for item in items]


def test_splits_may_lack_training_images_or_masks(original, tmp_path):
    folder = as_roboflow(original, tmp_path / 'in')
    shutil.rmtree(folder / 'train')
    done = run_here(*PROGRAM, folder, '--output', tmp_path / 'val')
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / 'val').iterdir()) == ['annotations', 'samples.png', 'val']

    folder = as_roboflow(original, tmp_path / 'two')
    path = folder / 'valid' / '_annotations.coco.json'
    tree = json.loads(path.read_text())
    for annotation in tree['annotations']:
        del annotation['segmentation']
    path.write_text(json.dumps(tree))
    done = run_here(*PROGRAM, folder, '--output', tmp_path / 'out')
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith('MODEL.MASK.ENABLED False')


def test_categories_without_objects_stay_unless_roboflow_added_them(original, tmp_path):
    folder = as_roboflow(original, tmp_path / 'in')
    names = read_roboflow(folder).categories
    for path in folder.rglob('*.json'):
        tree = json.loads(path.read_text())
        tree['categories'] += [{'id': 1000, 'name': 'unused', 'supercategory': 'unused'}]
        path.write_text(json.dumps(tree))
    assert read_roboflow(folder).categories == [*names, 'unused']


def test_what_another_process_has_made_meanwhile_stays(tmp_path):
    output = tmp_path / 'out'
    context = new_folder(output)
    (context.__enter__() / 'mine').write_text('')
    output.mkdir()
    (output / 'theirs').write_text('')
    with pytest.raises(DataError, match='exists by now'):
        context.__exit__(None, None, None)
    assert [path.relative_to(tmp_path) for path in sorted(tmp_path.rglob('*'))] == [Path('out'), Path('out/theirs')]
