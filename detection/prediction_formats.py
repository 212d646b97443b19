"""Detections as lines of text, rows of CSV, and a JSON file in COCO's format."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from pycocotools import mask as coco_mask

from detection.detections import Detection, Detections
from detection.frames import Frame
from text_files import csv_row
from utils import printable

COLUMNS = ('path', 'frame', 'class', 'label', 'score', 'x1', 'y1', 'x2', 'y2')


def text_line(frame: Frame, detection: Detection) -> str:
    """Path, with the frame number of a video, class, score and corners, separated by tabs; controls are escaped."""
    path = frame.path if frame.number is None else f'{frame.path}:{frame.number}'
    corners = ' '.join(f'{x:.1f}' for x in detection.box)
    return f'{printable(path)}\t{printable(detection.name)}\t{detection.score:.3f}\t{corners}'


def csv_header() -> str:
    """The names of the columns."""
    return csv_row(COLUMNS)


def csv_rows(frame: Frame, detections: Detections) -> Iterator[str]:
    """A row per object; `frame` is empty for images."""
    number = '' if frame.number is None else frame.number
    for detection in detections:
        corners = (f'{x:.2f}' for x in detection.box)
        yield csv_row([frame.path, number, detection.name, detection.label, f'{detection.score:.4f}', *corners])


class CocoJson:
    """Collects detections as a dataset in COCO's format, whose annotations have scores.

    Programs for annotation read it as suggestions, and pycocotools as a dataset. Category ids are labels, from 1.

    Args:
        class_names: names of the labels, from label 1.
    """

    def __init__(self, class_names: Sequence[str]):
        self.categories = [{'id': i, 'name': name} for i, name in enumerate(class_names, start=1)]
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def add(self, frame: Frame, detections: Detections) -> None:
        """Add an image or a frame."""
        image_id, (height, width) = len(self.images) + 1, detections.size
        image = {'id': image_id, 'file_name': str(frame.path), 'width': width, 'height': height}
        self.images.append(image | ({} if frame.number is None else {'frame': frame.number}))
        masks = detections.box_masks.segmentations() if detections.box_masks else [None] * len(detections)
        for detection, mask in zip(detections, masks, strict=True):
            x1, y1, x2, y2 = detection.box
            annotation = {
                'id': len(self.annotations) + 1,
                'image_id': image_id,
                'category_id': detection.label,
                'bbox': [round(x, 2) for x in (x1, y1, x2 - x1, y2 - y1)],
                'area': round((x2 - x1) * (y2 - y1), 2),
                'iscrowd': 0,
                'score': round(detection.score, 5),
            }
            if mask is not None:
                annotation |= {'area': int(coco_mask.area(mask)), 'segmentation': mask}
            self.annotations.append(annotation)

    def text(self) -> str:
        """The content of the file."""
        tree = {'images': self.images, 'categories': self.categories, 'annotations': self.annotations}
        return json.dumps(tree) + '\n'
