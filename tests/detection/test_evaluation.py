"""COCO's metrics: pycocotools' own, for right, noisy and no detections, on any number of processes."""

import json
import math
import sys
import threading
from collections import Counter

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data.samplers import ShardSampler
from detection.data import CocoDataset
from detection.evaluation import CocoEvaluation, choose_evaluator
from detection.models.masks import BoxMasks
from detection.precision_recall import draw_curves, precision_rows, score_curve
from tests.helpers.coco_data import crowd, read_tree, rectangle, update_tree, write_coco, write_tree
from tests.helpers.detectors import box_masks, no_detections, perfect_detections
from utils import OutputError

NAMES = ('AP', 'AP50', 'AP75', 'APs', 'APm', 'APl', 'AR1', 'AR10', 'AR100', 'ARs', 'ARm', 'ARl')


@pytest.fixture
def coco(tmp_path):
    return write_coco(tmp_path / 'coco', val=7)


def noisy_detections(target):
    """Boxes and masks that are off by some pixels, with scores; some objects are missed, some labels wrong."""
    generator = torch.Generator().manual_seed(target['image_id'])
    perfect = perfect_detections(target)
    boxes = perfect['boxes'].repeat(3, 1)
    boxes += torch.randn(boxes.shape, generator=generator)
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    masks = perfect['masks'].repeat(3, 1, 1, 1)
    shifts = torch.randint(-2, 3, (len(masks), 2), generator=generator).tolist()
    masks = torch.stack([mask.roll(shift, (1, 2)) for mask, shift in zip(masks, shifts, strict=True)])
    labels = perfect['labels'].repeat(3)
    labels[::5] = 3
    scores = torch.rand(len(labels), generator=generator)
    kept = scores > 0.2
    return {'boxes': boxes[kept], 'labels': labels[kept], 'scores': scores[kept], 'masks': masks[kept]}


def evaluate(dataset, indices, detect):
    evaluation = CocoEvaluation(dataset)
    for index in indices:
        _, target = dataset[index]
        detections = detect(target)
        losses = {'loss_box': 0.1 * index, 'loss_mask': 0.3} if index != 2 else {}
        evaluation.update([target], [detections | {'masks': box_masks(detections['masks'])}], losses)
    return evaluation, evaluation.finish()


def test_perfect_detections_have_an_ap_of_100(coco):
    dataset = CocoDataset(coco, 'val')
    evaluation, metrics = evaluate(dataset, range(len(dataset)), perfect_detections)
    losses = ['val_loss', 'val_loss_box', 'val_loss_mask']
    assert list(metrics) == [*(f'{kind}_{name}' for kind in ('box', 'mask') for name in NAMES), *losses]
    assert [metrics[name] for name in losses] == pytest.approx([0.3 + 1.9 / 6, 1.9 / 6, 0.3])  # image 2 has none
    for kind in ('box', 'mask'):
        for name in ('AP', 'AP50', 'AP75', 'APs'):
            assert metrics[f'{kind}_{name}'] == pytest.approx(100)
        assert math.isnan(metrics[f'{kind}_APl'])  # no object is large
    lines = evaluation.table().splitlines()
    assert lines[0] == '| COCO, % | AP | AP50 | AP75 | APs | APm | APl |'
    assert lines[2:4] == [f'| {kind} | 100.00 | 100.00 | 100.00 | 100.00 | nan | nan |' for kind in ('box', 'mask')]
    assert lines[5] == '| COCO, % | AR1 | AR10 | AR100 | ARs | ARm | ARl |'
    assert [line.split(' | ')[0] for line in lines[7:9]] == ['| box recall', '| mask recall']
    assert all(line.split(' | ')[3:] == ['100.00', '100.00', 'nan', 'nan |'] for line in lines[7:9])
    assert lines[10] == 'val_loss 0.6167 of 6 images with objects: box 0.3167, mask 0.3000'
    head, *rows = evaluation.class_rows(evaluation.score_curves())
    kinds = ['box AP', 'box AP50', 'mask AP', 'mask AP50']
    assert head == ['class', 'objects', *kinds, 'best threshold', 'precision', 'recall', 'F1']
    counts = Counter(dataset.classes[label - 1] for i in range(7) for label in dataset[i][1]['labels'].tolist())
    perfect = ['100.00'] * 4 + ['0.8999'] + ['100.00'] * 3  # the score is 0.9 in float32, rounded down
    assert rows == [*([name, str(counts[name]), *perfect] for name in ('box', 'wedge')), ['rare', '0', *[''] * 8]]


