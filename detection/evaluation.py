"""COCO's metrics of boxes and, if there are any, masks, by pycocotools."""

import contextlib
import io
import json
import math
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from data.figures import draw_confusion
from detection.confusion import BACKGROUND, confusion_matrix
from detection.data.coco import CocoDataset, Target
from detection.models.masks import BoxMasks
from engine.config_tree import ConfigError
from engine.distributed import gather_on_main_process, on_main_process
from engine.run import Run
from text_files import csv_row
from utils import atomic_write, report_write_errors

# pycocotools' names of the IoU types, and its metrics, in order: average precision, average recall.
_IOU_TYPES = {'box': 'bbox', 'mask': 'segm'}
_PRECISION = ('AP', 'AP50', 'AP75', 'APs', 'APm', 'APl')
_RECALL = ('AR1', 'AR10', 'AR100', 'ARs', 'ARm', 'ARl')

# What evaluators read of an annotation file.
_EVALUATED_KEYS = {
    'images': ('id', 'width', 'height'),
    'categories': ('id', 'name'),
    'annotations': ('id', 'image_id', 'category_id', 'bbox', 'area', 'iscrowd', 'segmentation'),
}

# Images whose masks wait to be encoded, or are being encoded, while the network goes on.
_MAX_PENDING = 2


EVALUATORS = ('pycocotools', 'hotcoco')


class Evaluator(NamedTuple):
    """A program that computes COCO's metrics; all have pycocotools' interface, and give equal metrics (tested)."""

    name: str
    COCO: type
    COCOeval: type


def choose_evaluator(name: str | None = None) -> Evaluator:
    """The evaluator of a name; by default hotcoco, which takes a fraction of the time, where it is installed.

    Raises:
        ConfigError: hotcoco is asked for and not installed.
    """
    if name != 'pycocotools':
        try:
            import hotcoco
        except ImportError:
            if name is not None:
                raise ConfigError('hotcoco is not installed: pip install hotcoco') from None
        else:
            return Evaluator('hotcoco', hotcoco.COCO, hotcoco.COCOeval)
    import pycocotools.coco
    import pycocotools.cocoeval

    return Evaluator('pycocotools', pycocotools.coco.COCO, pycocotools.cocoeval.COCOeval)


