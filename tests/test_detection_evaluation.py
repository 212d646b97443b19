"""COCO's table: pycocotools' own figures, for results that are right, wrong or none, on any number of processes."""

import json
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from config_tree import ConfigError
from data.samplers import ShardSampler
from detection.data import CocoDataset
from detection.draw import color_of, draw_detections
from detection.evaluation import CocoEvaluation
from tests.helpers.coco import crowd, read_tree, rectangle, write_coco, write_tree

NAMES = ('AP', 'AP50', 'AP75', 'APs', 'APm', 'APl')


@pytest.fixture
def coco(tmp_path):
    return write_coco(tmp_path / 'coco', val=7)


def truth_of(target):
    """What a detector that is always right would say."""
    return {
        'boxes': target['boxes'],
        'labels': target['labels'],
        'scores': torch.full((len(target['labels']),), 0.9),
        'masks': target['masks'][:, None].float(),
    }


def guess_of(target):
    """Boxes and masks that are off by some pixels, with scores; some are missing and some are invented."""
    generator = torch.Generator().manual_seed(target['image_id'])
    truth = truth_of(target)
    boxes = truth['boxes'].repeat(3, 1)
    boxes += torch.randn(boxes.shape, generator=generator)
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    masks = truth['masks'].repeat(3, 1, 1, 1)
    shifts = torch.randint(-2, 3, (len(masks), 2), generator=generator).tolist()
    masks = torch.stack([mask.roll(shift, (1, 2)) for mask, shift in zip(masks, shifts, strict=True)])
    labels = truth['labels'].repeat(3)
    labels[::5] = 3
    scores = torch.rand(len(labels), generator=generator)
    kept = scores > 0.2
    return {'boxes': boxes[kept], 'labels': labels[kept], 'scores': scores[kept], 'masks': masks[kept]}


def evaluate(dataset, indices, detect):
    evaluation = CocoEvaluation(dataset)
    for index in indices:
        _, target = dataset[index]
        evaluation.update([target], [detect(target)])
    return evaluation, evaluation.finish()


def test_the_truth_gets_an_ap_of_1(coco):
    dataset = CocoDataset(coco, 'val')
    evaluation, figures = evaluate(dataset, range(len(dataset)), truth_of)
    assert list(figures) == [f'{kind}_{name}' for kind in ('box', 'mask') for name in NAMES]
    for kind in ('box', 'mask'):
        for name in ('AP', 'AP50', 'AP75', 'APs'):
            assert figures[f'{kind}_{name}'] == pytest.approx(100)
        assert math.isnan(figures[f'{kind}_APl'])  # no object is large
    lines = evaluation.table().splitlines()
    assert lines[0] == '| COCO, % | AP | AP50 | AP75 | APs | APm | APl |'
    assert lines[2:] == [f'| {kind} | 100.00 | 100.00 | 100.00 | 100.00 | nan | nan |' for kind in ('box', 'mask')]