def pycocotools_metrics(root, results, iou_type):
    """The metrics by pycocotools alone."""
    tree = read_tree(root, 'val') | {'info': {}}
    ground_truth = COCO()
    ground_truth.dataset = tree
    for number, annotation in enumerate(tree['annotations'], start=1):
        annotation |= {'id': number, 'iscrowd': annotation.get('iscrowd', 0)}
    ground_truth.createIndex()
    for annotation in tree['annotations']:
        annotation['area'] = int(ground_truth.annToMask(annotation).sum())
    if iou_type == 'segm':
        results = [{key: value for key, value in result.items() if key != 'bbox'} for result in results]
    evaluation = COCOeval(ground_truth, ground_truth.loadRes(results), iou_type)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


@pytest.mark.parametrize('name', ['hotcoco', 'pycocotools'])
def test_metrics_are_those_of_pycocotools_on_the_written_results(coco, tmp_path, monkeypatch, name):
    if name == 'pycocotools':
        monkeypatch.setitem(sys.modules, 'hotcoco', None)
    assert choose_evaluator().name == name
    tree = read_tree(coco, 'val')
    annotations = [*tree['annotations'], crowd(64, 48, rows=10) | {'image_id': 5}]
    # hotcoco refuses a license that is a text
    update_tree(coco, annotations=annotations, images=[x | {'license': 'CC-BY'} for x in tree['images']])
    dataset = CocoDataset(coco, 'val')
    evaluation, metrics = evaluate(dataset, range(len(dataset)), noisy_detections)
    evaluation.write(tmp_path / 'results.json')
    results = json.loads((tmp_path / 'results.json').read_text())
    assert {result['category_id'] for result in results} <= {3, 7, 90}
    for kind, iou_type in (('box', 'bbox'), ('mask', 'segm')):
        reference = pycocotools_metrics(coco, results, iou_type)
        expected = reference.stats
        assert 0.05 < expected[0] < 0.95
        ours = [metrics[f'{kind}_{name}'] for name in NAMES]
        np.testing.assert_allclose(ours, [100 * value if value >= 0 else np.nan for value in expected], rtol=0)
        for label, values in ((kind, ours[:6]), (f'{kind} recall', ours[6:])):
            row = f'| {label} | ' + ' | '.join(f'{value:.2f}' for value in values) + ' |'
            assert row in evaluation.table().splitlines()
        curves = evaluation.score_curves()
        for number, (name, _, *cells) in enumerate(evaluation.class_rows(curves)[1:]):
            first = 2 * ('box', 'mask').index(kind)
            for cell, ious in zip(cells[first : first + 2], (slice(None), slice(0, 1)), strict=True):
                precision = reference.eval['precision'][ious, :, number, 0, 2]
                known = precision[precision > -1]
                assert cell == (f'{100 * known.mean():.2f}' if known.size else ''), name
        # The same matches, so the recall of all detections is the same.
        recall = [100 * curve.recall[0] for curve in curves if len(curve.recall)]
        if kind == 'box':
            assert np.mean(recall) == pytest.approx(100 * reference.eval['recall'][0, :2, 0, 2].mean())


def test_ap_is_0_without_detections_and_nan_without_objects(coco):
    _, metrics = evaluate(CocoDataset(coco, 'val'), range(7), no_detections)
    assert (metrics['box_AP'], metrics['mask_AP50']) == (0, 0)
    update_tree(coco, annotations=[])
    _, metrics = evaluate(CocoDataset(coco, 'val'), range(7), no_detections)
    assert all(math.isnan(value) for name, value in metrics.items() if not name.startswith('val_loss'))


