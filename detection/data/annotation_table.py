"""Images and annotations of a file in COCO's format, in flat arrays: small, shared by processes, and quick to select.

Shapes: n objects, N images.
"""

import json
import struct
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, Self

import msgspec
import numpy as np

# The columns of a table of annotations; `image` is the number of the image in the file, from 0, and `has_area` says
# whether the box is large enough to train on.
COLUMNS = np.dtype(
    [
        ('id', '<i8'),
        ('image_id', '<i8'),
        ('image', '<i8'),
        ('category_id', '<i8'),
        ('area', '<f8'),
        ('iscrowd', '?'),
        ('has_area', '?'),
    ]
)
_pack = struct.Struct('<qqqqd??').pack


class JsonList(Sequence[Any]):
    """A list of JSON values, each as the text that `json.dumps` writes: Python objects take several times the memory.

    Objects would also be copied in each forked worker, which counts references to them.

    Args:
        content: (bytes,) uint8, texts one after the other.
        starts: (n,) int64, where each text starts.
        ends: (n,) int64, where it ends.
    """

    def __init__(self, content: np.ndarray, starts: np.ndarray, ends: np.ndarray):
        self.content, self.starts, self.ends = content, starts, ends

    @classmethod
    def of(cls, content: np.ndarray, ends: np.ndarray) -> Self:
        """The list of texts that lie one after the other without gaps."""
        return cls(content, np.concatenate(([0], ends)).astype(np.int64)[:-1], ends)

    def __len__(self) -> int:
        return len(self.ends)

    def text(self, index: int) -> bytes:
        """The JSON of an item."""
        return self.content[self.starts[index] : self.ends[index]].tobytes()

    def __getitem__(self, index: int) -> Any:
        return from_json(self.text(index))

    def take(self, indices: np.ndarray) -> Self:
        """These items; texts are copied where most of them are left out."""
        starts, ends = self.starts[indices], self.ends[indices]
        lengths = ends - starts
        if 2 * lengths.sum() > len(self.content):
            return type(self)(self.content, starts, ends)
        parts = [self.content[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
        new_ends = lengths.cumsum()
        return type(self)(np.concatenate([self.content[:0], *parts]), new_ends - lengths, new_ends)


class JsonListWriter:
    """Builds a `JsonList`."""

    def __init__(self):
        self._content, self._ends = bytearray(), array('q')

    def add(self, item: Any) -> None:
        """Append an item."""
        self._content += to_json(item)
        self._ends.append(len(self._content))

    def finish(self) -> JsonList:
        """The list; nothing can be added to it."""
        return JsonList.of(np.frombuffer(self._content, np.uint8), np.frombuffer(self._ends, np.int64))


def to_json(value: Any) -> bytes:
    """A value as `json.dumps` writes it, at several times its speed."""
    try:
        text = msgspec.json.format(msgspec.json.encode(value), indent=0)
    except (ValueError, OverflowError):  # half of a surrogate pair, and integers of more than 64 bits
        return json.dumps(value).encode()
    # Floats that Python writes with an exponent, NaN in what nothing reads, and characters that it escapes
    if b'e' in text or b'0.0000' in text or b'null' in text or not text.isascii():
        return json.dumps(value).encode()
    return text


def from_json(text: bytes) -> Any:
    """The value of a text that `to_json` has written."""
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:  # NaN, or half of a surrogate pair
        return json.loads(text)


class ImageTable(Sequence[dict[str, Any]]):
    """Entries of images: `id`, `file_name`, `width` and `height`.

    Args:
        ids: (N,) int64.
        sizes: (N, 2) int64, width and height in pixels.
        names: of the files.
    """

    def __init__(self, ids: np.ndarray, sizes: np.ndarray, names: JsonList):
        self.ids, self.sizes, self.names = ids, sizes, names

    @classmethod
    def of(cls, entries: Iterable[dict[str, Any]]) -> Self:
        """The table of entries, which may have more keys."""
        ids, sizes, names = array('q'), array('q'), JsonListWriter()
        for entry in entries:
            ids.append(entry['id'])
            sizes.extend((entry['width'], entry['height']))
            names.add(entry['file_name'])
        return cls(np.frombuffer(ids, np.int64), np.frombuffer(sizes, np.int64).reshape(-1, 2), names.finish())

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        width, height = self.sizes[index].tolist()
        return {'id': int(self.ids[index]), 'file_name': self.names[index], 'width': width, 'height': height}

    def take(self, indices: np.ndarray) -> Self:
        """These images."""
        return type(self)(self.ids[indices], self.sizes[indices], self.names.take(indices))


class AnnotationTable(Sequence[dict[str, Any]]):
    """Annotations: `id`, `image_id`, `category_id`, `area`, `iscrowd`, `bbox` and, where it has a mask, `segmentation`.

    Args:
        columns: (n,) of `COLUMNS`.
        shapes: a list per annotation: its category, its box and its mask, if it has one.
    """

    def __init__(self, columns: np.ndarray, shapes: JsonList):
        self.columns, self.shapes = columns, shapes

    def __len__(self) -> int:
        return len(self.columns)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, image_id, _, category_id, area, is_crowd, _ = self.columns[index].item()
        annotation = {'id': number, 'image_id': image_id, 'category_id': category_id, 'area': area}
        annotation |= {'iscrowd': int(is_crowd)}
        annotation |= zip(('bbox', 'segmentation'), self.shapes[index][1:], strict=False)
        return annotation

    def take(self, indices: np.ndarray) -> Self:
        """These annotations."""
        return type(self)(self.columns[indices], self.shapes.take(indices))


class AnnotationTableWriter:
    """Builds an `AnnotationTable`."""

    def __init__(self):
        self._columns, self._shapes = bytearray(), JsonListWriter()

    def add(self, annotation: dict[str, Any], image: int, has_area: bool) -> None:
        """Append an annotation.

        Args:
            annotation: with all keys but, perhaps, `segmentation`.
            image: number of its image in the file, from 0.
            has_area: whether the box can be trained on.
        """
        x = annotation
        self._columns += _pack(x['id'], x['image_id'], image, x['category_id'], x['area'], x['iscrowd'], has_area)
        shape = [x['category_id'], x['bbox']]
        if 'segmentation' in x:
            shape.append(x['segmentation'])
        self._shapes.add(shape)

    def finish(self) -> AnnotationTable:
        """The table; nothing can be added to it."""
        return AnnotationTable(np.frombuffer(self._columns, COLUMNS), self._shapes.finish())
