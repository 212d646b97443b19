"""Precision and recall of each class at an IoU of 0.5: COCO's curves, AP50, and the score threshold with the best F1.

Shapes: K classes; n thresholds; 101 levels of recall, from 0 to 1 in steps of 0.01.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from data.drawn_text import fit_font, shorten
from detection.draw import class_color

RECALLS = np.linspace(0, 1, 101)

# More classes than these are grey in figures, but for those with the lowest AP50
_MAX_COLORED = 10
_LOWEST = 5
_MAX_NAME = 24  # characters
_GREY = {'color': 'silver', 'linewidth': 0.8}


class ClassPrecision(NamedTuple):
    """COCO's average precision of a class, in [0, 1]; NaN where it has no objects.

    Attributes:
        ap: mean over the IoUs from 0.5 to 0.95.
        ap50: at an IoU of 0.5: the mean of `precision`.
        precision: at an IoU of 0.5, the highest at this recall or more, (101,); 0 where the recall is not reached.
        scores: minimum scores at which the recall is reached, (101,); 0 where it is not.
    """

    ap: float
    ap50: float
    precision: np.ndarray
    scores: np.ndarray


class ScoreCurve(NamedTuple):
    """Precision and recall of a class at an IoU of 0.5, if detections below a score threshold are left out.

    Attributes:
        objects: number of objects, without crowd regions.
        thresholds: each score that a detection has, ascending, (n,).
        precision: fraction of detections that find an object, (n,).
        recall: fraction of objects that are found, (n,).
    """

    objects: int
    thresholds: np.ndarray
    precision: np.ndarray
    recall: np.ndarray

    @property
    def f1(self) -> np.ndarray:
        """Harmonic mean of precision and recall, (n,)."""
        both = self.precision + self.recall
        return np.divide(2 * self.precision * self.recall, both, out=np.zeros_like(both), where=both > 0)

    @property
    def best(self) -> int | None:
        """Index of the threshold with the highest F1, the highest of several; None if no object is found."""
        f1 = self.f1
        return len(f1) - 1 - int(f1[::-1].argmax()) if f1.any() else None


def class_precisions(evaluation: Any) -> list[ClassPrecision]:
    """The average precision of each class, in order, from pycocotools' `COCOeval` after `accumulate`, or its like."""
    # (10 IoUs, 101, K): all sizes, and the most detections
    precision, scores = (np.array(evaluation.eval[key])[..., 0, -1] for key in ('precision', 'scores'))
    precision[precision < 0] = np.nan
    return [
        ClassPrecision(float(p.mean()), float(p[0].mean()), p[0], s)
        for p, s in zip(np.moveaxis(precision, -1, 0), np.moveaxis(scores[0], -1, 0), strict=True)
    ]


def score_curves(evaluation: Any) -> list[ScoreCurve]:
    """The curve of each class, in order, from `COCOeval` after `evaluate`; its first IoU and range of areas count.

    Detections that COCO ignores, such as those in crowd regions, do not count.
    """
    areas = [float(x) for x in evaluation.params.areaRng[0]]
    found: dict[int, list[np.ndarray]] = {category: [] for category in evaluation.params.catIds}
    objects = dict.fromkeys(found, 0)
    for image in evaluation.evalImgs:
        if image is None or [float(x) for x in image['aRng']] != areas:
            continue
        category, counts = int(image['category_id']), ~np.array(image['dtIgnore'], bool)[0]
        is_true = np.array(image['dtMatches'])[0] > 0
        found[category].append(np.stack((np.array(image['dtScores'], float), is_true))[:, counts])
        objects[category] += int((~np.array(image['gtIgnore'], bool)).sum())
    nothing = np.zeros((2, 0))
    return [score_curve(*np.concatenate([nothing, *found[x]], axis=1), objects[x]) for x in found]


def score_curve(scores: np.ndarray, is_true: np.ndarray, objects: int) -> ScoreCurve:
    """The curve of detections.

    Args:
        scores: of the detections, (m,).
        is_true: 1 where a detection finds an object, which no other detection finds, else 0, (m,).
        objects: number of objects, found or not.
    """
    from sklearn.metrics import precision_recall_curve  # takes a second to import

    if not len(scores) or not objects:
        return ScoreCurve(objects, *(np.zeros(0),) * 3)
    missed = objects - int(is_true.sum())
    below = scores.min() - 1  # for scikit-learn, a missed object is a positive below all thresholds
    labels = np.concatenate((is_true, np.ones(missed)))
    precision, recall, thresholds = precision_recall_curve(labels, np.concatenate((scores, np.full(missed, below))))
    is_score = thresholds > below
    return ScoreCurve(objects, thresholds[is_score], precision[:-1][is_score], recall[:-1][is_score])


