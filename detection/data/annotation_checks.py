"""Checks of annotations in COCO's format: boxes, masks, and whether a box belongs to its mask.

Boxes are [x, y, width, height] as in a file; extents are corners [x1, y1, x2, y2].
"""

from collections.abc import Sequence
from itertools import chain
from types import UnionType
from typing import Any

from pycocotools import mask as coco_mask

from data import DataError

# A box may differ from its mask's extent by so much on each side: pixels, or a fraction of the extent.
SLACK_PIXELS = 2
SLACK_FRACTION = 0.1

# Maximum outline of one mask's polygons, in pixels, for each of which pycocotools needs 100 bytes of memory.
MAX_OUTLINE = 5_000_000

# Larger numbers cannot be pixel coordinates of an image, and may overflow.
_MAX_NUMBER = 1e12
_is_small = _MAX_NUMBER.__gt__
_NUMBERS = {int, float}  # and not bool

MIN_IOU = 0.5  # of a box and its mask's extent
MAX_LOOSE = 0.01  # maximum fraction of a file's boxes below MIN_IOU


def check_box(annotation: dict[str, Any], label: str) -> None:
    """Refuse a box that is not [x, y, width, height]."""
    box = annotation['bbox']
    if not (are_numbers(box) and len(box) == 4 and box[2] >= 0 and box[3] >= 0):
        raise DataError(f'{label} has the box {box}: write [x, y, width, height] in pixels, or remove it')


def check_mask(annotation: dict[str, Any], image: dict[str, Any], label: str) -> list[float]:
    """Refuse a segmentation that is not a mask of the image; polygons without area are dropped, of which not all are.

    Returns:
        The mask's extent.
    """
    segmentation = annotation['segmentation']
    if isinstance(segmentation, dict):
        return check_run_lengths(segmentation, [image['height'], image['width']], label)
    if not _are_polygons(segmentation):
        raise DataError(
            f'{label} has no mask: write its "segmentation" as polygons of three or more corners, or run lengths'
        )
    # A polygon of two corners has no area, and pycocotools would take it for a box.
    annotation['segmentation'] = polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
    numbers = polygons[0] if len(polygons) == 1 else list(chain.from_iterable(polygons))
    xs, ys = numbers[::2], numbers[1::2]
    lows, highs = [min(xs), min(ys)], [max(xs), max(ys)]
    for low, high, length in zip(lows, highs, (image['width'], image['height']), strict=True):
        if low < -length or high > 2 * length:  # would exhaust pycocotools' memory
            far = low if low < -length else high
            raise DataError(f'{label} has a corner at {far}, far outside the image: move it, or remove the mask')
    if len(xs) * max(highs[0] - lows[0], highs[1] - lows[1]) <= MAX_OUTLINE:  # no outline is longer
        return lows + highs
    outline = sum(map(_outline, polygons))
    if outline > MAX_OUTLINE:
        raise DataError(f'{label} has a mask with an outline of {outline:.0f} pixels: write fewer corners')
    return lows + highs


def has_no_area(segmentation: Any) -> bool:
    """Whether it is a list of polygons, all of them with fewer than three corners, such as [[]]."""
    if not isinstance(segmentation, list) or any(isinstance(x, list) and len(x) >= 6 for x in segmentation):
        return False
    return _are_polygons(segmentation)


def _are_polygons(segmentation: Any) -> bool:
    return isinstance(segmentation, list) and all(are_numbers(x) and len(x) % 2 == 0 for x in segmentation)


def _outline(polygon: list[float]) -> float:
    """Pixels of a polygon's outline, as far as pycocotools draws it."""
    xs, ys = polygon[::2], polygon[1::2]
    return sum(max(abs(xs[i] - xs[i - 1]), abs(ys[i] - ys[i - 1])) for i in range(len(xs)))


def check_run_lengths(segmentation: dict[str, Any], size: list[int], label: str) -> list[float]:
    """Refuse run lengths that are not those of a mask of this height and width; returns the mask's extent."""
    counts = segmentation.get('counts')
    runs = _run_lengths(counts) if isinstance(counts, str) else counts
    are_runs = isinstance(runs, list) and all(is_a(run, int) and run >= 0 for run in runs)
    if not (are_runs and sum(runs) == size[0] * size[1]) or segmentation.get('size') != size:
        raise DataError(
            f'{label} has a mask of size {segmentation.get("size")}: write "size" as the image\'s [height, width], '
            f'{size}, and as many pixels in "counts"'
        )
    rle = segmentation if isinstance(counts, str) else coco_mask.frPyObjects(segmentation, *size)
    return corners(coco_mask.toBbox(rle).tolist())


def _run_lengths(text: str) -> list[int]:
    """Run lengths in COCO's compressed form, or [-1] if they are invalid.

    Each is written in characters of five bits, lowest first; from the fourth on, it is the difference from the last but
    one.
    """
    runs: list[int] = []
    value = bits = 0
    for code in (ord(character) - 48 for character in text):
        if not 0 <= code < 64 or bits > 40:
            return [-1]
        value |= (code & 31) << bits
        bits += 5
        if not code & 32:  # the last character of a number
            value -= (1 << bits) if code & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = bits = 0
    return [-1] if bits else runs


