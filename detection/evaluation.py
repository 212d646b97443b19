"""COCO's metrics of boxes and masks, by pycocotools."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from checkpoint import replace_file
from detection.data.annotations import read_annotations
from detection.data.coco import CocoDataset, Target
from utils import gather_on_main_process, on_main_process, writing_in

# What pycocotools calls the kinds of overlap, and the first of its figures, in their order.
_KINDS = {'box': 'bbox', 'mask': 'segm'}
_FIGURES = ('AP', 'AP50', 'AP75', 'APs', 'APm', 'APl')


class CocoEvaluation:
    """Gathers detections, from all processes, and evaluates them.

    Args:
        dataset: the images, with all that COCO's file says of them.
    """

    def __init__(self, dataset: CocoDataset):
        self.annotation_file = dataset.annotation_file
        self.category_ids = [category['id'] for category in dataset.categories]
        self.found: dict[Any, list[dict[str, Any]]] = {}  # results by id of image, so that each image counts once
        self.figures: dict[str, float] = {}

    def update(self, targets: list[Target], detections: list[dict[str, Tensor]]) -> None:
        """Take in a batch.

        Args:
            targets: with `image_id`.
            detections: of each image, `boxes` (n, 4) as x1, y1, x2, y2 in pixels, `labels` (n,) from 1 on, `scores`
                (n,), and `masks` (n, 1, H, W), of which more than 0.5 is the object.
        """
        for target, detection in zip(targets, detections, strict=True):
            self.found[target['image_id']] = self._results(target['image_id'], detection)

    def _results(self, image_id: Any, detection: dict[str, Tensor]) -> list[dict[str, Any]]:
        """An image's detections in COCO's format of results."""
        masks = (detection['masks'][:, 0] > 0.5).cpu().numpy().astype(np.uint8)  # (n, H, W)
        runs = coco_mask.encode(np.asfortranarray(masks.transpose(1, 2, 0)))
        boxes = detection['boxes'].double().cpu()
        boxes[:, 2:] -= boxes[:, :2]
        parts = boxes.tolist(), detection['labels'].tolist(), detection['scores'].tolist(), runs
        return [
            {
                'image_id': image_id,
                'category_id': self.category_ids[label - 1],
                'bbox': box,
                'score': score,
                'segmentation': {'size': run['size'], 'counts': run['counts'].decode()},
            }
            for box, label, score, run in zip(*parts, strict=True)
        ]

    def finish(self) -> dict[str, float]:
        """Evaluate what all processes have found; each calls it once, at the same point.

        Returns:
            `box_AP`, `box_AP50`, `box_AP75`, `box_APs`, `box_APm`, `box_APl`, and the same of `mask_`, in percent, the
            same in every process; not a number where the data have no such objects.
        """
        found_by_all = gather_on_main_process(self.found)
        if found_by_all is not None:
            self.found = {image_id: results for found in found_by_all for image_id, results in found.items()}
        self.figures = on_main_process(self._evaluate)
        return self.figures

    def results(self) -> list[dict[str, Any]]:
        """The detections in COCO's format, in the order of the images' ids: after `finish`, in rank 0, all of them."""
        return [result for image_id in sorted(self.found) for result in self.found[image_id]]

    def _evaluate(self) -> dict[str, float]:
        results, figures = self.results(), {}
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints each of its steps
            truth = COCO()
            truth.dataset = read_annotations(self.annotation_file)
            truth.createIndex()
            for kind, name in _KINDS.items():
                evaluation = COCOeval(truth, _load_results(truth, results, kind), name)
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
                for figure, value in zip(_FIGURES, evaluation.stats, strict=False):
                    figures[f'{kind}_{figure}'] = 100 * float(value) if value >= 0 else float('nan')
        return figures

    def table(self) -> str:
        """The figures of `finish` as a Markdown table."""
        rows = [['COCO, %', *_FIGURES], ['---'] * (len(_FIGURES) + 1)]
        rows += [[kind] + [f'{self.figures[f"{kind}_{figure}"]:.2f}' for figure in _FIGURES] for kind in _KINDS]
        return '\n'.join('| ' + ' | '.join(row) + ' |' for row in rows)

    def write(self, path: Path) -> None:
        """Write the results, after `finish`, as JSON for pycocotools and COCO's server; rank 0 writes.

        Raises:
            ConfigError: it cannot be written, in every process.
        """

        def replace() -> None:
            with writing_in(path.parent):
                replace_file(path, lambda file: file.write(json.dumps(self.results()).encode()))

        on_main_process(replace)


def _load_results(truth: COCO, results: list[dict[str, Any]], kind: str) -> COCO:
    """The results as pycocotools wants them.

    Masks are judged as small or large by their own areas, as by COCO's server: where a result has a box too,
    pycocotools would take the area of that.
    """
    if not results:  # which pycocotools fails on
        none = COCO()
        none.dataset = truth.dataset | {'annotations': []}
        none.createIndex()
        return none
    left_out = 'bbox' if kind == 'mask' else 'segmentation'
    return truth.loadRes([{key: value for key, value in each.items() if key != left_out} for each in results])
