"""A prediction as a line of text, a row of CSV and an object of JSON."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from text_files import csv_row
from tools.unknown import UNKNOWN
from utils import printable

# Closes the list of `json_parts`
JSON_END = '\n]\n'


class Prediction(NamedTuple):
    """An image with its most likely classes, or with the reason why it cannot be read.

    Attributes:
        path: the image.
        indices: of the classes, most likely first; empty where the image cannot be read.
        probabilities: of these classes.
        label: index of the class that has the name of the image's folder, if there is one.
        error: empty where the image can be read.
        is_unknown: whether the image probably shows none of the classes; None without `TEST.UNKNOWN_SCORE`.
    """

    path: Path
    indices: list[int]
    probabilities: list[float]
    label: int | None
    error: str
    is_unknown: bool | None = None

    def top(self, class_names: Sequence[str]) -> Iterator[tuple[str, int, float]]:
        """Name, index and probability of each class."""
        for index, probability in zip(self.indices, self.probabilities, strict=True):
            yield class_names[index], index, probability


def text_line(prediction: Prediction, class_names: Sequence[str]) -> str:
    """The path, then name and probability of each class, and a remark if the image probably shows none of them.

    There are tabs between them. Control characters are escaped.
    """
    classes = (f'{printable(name)}\t{p:.3f}' for name, _, p in prediction.top(class_names))
    return '\t'.join([printable(prediction.path), *classes, *([UNKNOWN] if prediction.is_unknown else [])])


def csv_rows(
    predictions: Iterable[Prediction], class_names: Sequence[str], topk: int, has_unknown: bool = False
) -> Iterator[str]:
    """A header, and a row per image; the columns of the second class are class_2, index_2, probability_2, and so on.

    With `has_unknown`, a last column says whether the image probably shows none of the classes: 1 or 0.
    """
    suffixes = ['', *(f'_{rank}' for rank in range(2, topk + 1))]
    columns = ('class', 'index', 'probability')
    header = ['path', 'error', *(f'{column}{suffix}' for suffix in suffixes for column in columns)]
    yield csv_row(header + ['unknown'] * has_unknown)
    for prediction in predictions:
        top = [(name, index, f'{p:.6f}') for name, index, p in prediction.top(class_names)] or [[''] * 3] * topk
        flag = '' if prediction.is_unknown is None else int(prediction.is_unknown)
        cells = [cell for cells in top for cell in cells] + [flag] * has_unknown
        yield csv_row([prediction.path, prediction.error, *cells])


def json_parts(predictions: Iterable[Prediction], class_names: Sequence[str]) -> Iterator[str]:
    """A list with an object per image, each on a separate line; `JSON_END` is to follow the last part."""
    yield '['
    separator = '\n'
    for prediction in predictions:
        top = prediction.top(class_names)
        entry = {
            'path': str(prediction.path),
            'predictions': [{'class': name, 'index': index, 'probability': round(p, 6)} for name, index, p in top],
            'error': prediction.error or None,
        }
        if prediction.is_unknown is not None:
            entry['unknown'] = prediction.is_unknown
        yield separator + json.dumps(entry)
        separator = ',\n'