def by_pycocotools(coco, results, kind):
    """What a program that knows nothing of ours says."""
    tree = read_tree(coco, 'val') | {'info': {}}
    truth = COCO()
    truth.dataset = tree
    for number, annotation in enumerate(tree['annotations'], start=1):
        annotation |= {'id': number, 'iscrowd': annotation.get('iscrowd', 0)}
    truth.createIndex()
    for annotation in tree['annotations']:
        annotation['area'] = int(truth.annToMask(annotation).sum())
    kept = [{key: value for key, value in each.items() if kind == 'bbox' or key != 'bbox'} for each in results]
    evaluation = COCOeval(truth, truth.loadRes(kept), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats[:6]


def test_the_table_is_that_of_pycocotools_on_the_results(coco, tmp_path):
    tree = read_tree(coco, 'val')
    tree['annotations'].append(crowd(64, 48, rows=10) | {'image_id': 5})
    write_tree(coco, 'val', tree)
    dataset = CocoDataset(coco, 'val')
    evaluation, figures = evaluate(dataset, range(len(dataset)), guess_of)
    evaluation.write(tmp_path / 'results.json')
    results = json.loads((tmp_path / 'results.json').read_text())
    assert {result['category_id'] for result in results} <= {3, 7, 90}
    for kind, name in (('box', 'bbox'), ('mask', 'segm')):
        theirs = by_pycocotools(coco, results, name)
        assert 0.05 < theirs[0] < 0.95
        ours = [figures[f'{kind}_{figure}'] for figure in NAMES]
        np.testing.assert_allclose(ours, [100 * value if value >= 0 else np.nan for value in theirs], rtol=0)
        row = f'| {kind} | ' + ' | '.join(f'{value:.2f}' for value in ours) + ' |'
        assert row in evaluation.table().splitlines()


def none_of(target):
    empty = torch.zeros(0)
    height, width = target['masks'].shape[1:]
    return {
        'boxes': torch.zeros(0, 4),
        'labels': empty.long(),
        'scores': empty,
        'masks': torch.zeros(0, 1, height, width),
    }


def test_no_detections_are_an_ap_of_0_and_no_objects_are_no_ap(coco):
    _, figures = evaluate(CocoDataset(coco, 'val'), range(7), none_of)
    assert (figures['box_AP'], figures['mask_AP50']) == (0, 0)
    write_tree(coco, 'val', read_tree(coco, 'val') | {'annotations': []})
    _, figures = evaluate(CocoDataset(coco, 'val'), range(7), none_of)
    assert all(math.isnan(value) for value in figures.values())


def test_an_image_seen_twice_counts_once(coco):
    dataset = CocoDataset(coco, 'val')
    _, once = evaluate(dataset, range(7), guess_of)
    _, twice = evaluate(dataset, [*range(7), 0, 3], guess_of)
    np.testing.assert_equal(once, twice)


def test_a_crowd_excuses_what_is_found_in_it(coco):
    """Without the region, the invented box would rank above the true ones and halve their precision."""
    tree = read_tree(coco, 'val')
    images = [image for image in tree['images'] if image['id'] == 5]  # 64 x 48
    tree |= {'images': images, 'annotations': [rectangle(30, 20, 16, 12) | {'image_id': 5}]}

    def invent(target):
        truth = truth_of(target)
        mask = torch.zeros_like(truth['masks'])
        mask[..., :8, :20] = 1
        invented = {'boxes': torch.tensor([[0.0, 0, 20, 8]]), 'masks': mask, 'scores': torch.tensor([0.95])}
        return {key: torch.cat((invented.get(key, value), value)) for key, value in truth.items()}

    figures = {}
    for regions in ([], [crowd(64, 48, rows=8) | {'image_id': 5}]):
        write_tree(coco, 'val', tree | {'annotations': tree['annotations'] + regions})
        _, figures[len(regions)] = evaluate(CocoDataset(coco, 'val'), [0], invent)
    assert figures[0]['box_AP'] == figures[0]['mask_AP'] == pytest.approx(50, abs=1)
    assert figures[1]['box_AP'] == figures[1]['mask_AP'] == pytest.approx(100)


def test_results_that_cannot_be_written_are_told(coco, tmp_path):
    evaluation, _ = evaluate(CocoDataset(coco, 'val'), [0], truth_of)
    with pytest.raises(ConfigError, match='nowhere: No such file'):
        evaluation.write(tmp_path / 'nowhere' / 'results.json')


def evaluate_share(rank, world_size, coco, results):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{results}/meet', rank=rank, world_size=world_size)
    dataset = CocoDataset(coco, 'val')
    evaluation, figures = evaluate(dataset, ShardSampler(len(dataset), rank, world_size), guess_of)
    evaluation.write(results / 'results.json')
    (results / f'{rank}.json').write_text(json.dumps(figures))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_figures_and_the_file_of_one(coco, tmp_path):
    evaluation, figures = evaluate(CocoDataset(coco, 'val'), range(7), guess_of)
    evaluation.write(tmp_path / 'alone.json')
    mp.spawn(evaluate_share, (2, coco, tmp_path), 2)  # 4 images and 3
    for rank in (0, 1):
        np.testing.assert_equal(json.loads((tmp_path / f'{rank}.json').read_text()), figures)
    assert (tmp_path / 'results.json').read_bytes() == (tmp_path / 'alone.json').read_bytes()


def test_drawing_shows_what_is_likely_and_nothing_else(coco):
    image, target = CocoDataset(coco, 'val')[0]
    truth = truth_of(target)
    names = ['box', 'wedge', 'rare']
    drawn = np.asarray(draw_detections(image, truth, names, threshold=0.5))
    assert drawn.shape == (8 * 48, 8 * 64, 3)  # enlarged, so that names can be read
    x1, y1 = (int(value) * 8 for value in target['boxes'][0, :2])
    assert tuple(drawn[y1, x1]) in {color_of(label) for label in target['labels'].tolist()}
    plain = np.asarray(draw_detections(image, truth | {'scores': truth['scores'] * 0 + 0.4}, names, threshold=0.5))
    wide = (F.interpolate(image[None], scale_factor=8, mode='bilinear')[0] * 255).round().to(torch.uint8)
    np.testing.assert_array_equal(plain, wide.permute(1, 2, 0).numpy())
    large = torch.rand(3, 500, 600)
    assert draw_detections(large, none_of(target), names).size == (600, 500)
    assert draw_detections(torch.rand(3, 3, 900), none_of(target), names).size == (3600, 12)
    assert len({color_of(label) for label in range(1, 81)}) == 80