def test_mean_losses_do_not_depend_on_the_order_of_images(coco):
    """These sums lose the small number in one order and not in the other."""
    losses = {1: 1e200, 2: -1e200, 3: 1e100, 4: -1e100, 5: 1.0}
    means = []
    for order in ((1, 2, 3, 4, 5), (1, 3, 5, 4, 2)):
        evaluation = CocoEvaluation(CocoDataset(coco, 'val'))
        evaluation.losses = {image_id: {'loss_box': losses[image_id]} for image_id in order}
        means.append(evaluation.finish()['val_loss'])
    assert means == [0.2, 0.2]


def test_names_of_classes_do_not_divide_cells_of_the_report(coco, tmp_path):
    names = ['box|case', 'wedge', 'rare']
    update_tree(coco, categories=[{'id': x, 'name': name} for x, name in zip((3, 7, 90), names, strict=True)])
    evaluation, _ = evaluate(CocoDataset(coco, 'val'), range(7), perfect_detections)
    head, _, first, *_ = evaluation.write_class_report(tmp_path, '', 0.5).splitlines()
    assert first.endswith(r'| box\|case |')
    assert first.replace(r'\|', '').count('|') == head.count('|')
    assert '\nbox|case,' in (tmp_path / 'classes.csv').read_text()


def test_the_best_threshold_is_that_of_all_thresholds():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, is_true = rng.integers(-5, 6, 30) / 10, (rng.random(30) < 0.5).astype(float)  # with ties
        objects = int(is_true.sum()) + 7
        curve, best = score_curve(scores, is_true, objects), None
        for threshold in sorted(set(scores)):
            kept = is_true[scores >= threshold]
            precision, recall = kept.mean(), kept.sum() / objects
            f1 = 2 * precision * recall / (precision + recall) if kept.any() else 0
            if best is None or f1 >= best[0]:
                best = f1, threshold, precision, recall
        shown = [x[curve.best] for x in (curve.f1, curve.thresholds, curve.precision, curve.recall)]
        assert shown == pytest.approx(best)
    for curve in (score_curve(scores, 0 * is_true, 3), score_curve(scores[:0], is_true[:0], 3)):
        assert (curve.objects, curve.best) == (3, None)


def test_curves_are_drawn_of_all_classes_or_named_of_the_worst(coco):
    dataset = CocoDataset(coco, 'val')
    evaluation, metrics = evaluate(dataset, range(7), noisy_detections)
    figure = draw_curves(['_box $1', 'wedge', 'rare'], evaluation.precisions, evaluation.score_curves())
    boxes, masks, f1 = figure.axes
    assert [len(axes.lines) for axes in (boxes, masks)] == [3, 3]  # two classes, and their mean
    for axes, kind in ((boxes, 'box'), (masks, 'mask')):
        assert np.mean(axes.lines[-1].get_ydata()) == pytest.approx(metrics[f'{kind}_AP50'] / 100)
    assert [text.get_text().split(': ')[1] for text in f1.get_legend().get_texts()] == ['_box $1', 'wedge']
    many = [evaluation.precisions['box'][0]] * 20
    figure = draw_curves([f'c{i}' for i in range(20)], {'box': many}, evaluation.score_curves()[:1] * 20)
    assert len(figure.axes[1].get_legend().get_texts()) == 5
    rows = precision_rows(dataset.classes, evaluation.precisions)
    assert len(rows) == 1 + 2 * 2 * 101
    assert np.mean([float(row[3]) for row in rows[1:102]]) == pytest.approx(
        evaluation.precisions['box'][0].ap50, abs=1e-4
    )


def test_an_image_evaluated_twice_counts_once(coco):
    dataset = CocoDataset(coco, 'val')
    _, once = evaluate(dataset, range(7), noisy_detections)
    _, twice = evaluate(dataset, [*range(7), 0, 3], noisy_detections)
    np.testing.assert_equal(once, twice)


