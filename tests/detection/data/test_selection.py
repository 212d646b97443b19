"""Files anywhere, subsets of classes and images, empty images, annotation files without annotations."""

import json
import shutil

import pytest

import detection.main as program
from data import DataError
from detection.data import CocoDataset, build_eval_loader, build_loaders, with_classes_of_data
from detection.data.coco import Selection
from detection.evaluation import CocoEvaluation
from tests.helpers.coco_data import read_tree, rectangle, update_tree, wedge, write_tree
from tests.helpers.detectors import ONE_EPOCH, perfect_detections, tiny_detector
from tests.helpers.runs import folder_of, log_of, one_thread


def load(root, *options):
    return tiny_detector('DATA.DATA_PATH', str(root), *options)


def test_annotations_and_images_may_be_anywhere(coco):
    expected = [list(loader.dataset.sample_names()) for loader in build_eval_and_train(load(coco))]
    for split in ('train', 'val'):  # as Roboflow exports them
        shutil.move(coco / 'annotations' / f'instances_{split}.json', coco / split / '_annotations.coco.json')
    shutil.move(coco / 'val', coco / 'valid')
    options = ['DATA.TRAIN_ANNOTATIONS', 'train/_annotations.coco.json', 'DATA.TRAIN_IMAGES', 'train']
    options += ['DATA.VAL_ANNOTATIONS', str(coco / 'valid' / '_annotations.coco.json'), 'DATA.VAL_IMAGES', 'valid']
    assert [list(loader.dataset.sample_names()) for loader in build_eval_and_train(load(coco, *options))] == expected
    with pytest.raises(DataError, match='annotation file .*instances_val.json cannot be read'):
        build_eval_loader(load(coco, *options[:4]))


def build_eval_and_train(config):
    train, val = build_loaders(config)
    train.dataset.sample_names = train.dataset.dataset.sample_names
    return val, train


def test_classes_are_chosen_by_name(coco):
    annotations = [rectangle(4, 4, 10, 10) | {'image_id': 5}, wedge(8, 8, 12, 12) | {'image_id': 15}]
    update_tree(coco, annotations=annotations)
    dataset = CocoDataset(coco, 'val', selection=Selection(classes=['wedge']))
    assert dataset.classes == ['wedge']
    assert [dataset[i][1]['labels'].tolist() for i in range(4)] == [[], [1], [], []]
    assert [x['category_id'] for x in dataset.ground_truth['annotations']] == [7]
    training = CocoDataset(coco, 'val', is_train=True, selection=Selection(classes=['wedge']))
    assert [image['id'] for image in training.images] == [15]
    several = CocoDataset(coco, 'val', selection=Selection(classes=['rare', 'box']))
    assert several.classes == ['box', 'rare']  # the file's order
    with pytest.raises(DataError, match=r'DATA.CLASSES has wege, which is not a category of .*: did you mean wedge\?'):
        CocoDataset(coco, 'val', selection=Selection(classes=['wege']))


@pytest.mark.parametrize('limit', [1, 3, 4, 9])
def test_images_are_limited_to_a_fixed_choice(coco, limit):
    full, dataset = CocoDataset(coco, 'val'), CocoDataset(coco, 'val', selection=Selection(limit=limit))
    ids = [image['id'] for image in dataset.images]
    assert len(ids) == min(limit, 4)
    assert ids == sorted(set(ids))
    assert [x['id'] for x in CocoDataset(coco, 'val', selection=Selection(limit=limit)).images] == ids
    assert list(dataset.ground_truth['images']) == list(dataset.images)
    expected = [x for x in full.ground_truth['annotations'] if x['image_id'] in ids]
    assert list(dataset.ground_truth['annotations']) == expected
    assert bool(dataset.notes) == (limit < 4)
    evaluation = CocoEvaluation(CocoDataset(coco, 'val', with_masks=False, selection=Selection(limit=limit)))
    for i in range(len(dataset)):
        _, target = dataset[i]
        detections = perfect_detections(target)
        evaluation.update([target], [{key: detections[key] for key in ('boxes', 'labels', 'scores')}])
    assert evaluation.finish()['box_AP'] == pytest.approx(100)  # other images are not missed


def test_images_without_objects_are_trained_on_if_asked(coco):
    update_tree(coco, 'train', annotations=[rectangle(4, 4, 10, 10) | {'image_id': 15}])
    dataset = CocoDataset(coco, 'train', is_train=True, selection=Selection(empty_images=True))
    assert len(dataset) == 6
    assert dataset.notes == [
        '5 images without objects are trained on as background',
        '2 of 3 categories have no object to train on: wedge, rare',
    ]
    config = load(coco, 'DATA.EMPTY_IMAGES', 'True', *ONE_EPOCH, 'OUTPUT', str(coco / 'out'))
    with one_thread():
        program.main(config)
    assert (folder_of(config) / 'ckpt_epoch_0.pth').exists()


def test_the_number_of_classes_is_that_of_the_data(coco, tmp_path):
    config = with_classes_of_data(load(coco, 'MODEL.NUM_CLASSES', 'None'))
    assert config.MODEL.NUM_CLASSES == 3
    assert config.is_frozen()
    chosen = load(coco, 'MODEL.NUM_CLASSES', 'None', 'DATA.CLASSES', "['wedge','box']")
    assert with_classes_of_data(chosen).MODEL.NUM_CLASSES == 2
    unchanged = load(coco)
    assert with_classes_of_data(unchanged) is unchanged
    run = load(coco, 'MODEL.NUM_CLASSES', 'None', *ONE_EPOCH, 'OUTPUT', str(tmp_path / 'out'))
    with one_thread():
        program.main(run)
    assert 'NUM_CLASSES: 3' in (folder_of(run) / 'config.yaml').read_text()


def test_a_file_without_annotations_predicts(coco, tmp_path):
    options = ['OUTPUT', str(tmp_path / 'out'), *ONE_EPOCH, 'MODEL.BOX.SCORE', '0.0']
    config = load(coco, *options)
    with one_thread():
        program.main(config)
    tree = read_tree(coco, 'val')
    write_tree(coco, 'test', {key: tree[key] for key in ('images', 'categories')})
    (coco / 'annotations' / 'instances_test.json').rename(coco / 'annotations' / 'image_info_test.json')
    options += ['DATA.VAL_ANNOTATIONS', 'annotations/image_info_test.json', 'DATA.VAL_IMAGES', 'val']
    last = str(folder_of(config) / 'ckpt_epoch_0.pth')
    evaluated = load(coco, *options, 'EVAL_MODE', 'True', 'MODEL.RESUME', last)
    with one_thread():
        program.main(evaluated)
    results = json.loads((folder_of(config) / 'results.json').read_text())
    assert {x['image_id'] for x in results} <= {image['id'] for image in tree['images']}
    assert f'{len(results)} detections; without annotations, there is nothing to compare' in log_of(config)
    with pytest.raises(DataError, match='image_info_test.json has no annotations to evaluate with: it is for --eval'):
        program.main(load(coco, *options, 'TAG', 'other'))
