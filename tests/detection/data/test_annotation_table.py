"""Annotations in flat arrays: texts as json.dumps writes them, selections, and the memory that reading takes."""

import json
import math
import tracemalloc

import numpy as np
import pytest

from detection.data import annotations as annotations_module
from detection.data.annotation_table import JsonListWriter, from_json, to_json
from detection.data.annotations import read_annotations, read_class_names
from tests.helpers.coco_data import CATEGORIES, read_tree, update_tree

VALUES = [0, -0.0, 1.0, 5e-5, 1e-4, 123.456, 0.1 + 0.2, 1e15, 1e16, 2**63, 10**30, math.inf, math.nan, None, True]
VALUES += ['é', '\ud800', 'a"\\\n', 'counts', {'size': [3, 4], 'counts': '0e\\'}, [], [[1, 2.5], []]]


@pytest.mark.parametrize('value', VALUES, ids=repr)
def test_texts_are_those_of_json_dumps(value):
    text = to_json([7, value])
    assert text == json.dumps([7, value]).encode()
    assert repr(from_json(text)) == repr([7, value])


def test_random_coordinates_are_written_as_by_json_dumps():
    rng = np.random.default_rng(0)
    for _ in range(200):
        numbers = rng.normal(size=50) * 10 ** rng.uniform(-8, 11, 50)
        numbers = [*numbers.tolist(), *numbers.round(2).tolist(), *numbers.astype(np.int64).tolist()]
        assert to_json(numbers) == json.dumps(numbers).encode()


@pytest.mark.parametrize('indices', [[], [3], [0, 2, 1], range(8), [7, 6, 5, 4, 3]])
def test_items_are_taken_in_any_order(indices):
    writer, items = JsonListWriter(), [[i] * 10**i for i in range(4)] + [{'a': i} for i in range(4)]
    for item in items:
        writer.add(item)
    values = writer.finish()
    assert list(values) == items
    taken = values.take(np.array(indices, dtype=np.int64))
    assert list(taken) == [items[i] for i in indices]
    assert list(taken.take(np.arange(len(taken))[::-1])) == [items[i] for i in indices][::-1]


def test_reading_takes_a_fraction_of_the_memory_of_pythons_parser(coco):
    tree = read_tree(coco, 'val')
    update_tree(coco, annotations=tree['annotations'] * 1000)
    path = coco / 'annotations' / 'instances_val.json'
    peaks = []
    for function in (lambda: json.loads(path.read_bytes()), lambda: read_annotations(path)):
        tracemalloc.start()
        function()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 0.5 * peaks[0]


def test_classes_are_read_without_the_annotations(coco, monkeypatch):
    path = coco / 'annotations' / 'instances_val.json'
    update_tree(coco, annotations=[{'anything': []}])
    monkeypatch.setattr(annotations_module, 'read_tree', None)  # Python's parser
    assert read_class_names(path) == [category['name'] for category in CATEGORIES]
    assert read_class_names(path, ['rare', 'box']) == ['box', 'rare']


def test_files_that_only_pythons_parser_reads_are_read(coco):
    path = coco / 'annotations' / 'instances_val.json'
    expected = list(read_annotations(path)['annotations'])
    tree = read_tree(coco, 'val') | {'comment': math.nan}
    for encoding in ('utf-8-sig', 'utf-16', 'utf-32'):
        path.write_text(json.dumps(tree), encoding=encoding)
        assert list(read_annotations(path)['annotations']) == expected
        assert read_class_names(path) == [category['name'] for category in CATEGORIES]
