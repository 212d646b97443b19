"""Results of detection for one image."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from detection.models.masks import BoxMasks


class Detection(NamedTuple):
    """One detected object.

    Attributes:
        name: name of its class.
        label: number of its class, from 1.
        score: in [0, 1].
        box: x1, y1, x2, y2 in pixels of the image.
    """

    name: str
    label: int
    score: float
    box: list[float]


@dataclass(frozen=True, eq=False)
class Detections:
    """The n objects detected in one image, highest scores first; iterating over them gives each as a `Detection`.

    Tensors are on the CPU.

    Attributes:
        boxes: x1, y1, x2, y2 in pixels of the image, (n, 4), float32.
        scores: in [0, 1], (n,), float32.
        labels: numbers of the classes, from 1, (n,).
        names: names of the classes, n of them.
        size: height and width of the image.
        box_masks: the masks, kept within their boxes, which takes little memory; None if the detector has no mask head.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    names: list[str]
    size: tuple[int, int]
    box_masks: BoxMasks | None = None

    @classmethod
    def from_output(
        cls, output: Mapping[str, Tensor | BoxMasks], class_names: Sequence[str], size: Sequence[int]
    ) -> 'Detections':
        """Copy the output of `Detector.detect` for an image to the CPU, and add class names.

        Args:
            output: `boxes`, `labels`, `scores` and perhaps `masks`.
            class_names: names of the labels, from label 1.
            size: height and width of the image.
        """
        # Copies, because tensors of inference mode cannot be changed in place outside it.
        boxes, scores = (output[key].to('cpu', torch.float32, copy=True) for key in ('boxes', 'scores'))
        labels = output['labels'].to('cpu', copy=True)
        masks = output.get('masks')
        names = [class_names[label - 1] for label in labels.tolist()]
        height, width = size
        return cls(boxes, scores, labels, names, (height, width), None if masks is None else masks.cpu())

    @property
    def masks(self) -> Tensor | None:
        """Masks in the whole image, boolean, (n, H, W); None if the detector has no mask head.

        They are pasted into the image each time, and take a byte per pixel of the image and object.
        """
        return None if self.box_masks is None else self.box_masks.dense()[:, 0]

    def __len__(self) -> int:
        return len(self.boxes)

    def __iter__(self) -> Iterator[Detection]:
        columns = (x.tolist() for x in (self.labels, self.scores, self.boxes))
        return map(Detection._make, zip(self.names, *columns, strict=True))

    def select(self, indices: Tensor) -> 'Detections':
        """The detections at these indices (k,), in their order."""
        names = [self.names[i] for i in indices.tolist()]
        masks = None if self.box_masks is None else self.box_masks[indices]
        return Detections(self.boxes[indices], self.scores[indices], self.labels[indices], names, self.size, masks)

    def above(self, min_score: float) -> 'Detections':
        """The detections whose score is at least `min_score`."""
        return self.select((self.scores >= min_score).nonzero()[:, 0])