def is_a(value: Any, kind: type | UnionType) -> bool:
    """Whether a value is of this type; a boolean is no integer."""
    return isinstance(value, kind) and not isinstance(value, bool)


def are_numbers(values: Any) -> bool:
    """Whether this is a list of finite numbers of a size that pixels can have."""
    # All of it in C: files have millions of numbers. NaN is below no number.
    return isinstance(values, list) and _NUMBERS.issuperset(map(type, values)) and all(map(_is_small, map(abs, values)))


def whole_number(value: Any) -> Any:
    """A float without fraction, which some programs write for integers, as an integer; other values as they are."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < _MAX_NUMBER else value


class PlacementCheck:
    """Compares the boxes of a file with their images and masks; a format read wrongly shows in many of them.

    A box may be loose: datasets round and pad. It is loose where its IoU with the extent of its mask is below
    `MIN_IOU`, and a side is off by more than the slack. A few loose boxes are a note; more than `MAX_LOOSE` of all are
    an error. So is any box outside its image, or apart from its mask. Boxes of crowds, and of masks without
    pixels, are compared with the image only.
    """

    def __init__(self):
        self.boxes = 0
        self.errors: list[str] = []
        self.loose: list[str] = []
        self.corner_boxes = 0  # among those with an error and the loose ones

    def add(self, annotation: dict[str, Any], image: dict[str, Any], extent: Sequence[float], label: str) -> None:
        """Check the box of a valid annotation.

        Args:
            annotation: with a valid box.
            image: the entry of its image.
            extent: of its mask, from `check_mask`.
            label: names the annotation.
        """
        self.boxes += 1
        size = image['width'], image['height']
        box = corners(annotation['bbox'])
        is_near = _is_near(box, size)
        if is_near and (annotation['iscrowd'] or not any(extent) or _fits(box, extent, size)):
            return  # run lengths may be all 0
        text = f'{label} has the box {annotation["bbox"]}'
        if not is_near:
            self.errors.append(f'{text}, which is not in the image of {size[0]} x {size[1]} pixels')
        else:
            x1, y1, x2, y2 = extent
            text += f', but its mask is in [{x1:g}, {y1:g}, {x2 - x1:g}, {y2 - y1:g}]'
            (self.loose if _touch(box, extent) else self.errors).append(text)
        self.corner_boxes += _fits(annotation['bbox'], extent, size)

    def finish(self) -> list[str]:
        """The notes on a file that is accepted.

        Raises:
            DataError: it is not; the message names the first box and says how many there are.
        """
        misplaced = self.errors + self.loose
        if self.errors or len(self.loose) > MAX_LOOSE * self.boxes:
            remedy = 'write [x, y, width, height] in pixels, or remove them'
            if self.corner_boxes > len(misplaced) / 2:
                remedy = 'they fit as [x1, y1, x2, y2], so convert them: write [x, y, width, height]'
            raise DataError(f'{misplaced[0]}; {len(misplaced)} of {self.boxes} boxes are misplaced: {remedy}')
        return [f'{len(self.loose)} boxes do not fit their masks, such as {self.loose[0]}'] if self.loose else []


def corners(box: Sequence[float]) -> list[float]:
    """The corners of [x, y, width, height]."""
    x, y, width, height = box
    return [x, y, x + width, y + height]


def _is_near(box: Sequence[float], size: tuple[int, int]) -> bool:
    """Whether a box is in its image, or slightly beyond: not by more than the image's size, which is a mistake."""
    (x1, y1, x2, y2), (width, height) = box, size
    return (
        -width <= x1 <= width + SLACK_PIXELS
        and -height <= y1 <= height + SLACK_PIXELS
        and -SLACK_PIXELS <= x2 <= 2 * width
        and -SLACK_PIXELS <= y2 <= 2 * height
    )


def _touch(box: Sequence[float], extent: Sequence[float]) -> bool:
    return all(
        low <= other_high + SLACK_PIXELS and other_low <= high + SLACK_PIXELS
        for low, high, other_low, other_high in zip(box[:2], box[2:], extent[:2], extent[2:], strict=True)
    )


def _fits(box: Sequence[float], extent: Sequence[float], size: tuple[int, int]) -> bool:
    """Whether a box fits a mask's extent, as far as both are in the image."""
    x1, y1, x2, y2 = extent
    across, down = max(SLACK_PIXELS, SLACK_FRACTION * (x2 - x1)), max(SLACK_PIXELS, SLACK_FRACTION * (y2 - y1))
    fits_across = abs(box[0] - x1) <= across and abs(box[2] - x2) <= across
    if fits_across and abs(box[1] - y1) <= down and abs(box[3] - y2) <= down:
        return True
    box, extent = _clip(box, size), _clip(extent, size)
    both = _area([*map(max, box[:2], extent[:2]), *map(min, box[2:], extent[2:])])
    return both >= MIN_IOU * (_area(box) + _area(extent) - both) and both > 0


def _clip(box: Sequence[float], size: tuple[int, int]) -> list[float]:
    return [min(max(x, 0), length) for x, length in zip(box, size * 2, strict=True)]


def _area(box: Sequence[float]) -> float:
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)
