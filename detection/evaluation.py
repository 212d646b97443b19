"""COCO's metrics of boxes and, if there are any, masks, by pycocotools."""

import contextlib
import io
import json
import math
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from data.figures import draw_confusion
from detection.confusion import BACKGROUND, confusion_matrix
from detection.data.coco import CocoDataset, Target
from detection.models.masks import BoxMasks
from detection.precision_recall import (
    ClassPrecision,
    ScoreCurve,
    class_precisions,
    draw_curves,
    precision_rows,
    score_curves,
)
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
    """Choose the program that computes COCO's metrics; by default hotcoco, the fastest, if it is installed.

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
        self.losses: dict[Any, dict[str, float]] = {}  # by image id
        self.class_names, self.evaluator = dataset.classes, evaluator or choose_evaluator()
        self.metrics: dict[str, float] = {}
        self.precisions: dict[str, list[ClassPrecision]] = {}  # of the classes, on rank 0, by kind
        self._encoder = ThreadPoolExecutor(1)
        self._pending: deque[Future] = deque()

    def update(
        self,
        targets: list[Target],
        detections: list[dict[str, Tensor | BoxMasks]],
        losses: dict[str, float] | None = None,
    ) -> None:
        """Add a batch.

        Args:
            targets: with `image_id`.
            detections: a dict per image: `boxes` (n, 4) as x1, y1, x2, y2 in pixels, `labels` (n,) from 1,
                `scores` (n,) and, where the dataset has masks, `masks` as `BoxMasks`.
            losses: of the batch's only image, by name; None or nothing if they do not count.
        """
        if losses:
            self.losses[targets[0]['image_id']] = losses
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
            NaN where the data have no such objects. If there are losses, `val_loss`, their sum, and `val_loss_...`,
            each of them; all are means over images.
        """
        self._wait(0)
        self._encoder.shutdown()
        gathered = gather_on_main_process((self.detections, self.losses))
        if gathered is not None:
            self.detections, self.losses = (
                {image_id: x for part in parts for image_id, x in part.items()} for parts in zip(*gathered, strict=True)
            )
        self.metrics = on_main_process(self._evaluate)
        return self.metrics

    def results(self) -> list[dict[str, Any]]:
        """Detections in COCO's format, ordered by image id; after `finish`, rank 0 has all of them."""
        return [x for image_id in sorted(self.detections) for x in self.detections[image_id]]

    def _evaluate(self) -> dict[str, float]:
        results, metrics = self.results(), {}
        if not self.is_labelled:
            return metrics
        tree = self._evaluated_tree()
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints each of its steps
            for kind in self.kinds:
                evaluation = self._load(tree, results, kind)
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
                for name, value in zip(_PRECISION + _RECALL, evaluation.stats, strict=True):
                    metrics[f'{kind}_{name}'] = 100 * float(value) if value >= 0 else float('nan')
                self.precisions[kind] = class_precisions(evaluation)
        return metrics | self._mean_losses()

    def _mean_losses(self) -> dict[str, float]:
        """Means over images, in one order on any number of processes."""
        if not self.losses:
            return {}
        losses = [self.losses[image_id] for image_id in sorted(self.losses)]
        means = {f'val_{name}': sum(x[name] for x in losses) / len(losses) for name in losses[0]}
        return {'val_loss': sum(means.values())} | means

    def score_curves(self) -> list[ScoreCurve]:
        """After `finish` on rank 0: precision and recall of each class's boxes by score threshold, at an IoU of 0.5."""
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = self._load(self._evaluated_tree(), self.results(), 'box')
            params = evaluation.params
            params.iouThrs, params.areaRng, params.areaRngLbl = params.iouThrs[:1], params.areaRng[:1], ['all']
            evaluation.evaluate()
        return score_curves(evaluation)

    def _evaluated_tree(self) -> dict[str, Any]:
        """The ground truth with only the keys that evaluators read: hotcoco refuses some values of others."""
        return {
            part: [{key: x[key] for key in keys if key in x} for x in self.ground_truth[part]]
            for part, keys in _EVALUATED_KEYS.items()
        }

    def _load(self, tree: dict[str, Any], results: list[dict[str, Any]], kind: str) -> Any:
        """A `COCOeval` of boxes or masks."""
        ground_truth = self._load_ground_truth(tree, kind)
        return self.evaluator.COCOeval(ground_truth, self._load_results(ground_truth, results, kind), _IOU_TYPES[kind])

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
        if 'val_loss' in self.metrics:
            parts = {key: value for key, value in self.metrics.items() if key.startswith('val_loss_')}
            text = ', '.join(f'{key.removeprefix("val_loss_")} {value:.4f}' for key, value in parts.items())
            tables.append(f'val_loss {self.metrics["val_loss"]:.4f} of {len(self.losses)} images with objects: {text}')
        return '\n\n'.join(tables)

    def class_rows(self, curves: Sequence[ScoreCurve]) -> list[list[str]]:
        """A table of the classes: objects, AP, and the best threshold with the precision, recall and F1 of boxes at it.

        AP, precision, recall and F1 are in percent. A cell is empty where a class has no objects, or none is found.

        Args:
            curves: from `score_curves`.
        """
        ap_columns = [f'{kind} {name}' for kind in self.kinds for name in ('AP', 'AP50')]
        rows = [['class', 'objects', *ap_columns, 'best threshold', 'precision', 'recall', 'F1']]
        for k, (name, curve) in enumerate(zip(self.class_names, curves, strict=True)):
            values = [value for kind in self.kinds for value in self.precisions[kind][k][:2]]
            row = [name, str(curve.objects), *('' if math.isnan(x) else f'{100 * x:.2f}' for x in values)]
            best = curve.best
            if best is None:
                row += [''] * 4
            else:
                # Rounded down, so that a detection with just this score is above it
                row.append(f'{math.floor(1e4 * curve.thresholds[best]) / 1e4:.4f}')
                row += [f'{100 * x[best]:.2f}' for x in (curve.precision, curve.recall, curve.f1)]
            rows.append(row)
        return rows

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
        """Write detections as `results<suffix>.json` and, where there are annotations, the report of the classes."""
        self.write(run.output_dir / f'results{suffix}.json')

        def write() -> None:
            table = self.write_class_report(run.output_dir, suffix, run.config.SHOW_SCORE)
            run.logger.info(f'classes, results{suffix}.json:\n{table}')

        if self.is_labelled:
            on_main_process(write)

    def write_class_report(self, folder: Path, suffix: str, min_score: float) -> str:
        """After `finish` on rank 0: write `classes`, `precision_recall` and `confusion`, all with the suffix.

        Args:
            folder: where to.
            suffix: at the end of the names of files.
            min_score: minimum score of a detection in the confusion matrix.

        Returns:
            The table of the classes in Markdown, with the names last.

        Raises:
            OutputError: a file cannot be written.
        """
        curves = self.score_curves()
        rows = self.class_rows(curves)
        counts = confusion_matrix(self.ground_truth, self.results(), min_score)
        names = [*self.class_names, BACKGROUND]
        tables = {
            'classes': rows,
            'precision_recall': precision_rows(self.class_names, self.precisions),
            'confusion': [['', *names], *([name, *row] for name, row in zip(names, counts.tolist(), strict=True))],
        }
        figures = {
            'precision_recall': draw_curves(self.class_names, self.precisions, curves),
            'confusion': draw_confusion(counts, names, rows='object', columns='detected as'),
        }
        with report_write_errors(folder):
            for name, table in tables.items():
                (folder / f'{name}{suffix}.csv').write_text(''.join(map(csv_row, table)), encoding='utf-8')
            for name, figure in figures.items():
                figure.savefig(folder / f'{name}{suffix}.png', dpi=100)
        head, *rows = ([*values, name] for name, *values in rows)
        return _markdown([head, ['---'] * len(head), *rows])


def _markdown(rows: list[list[str]]) -> str:
    """A table; cells may have the character that separates cells."""
    return '\n'.join('| ' + ' | '.join(cell.replace('|', r'\|') for cell in row) + ' |' for row in rows)


def _box_as_crowd(annotation: dict[str, Any]) -> dict[str, Any]:
    x, y, width, height = annotation['bbox']
    polygon = [x, y, x + width, y, x + width, y + height, x, y + height]
    return {'segmentation': [polygon], 'iscrowd': 1}