def precision_rows(names: Sequence[str], precisions: Mapping[str, Sequence[ClassPrecision]]) -> list[list[str]]:
    """A table of COCO's curves: a header, and a row for each kind of detection, class and level of recall.

    Args:
        names: of the classes.
        precisions: of each class, by kind, `box` or `mask`.
    """
    rows = [['kind', 'class', 'recall', 'precision', 'score']]
    for kind, classes in precisions.items():
        for name, x in zip(names, classes, strict=True):
            for recall, precision, score in zip(RECALLS, x.precision, x.scores, strict=True):
                if not np.isnan(precision):
                    rows.append([kind, name, f'{recall:.2f}', f'{precision:.4f}', f'{score:.4f}' if precision else ''])
    return rows


def draw_curves(
    names: Sequence[str], precisions: Mapping[str, Sequence[ClassPrecision]], curves: Sequence[ScoreCurve]
) -> Figure:
    """Draw precision by recall of boxes and of masks, and F1 of boxes by score threshold, at an IoU of 0.5.

    Up to `_MAX_COLORED` classes have the colours of drawn detections; of more, those with the lowest AP50 are coloured.

    Args:
        names: of the classes.
        precisions: of each class, by kind, `box` or `mask`.
        curves: of each class, of boxes.
    """
    names, face = fit_font([shorten(name, _MAX_NAME) for name in names])
    boxes = precisions['box']
    known = [k for k, x in enumerate(boxes) if not np.isnan(x.ap50)]
    colored = known if len(known) <= _MAX_COLORED else sorted(known, key=lambda k: boxes[k].ap50)[:_LOWEST]
    colors = {k: class_color(k + 1 if len(known) <= _MAX_COLORED else i + 1) for i, k in enumerate(colored)}
    styles = {k: {'color': [x / 255 for x in colors[k]], 'linewidth': 1.5} if k in colors else _GREY for k in known}
    order = [*(k for k in known if k not in colors), *colored]  # the last on top
    figure = Figure(figsize=(5 * len(precisions) + 8, 4.8), layout='constrained')
    *grid, last = figure.subplots(1, len(precisions) + 1)
    for axes, (kind, classes) in zip(grid, precisions.items(), strict=True):
        for k in order:
            axes.plot(RECALLS, classes[k].precision, **styles[k])
        with_objects = [classes[k].precision for k in known if not np.isnan(classes[k].ap50)]
        if with_objects:
            mean = np.mean(with_objects, axis=0)
            axes.plot(RECALLS, mean, color='black', linewidth=2.5)
            axes.set_title(f'{kind}: AP50 {100 * mean.mean():.1f} %; black: mean of the classes')
        axes.set(xlabel='recall', ylabel='precision', xlim=(0, 1), ylim=(0, 1.02))
    texts = {}
    for k in order:
        curve, best = curves[k], curves[k].best
        last.plot(curve.thresholds, curve.f1, **styles[k])
        texts[k] = f'{100 * boxes[k].ap50:.1f}, {"no threshold" if best is None else f"{curve.thresholds[best]:.2f}"}'
        if k in colors and best is not None:
            last.plot(curve.thresholds[best], curve.f1[best], 'o', color=styles[k]['color'])
    last.set(xlabel='score threshold', ylabel='F1', xlim=(0, 1), ylim=(0, 1.02))
    last.set_title('box: F1, with the best thresholds')
    lines = [last.plot([], [], **styles[k])[0] for k in colored]
    title = 'AP50 and best threshold'
    if len(colored) < len(known):
        title += f',\nlowest {_LOWEST} of {len(known)} classes'
    legend = last.legend(
        lines,
        [f'{texts[k]}: {names[k]}' for k in colored],
        title=title,
        loc='center left',
        bbox_to_anchor=(1.02, 0.5),
        prop=FontProperties(fname=face, size=9),
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    for axes in (*grid, last):
        axes.grid(color='gainsboro', linewidth=0.5)
    return figure
