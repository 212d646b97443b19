"""Two hundred small random datasets through reading, a training step and evaluation; seeds 0 to 199."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from detection.data import build_loaders
from detection.evaluation import CocoEvaluation
from detection.models import build_detector
from tests.helpers.detectors import tiny_detector
from tests.helpers.runs import one_thread

DATASETS, GROUPS = 200, 10


def random_segmentation(rng, box, width, height):
    """A mask within a box, in one of the ways that files have; or none."""
    x, y, w, h = box
    kind = rng.integers(5)
    if kind == 0:
        return {} if rng.random() < 0.5 else {'segmentation': []}
    if kind in (1, 2):
        corners = [x, y, x + w, y, x + w, y + h, x, y + h]
        polygons = [corners] if kind == 1 else [corners, [x, y, x + w / 2, y, x, y + h / 2]]
        return {'segmentation': polygons}
    mask = np.zeros((height, width), dtype=np.uint8, order='F')
    x1, y1, x2, y2 = int(x), int(y), int(np.ceil(x + w)), int(np.ceil(y + h))
    mask[y1:y2, x1:x2] = rng.random((y2 - y1, x2 - x1)) < 0.9
    mask[[y1, min(y2, height) - 1], x1 : min(x2, width)] = 1
    mask[y1:y2, [x1, min(x2, width) - 1]] = 1
    rle = coco_mask.encode(mask)
    if kind == 3:
        return {'segmentation': {'size': rle['size'], 'counts': rle['counts'].decode()}}
    runs = np.flatnonzero(np.diff(np.concatenate(([0], mask.flatten(order='F'), [2]))) != 0)
    counts = np.diff(np.concatenate(([0], runs))).tolist()
    return {'segmentation': {'size': [height, width], 'counts': counts}}


def write_random_coco(root, rng):
    """Images of 1 to 90 pixels, empty ones, crowds, tiny and large objects, ids with gaps, categories of nothing."""
    (root / 'annotations').mkdir(parents=True)
    ids = (1 + np.cumsum(rng.integers(1, 50, 3))).tolist()
    categories = [{'id': i, 'name': name} for i, name in zip(ids, ('a', 'b b', 'ç'), strict=True)]
    used = ids[: rng.integers(1, 4)]
    for split in ('train', 'val'):
        (root / split).mkdir()
        tree = {'images': [], 'annotations': [], 'categories': categories}
        numbers = np.cumsum(rng.integers(1, 9, rng.integers(2, 6))).tolist()
        for number in numbers:
            width, height = (int(side) for side in rng.integers(1, 91, 2))
            mode = rng.choice(['RGB', 'L'])
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(root / split / f'{number} ü.png')
            tree['images'].append({'id': number, 'file_name': f'{number} ü.png', 'width': width, 'height': height})
            for _ in range(rng.integers(0, 5)):
                w, h = (float(rng.uniform(0.3, 1) ** 3 * side) for side in (width, height))
                box = [float(rng.uniform(0, width - w)), float(rng.uniform(0, height - h)), w, h]
                annotation = {'image_id': number, 'category_id': int(rng.choice(used)), 'bbox': box}
                annotation |= random_segmentation(rng, box, width, height)
                is_crowd = 'segmentation' in annotation and rng.random() < 0.15
                tree['annotations'].append(annotation | ({'iscrowd': 1} if is_crowd else {}))
        side = (30, 40)
        Image.fromarray(rng.integers(0, 256, (*side, 3), dtype=np.uint8)).save(root / split / 'last.png')
        tree['images'].append({'id': 999, 'file_name': 'last.png', 'width': side[1], 'height': side[0]})
        for _ in range(2):  # one object to train on, with a mask
            tree['annotations'].append({'image_id': 999, 'category_id': used[0], 'bbox': [3, 4, 20, 12]})
            tree['annotations'][-1]['segmentation'] = [[3, 4, 23, 4, 23, 16, 3, 16]]
        if rng.random() < 0.5:
            for number, annotation in enumerate(tree['annotations']):
                annotation['id'] = 7 * number
        (root / 'annotations' / f'instances_{split}.json').write_text(json.dumps(tree))
    return root


@pytest.mark.slow
@pytest.mark.parametrize('group', range(GROUPS))
def test_random_data_are_read_trained_on_and_evaluated(tmp_path, group):
    for seed in range(group * DATASETS // GROUPS, (group + 1) * DATASETS // GROUPS):
        check(tmp_path / str(seed), seed)


def test_three_of_them(tmp_path):
    for seed in (1, 77, 150):
        check(tmp_path / str(seed), seed)


def check(root, seed):
    rng = np.random.default_rng(seed)
    write_random_coco(root, rng)
    options = ['DATA.DATA_PATH', str(root), 'DATA.BATCH_SIZE', '1', 'MODEL.BOX.SCORE', '0.0', 'SEED', str(seed)]
    options += ['MODEL.MASK.ENABLED', str(seed % 4 != 0), 'DATA.EMPTY_IMAGES', str(seed % 3 == 0)]
    options += ['MODEL.BOX.DETECTIONS', '5']
    config = tiny_detector(*options)
    torch.manual_seed(seed)
    train_loader, eval_loader = build_loaders(config)
    with one_thread():
        detector = build_detector(config).train()
        train_loader.sampler.set_epoch(0)
        for number, (images, targets) in enumerate(train_loader):
            losses = detector(images, targets)
            assert all(loss.isfinite() for loss in losses.values()), (seed, losses)
            sum(losses.values()).backward()
            if number == 1:
                break
        evaluation = CocoEvaluation(eval_loader.dataset)
        with torch.inference_mode():
            for images, targets in eval_loader:
                evaluation.update(targets, detector.eval().detect(images))
        metrics = evaluation.finish()
    kinds = ('box', 'mask') if config.MODEL.MASK.ENABLED else ('box',)
    for kind in kinds:
        assert 0 <= metrics[f'{kind}_AP'] <= 100, (seed, metrics)