class CocoEvaluation:
    """Gathers detections from all processes and evaluates them; a background thread encodes masks.

    Args:
        dataset: the images, with everything COCO's file says about them.
        evaluator: that computes the metrics; by default the fastest that is installed.
    """

    def __init__(self, dataset: CocoDataset, evaluator: Evaluator | None = None):
        self.ground_truth, self.is_labelled = dataset.ground_truth, dataset.is_labelled
        self.with_masks = dataset.with_masks
        self.kinds = ('box', 'mask') if dataset.with_masks else ('box',)
        self.category_ids = [category['id'] for category in dataset.categories]
        self.detections: dict[Any, list[dict[str, Any]]] = {}  # by image id, so each image counts once
        self.class_names, self.evaluator = dataset.classes, evaluator or choose_evaluator()
        self.metrics: dict[str, float] = {}
        self.class_precision: dict[str, list[float]] = {}  # on rank 0, by kind
        self._encoder = ThreadPoolExecutor(1)
        self._pending: deque[Future] = deque()

    def update(self, targets: list[Target], detections: list[dict[str, Tensor | BoxMasks]]) -> None:
        """Add a batch.

        Args:
            targets: with `image_id`.
            detections: a dict per image: `boxes` (n, 4) as x1, y1, x2, y2 in pixels, `labels` (n,) from 1,
                `scores` (n,) and, where the dataset has masks, `masks` as `BoxMasks`.
        """
        for target, x in zip(targets, detections, strict=True):
            self._wait(_MAX_PENDING - 1)
            on_cpu = {key: value.cpu() for key, value in x.items()}
            self._pending.append(self._encoder.submit(self._add, target['image_id'], on_cpu))

    def _wait(self, pending: int) -> None:
        """Wait until at most so many images are pending; an encoder's error is raised here."""
        while len(self._pending) > pending:
            self._pending.popleft().result()

    def _add(self, image_id: Any, detections: dict[str, Tensor | BoxMasks]) -> None:
        """Add an image's detections in COCO's result format."""
        boxes = detections['boxes'].double()
        boxes[:, 2:] -= boxes[:, :2]
        columns = boxes.tolist(), detections['labels'].tolist(), detections['scores'].tolist()
        results = [
            {'image_id': image_id, 'category_id': self.category_ids[label - 1], 'bbox': box, 'score': score}
            for box, label, score in zip(*columns, strict=True)
        ]
        if self.with_masks:
            for result, segmentation in zip(results, detections['masks'].segmentations(), strict=True):
                result['segmentation'] = segmentation
        self.detections[image_id] = results

    def finish(self) -> dict[str, float]:
        """Evaluate the detections of all processes; each calls it once, at the same point.

        Returns:
            `box_AP`, `box_AP50`, `box_AP75`, `box_APs`, `box_APm`, `box_APl`, `box_AR1`, `box_AR10`, `box_AR100`,
            `box_ARs`, `box_ARm`, `box_ARl`, and the same for `mask_` if there are masks, in percent, in every process;
            NaN where the data have no such objects.
        """
        self._wait(0)
        self._encoder.shutdown()
        gathered = gather_on_main_process(self.detections)
        if gathered is not None:
            self.detections = {image_id: x for detections in gathered for image_id, x in detections.items()}
        self.metrics = on_main_process(self._evaluate)
        return self.metrics

    def results(self) -> list[dict[str, Any]]:
        """Detections in COCO's format, ordered by image id; after `finish`, rank 0 has all of them."""
        return [x for image_id in sorted(self.detections) for x in self.detections[image_id]]

    def _evaluate(self) -> dict[str, float]:
        results, metrics = self.results(), {}
        if not self.is_labelled:
            return metrics
        # Nothing else, since hotcoco refuses, say, a license that is a text.
        tree = {
            part: [{key: x[key] for key in keys if key in x} for x in self.ground_truth[part]]
            for part, keys in _EVALUATED_KEYS.items()
        }
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints each of its steps
            for kind in self.kinds:
                ground_truth = self._load_ground_truth(tree, kind)
                detections = self._load_results(ground_truth, results, kind)
                evaluation = self.evaluator.COCOeval(ground_truth, detections, _IOU_TYPES[kind])
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
                for name, value in zip(_PRECISION + _RECALL, evaluation.stats, strict=True):
                    metrics[f'{kind}_{name}'] = 100 * float(value) if value >= 0 else float('nan')
                self.class_precision[kind] = _class_precision(np.asarray(evaluation.eval['precision']))
        return metrics

    def _load_ground_truth(self, tree: dict[str, Any], kind: str) -> Any:
        """The objects, for the evaluator; for masks, those without one are crowd regions, which do not count."""
        ground_truth = self.evaluator.COCO()
        if kind == 'mask':
            annotations = [x if 'segmentation' in x else x | _box_as_crowd(x) for x in tree['annotations']]
            tree = tree | {'annotations': annotations}
        ground_truth.dataset = tree
        ground_truth.createIndex()
        return ground_truth

    def _load_results(self, ground_truth: Any, results: list[dict[str, Any]], kind: str) -> Any:
        """Detections, for the evaluator.

        Masks count as small or large by their own areas, as on COCO's server: where a result has a box too, pycocotools
        would use the box's area.
        """
        if not results:  # pycocotools fails on an empty list
            empty = self.evaluator.COCO()
            empty.dataset = ground_truth.dataset | {'annotations': []}
            empty.createIndex()
            return empty
        dropped = 'bbox' if kind == 'mask' else 'segmentation'
        return ground_truth.loadRes([{key: value for key, value in x.items() if key != dropped} for x in results])

    def table(self) -> str:
        """The metrics of `finish` as a Markdown table; without ground truth, the number of detections."""
        if not self.metrics:
            return f'{len(self.results())} detections; without annotations, there is nothing to compare them with'
        tables = []
        for names, suffix in ((_PRECISION, ''), (_RECALL, ' recall')):
            rows = [['COCO, %', *names], ['---'] * (len(names) + 1)]
            for kind in self.kinds:
                rows.append([kind + suffix, *(f'{self.metrics[f"{kind}_{name}"]:.2f}' for name in names)])
            tables.append(_markdown(rows))
        return '\n\n'.join(tables)

    def class_rows(self) -> list[list[str]]:
        """After `finish` on rank 0: a header, and the AP of each class in percent; empty where it has no objects."""
        rows = [['class', *(f'{kind} AP' for kind in self.kinds)]]
        columns = [self.class_precision[kind] for kind in self.kinds]
        for name, *values in zip(self.class_names, *columns, strict=True):
            rows.append([name, *('' if math.isnan(value) else f'{value:.2f}' for value in values)])
        return rows

    def class_table(self) -> str:
        """`class_rows` as a Markdown table, names last."""
        head, *rows = ([*values, name] for name, *values in self.class_rows())
        return _markdown([head, ['---'] * len(head), *rows])

    def write(self, path: Path) -> None:
        """After `finish`, write the results as JSON for pycocotools and COCO's server; rank 0 writes.

        Raises:
            OutputError: the file cannot be written, in every process.
        """

        def write() -> None:
            with report_write_errors(path.parent):
                atomic_write(path, lambda file: file.write(json.dumps(self.results()).encode()))

        on_main_process(write)

    def write_report(self, run: Run, suffix: str) -> None:
        """Write detections as `results<suffix>.json` and, where there are annotations, the report of the classes.

        That is AP per class as `classes<suffix>.csv`, and the confusion matrix of detections with a score of at least
        `SHOW_SCORE` as `confusion<suffix>.csv` and `.png`.
        """
        self.write(run.output_dir / f'results{suffix}.json')
        if self.is_labelled:
            on_main_process(lambda: self._write_class_report(run, suffix))

    def _write_class_report(self, run: Run, suffix: str) -> None:
        folder = run.output_dir
        run.logger.info(f'AP of each class, results{suffix}.json:\n{self.class_table()}')
        counts = confusion_matrix(self.ground_truth, self.results(), run.config.SHOW_SCORE)
        names = [*self.class_names, BACKGROUND]
        rows = [['', *names], *([name, *row] for name, row in zip(names, counts.tolist(), strict=True))]
        with report_write_errors(folder):
            for name, table in (('classes', self.class_rows()), ('confusion', rows)):
                (folder / f'{name}{suffix}.csv').write_text(''.join(map(csv_row, table)), encoding='utf-8')
            figure = draw_confusion(counts, names, rows='object', columns='detected as')
            figure.savefig(folder / f'confusion{suffix}.png', dpi=100)


def _class_precision(precision: np.ndarray) -> list[float]:
    """AP of each class in percent, NaN without objects, from pycocotools' (IoUs, recalls, classes, areas, limits)."""
    means = []
    for values in np.moveaxis(precision[..., 0, -1], -1, 0):
        known = values[values > -1]
        means.append(100 * float(known.mean()) if known.size else math.nan)
    return means


def _markdown(rows: list[list[str]]) -> str:
    return '\n'.join('| ' + ' | '.join(row) + ' |' for row in rows)


def _box_as_crowd(annotation: dict[str, Any]) -> dict[str, Any]:
    x, y, width, height = annotation['bbox']
    polygon = [x, y, x + width, y, x + width, y + height, x, y + height]
    return {'segmentation': [polygon], 'iscrowd': 1}
