"""Detectors of boxes alone, and data where some or all objects have no mask."""

import json

import pytest
import torch

import detection.main as program
from data import DataError
from detection.data import CocoDataset
from detection.evaluation import CocoEvaluation
from detection.models import build_detector
from engine.checkpoint import CheckpointError
from engine.weights import load_weights
from tests.helpers.coco_data import read_tree, update_tree
from tests.helpers.detectors import NO_DROP_PATH, box_masks, ground_truth, perfect_detections, tiny_detector
from tests.helpers.processes import run_here
from tests.helpers.runs import folder_of, log_of, one_thread, records
from tools.summary.complexity import count_detector

BOXES = ('MODEL.MASK.ENABLED', 'False')


def remove_masks(root, split, every=1):
    """Remove every so manieth mask, each in one of the ways that files of other programs have."""
    annotations = read_tree(root, split)['annotations']
    for number, annotation in enumerate(annotations[::every]):
        annotation |= [{'segmentation': []}, {'segmentation': None}, {'segmentation': {}}][number % 3]
        if number % 4 == 3:
            del annotation['segmentation']
    update_tree(root, split, annotations=annotations)
    return len(annotations)


def test_a_detector_of_boxes_has_nothing_of_masks():
    config, full = tiny_detector(*BOXES, *NO_DROP_PATH), tiny_detector(*NO_DROP_PATH)
    detector, names = build_detector(config), build_detector(full).state_dict().keys()
    assert detector.state_dict().keys() == {name for name in names if 'mask' not in name}
    target = ground_truth((8, 8, 40, 50))
    del target['masks']
    losses = detector.train()([torch.rand(3, 64, 64)], [target])
    assert len(losses) == 2 + 2 * 3
    assert not any('mask' in name for name in losses)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in detector.parameters())
    detector.roi_heads.min_score = 0.0
    [detections] = detector.eval()([torch.rand(3, 64, 64)])
    assert list(detections) == ['boxes', 'labels', 'scores']
    assert len(detections['boxes']) > 0
    with_masks, without = (count_detector(x, 64, 64).measured for x in (full, config))
    assert with_masks - without == with_masks - count_detector(full, 64, 64, detections=0).measured > 0


def test_boxes_are_those_of_the_detector_with_masks():
    torch.manual_seed(0)
    full, boxes = build_detector(tiny_detector()).eval(), build_detector(tiny_detector(*BOXES)).eval()
    weights, notes = boxes.fit_state_dict(full.state_dict())
    boxes.load_state_dict(weights)
    assert notes == ['its mask heads are left out']
    full.roi_heads.min_score = boxes.roi_heads.min_score = 0.0
    images = [torch.rand(3, 50, 70)]
    for key, value in boxes(images)[0].items():
        assert torch.equal(value, full(images)[0][key])


def test_a_run_without_any_mask(tmp_path, coco):
    for split in ('train', 'val'):
        remove_masks(coco, split)
    options = ['OUTPUT', str(tmp_path / 'out'), 'DATA.DATA_PATH', str(coco), 'MODEL.BOX.SCORE', '0.0']
    config = tiny_detector(*options, *BOXES)
    with one_thread():
        program.main(config)
    epoch = records(config, 'epoch')[-1]
    assert 'box_AP' in epoch
    assert not any('mask' in name for name in (*epoch, *records(config, 'train')[0]))
    last = folder_of(config) / 'ckpt_epoch_1.pth'
    program.main(tiny_detector(*options, *BOXES, 'EVAL_MODE', 'True', 'MODEL.RESUME', str(last), 'SHOW', '2'))
    results = json.loads((folder_of(config) / 'results.json').read_text())
    assert results[0].keys() == {'image_id', 'category_id', 'bbox', 'score'}
    assert len(list((folder_of(config) / 'show').iterdir())) == 2
    done = run_here(
        '-m', 'detection.tools.predict', coco / 'val', '--resume', last, '--output', tmp_path / 'd', '--score', '0'
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / 'd').iterdir())) == 4
    with pytest.raises(DataError, match='no annotation has a mask: write --opts MODEL.MASK.ENABLED False for boxes'):
        program.main(tiny_detector(*options, 'TAG', 'masks'))


def test_objects_without_mask_train_boxes_alone(tmp_path, coco):
    count = remove_masks(coco, 'train', every=2)
    dataset = CocoDataset(coco, 'train', is_train=True)
    missing = -(-count // 2)
    assert f'{missing} of {count} annotations have no mask, and count for boxes only' in dataset.notes
    targets = [dataset[i][1] for i in range(len(dataset))]
    assert sum(int((~target['has_mask']).sum()) for target in targets) == missing
    for target in targets:
        assert target['masks'].flatten(1).any(dim=1).tolist() == target['has_mask'].tolist()
    config = tiny_detector('OUTPUT', str(tmp_path / 'out'), 'DATA.DATA_PATH', str(coco))
    with one_thread():
        program.main(config)
    assert f'train: {missing} of {count} annotations have no mask' in log_of(config)
    assert 'mask_AP' in records(config, 'epoch')[-1]


def test_the_mask_loss_is_that_of_objects_with_masks():
    detector = build_detector(tiny_detector(*NO_DROP_PATH)).train()
    image = torch.rand(3, 64, 64)

    def losses(target):
        torch.manual_seed(1)
        return detector([image], [target])

    both = ground_truth((4, 4, 30, 30), (34, 34, 60, 60))
    expected = losses(both)
    assert losses(both | {'has_mask': torch.tensor([True, True])}) == expected
    other = both | {'masks': both['masks'].clone()}
    other['masks'][1] = 0  # what it holds must not matter
    partly = {'has_mask': torch.tensor([True, False])}
    changed, unchanged = losses(other | partly), losses(both | partly)
    assert changed == unchanged
    assert changed['loss_mask_0'] != expected['loss_mask_0']
    assert {k: x for k, x in changed.items() if 'mask' not in k} == {
        k: x for k, x in expected.items() if 'mask' not in k
    }
    none = losses(both | {'has_mask': torch.tensor([False, False])})
    assert none['loss_mask_0'] == 0
    sum(none.values()).backward()
    assert all(p.grad is not None for p in detector.parameters())


def test_objects_without_mask_do_not_count_for_masks(coco):
    full = CocoDataset(coco, 'val')
    perfect = [perfect_detections(full[i][1]) for i in range(len(full))]
    remove_masks(coco, 'val', every=3)
    dataset, metrics = CocoDataset(coco, 'val'), []
    for detect_all in (True, False):
        evaluation = CocoEvaluation(dataset)
        for i, detections in enumerate(perfect):
            target = dataset[i][1]
            kept = target['has_mask'] | detect_all
            detections = {key: x[kept] for key, x in detections.items()}
            evaluation.update([target], [detections | {'masks': box_masks(detections['masks'])}])
        metrics.append(evaluation.finish())
    found, missed = metrics
    assert (found['box_AP'], found['mask_AP'], missed['mask_AP']) == pytest.approx((100, 100, 100))
    assert missed['box_AP'] < 90


def test_masks_are_not_made_up_for_weights_of_boxes():
    detector = build_detector(tiny_detector())
    weights = build_detector(tiny_detector(*BOXES)).state_dict()
    weights, _ = detector.fit_state_dict(weights)
    with pytest.raises(CheckpointError, match='missing: roi_heads.mask_heads'):
        load_weights(detector, {'model': weights}, 'boxes.pth')