def test_detections_in_a_crowd_region_do_not_count(coco):
    """Without the region, the false positive would outrank the true positives and halve their precision."""
    tree = read_tree(coco, 'val')
    images = [image for image in tree['images'] if image['id'] == 5]  # 64 x 48
    tree |= {'images': images, 'annotations': [rectangle(30, 20, 16, 12) | {'image_id': 5}]}

    def with_false_positive(target):
        perfect = perfect_detections(target)
        mask = torch.zeros_like(perfect['masks'])
        mask[..., :8, :20] = 1
        false = {'boxes': torch.tensor([[0.0, 0, 20, 8]]), 'masks': mask, 'scores': torch.tensor([0.95])}
        return {key: torch.cat((false.get(key, value), value)) for key, value in perfect.items()}

    metrics = {}
    for regions in ([], [crowd(64, 48, rows=8) | {'image_id': 5}]):
        write_tree(coco, 'val', tree | {'annotations': tree['annotations'] + regions})
        _, metrics[len(regions)] = evaluate(CocoDataset(coco, 'val'), [0], with_false_positive)
    assert metrics[0]['box_AP'] == metrics[0]['mask_AP'] == pytest.approx(50, abs=1)
    assert metrics[1]['box_AP'] == metrics[1]['mask_AP'] == pytest.approx(100)


def test_results_that_cannot_be_written_name_the_folder(coco, tmp_path):
    evaluation, _ = evaluate(CocoDataset(coco, 'val'), [0], perfect_detections)
    with pytest.raises(OutputError, match='nowhere: No such file'):
        evaluation.write(tmp_path / 'nowhere' / 'results.json')


def test_masks_are_encoded_in_the_background_and_few_images_wait(coco):
    dataset, threads, started, release = CocoDataset(coco, 'val'), set(), [], threading.Event()
    perfect = [perfect_detections(dataset[index][1]) for index in range(3)]

    class SlowMasks(BoxMasks):
        def cpu(self):
            return self

        def rle(self):
            threads.add(threading.current_thread())
            started.append(self)
            assert release.wait(60)
            return super().rle()

    slow = [x | {'masks': SlowMasks(*vars(box_masks(x['masks'])).values())} for x in perfect]
    evaluation = CocoEvaluation(dataset)
    for index in range(2):
        evaluation.update([dataset[index][1]], [slow[index]])  # does not wait
    threading.Timer(0.2, release.set).start()
    evaluation.update([dataset[2][1]], [slow[2]])  # waits for the first
    assert release.is_set()
    evaluation.finish()
    assert threads
    assert threading.current_thread() not in threads
    assert len(started) == len(evaluation.detections) == 3


def test_an_error_while_masks_are_encoded_is_raised(coco):
    dataset = CocoDataset(coco, 'val')
    _, target = dataset[0]
    evaluation = CocoEvaluation(dataset)
    detections = perfect_detections(target)
    evaluation.update([target], [detections | {'masks': box_masks(detections['masks'][:0])}])
    with pytest.raises(ValueError, match='shorter'):
        evaluation.finish()


def evaluate_shard(rank, world_size, coco, output):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{output}/meet', rank=rank, world_size=world_size)
    dataset = CocoDataset(coco, 'val')
    evaluation, metrics = evaluate(dataset, ShardSampler(len(dataset), rank, world_size), noisy_detections)
    evaluation.write(output / 'results.json')
    (output / f'{rank}.json').write_text(json.dumps(metrics))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_metrics_and_results_of_one(coco, tmp_path):
    evaluation, metrics = evaluate(CocoDataset(coco, 'val'), range(7), noisy_detections)
    evaluation.write(tmp_path / 'one_process.json')
    mp.spawn(evaluate_shard, (2, coco, tmp_path), 2)  # 4 images and 3
    for rank in (0, 1):
        np.testing.assert_equal(json.loads((tmp_path / f'{rank}.json').read_text()), metrics)
    assert (tmp_path / 'results.json').read_bytes() == (tmp_path / 'one_process.json').read_bytes()
