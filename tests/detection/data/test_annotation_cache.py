"""The cache of large annotation files: the same content, for as long as the file is the same."""

import json
import os
import shutil

import numpy as np
import pytest

from data import DataError
from detection.data import CocoDataset, annotation_cache
from detection.data.annotation_cache import open_annotations
from detection.data.annotations import read_annotations
from tests.helpers.bad_files import damaged_files
from tests.helpers.coco_data import crowd, read_tree, rectangle, update_tree, write_tree
from tests.helpers.processes import run_ranks

LOADED, CHECKED = 'it is loaded from its cache', 'all annotations are checked'


@pytest.fixture
def path(coco, monkeypatch):
    """The annotation file of `val`, as if it were large."""
    monkeypatch.setattr(annotation_cache, 'MIN_CACHED_BYTES', 1)
    return coco / 'annotations' / 'instances_val.json'


def read(path, with_masks=True, needs_objects=True):
    """The content of a file, and whether it comes from the cache."""
    lines = []
    tree = open_annotations(path, with_masks, needs_objects, lines.append)
    assert lines[0] == f'reading annotation file {path}, {path.stat().st_size / 1e6:,.0f} MB'
    is_loaded, is_checked = (any(text in line for line in lines) for text in (LOADED, CHECKED))
    assert is_loaded != is_checked
    return plain(tree), is_loaded


def plain(tree):
    """The content of a file as plain values."""
    return tree | {'images': list(tree['images']), 'annotations': list(tree['annotations'])}


def cache_of(path, kind='masks'):
    return path.with_name(f'{path.name}.{kind}.cache')


def test_a_cache_has_what_the_file_has(coco, path):
    loose = rectangle(4, 5, 20, 20) | {'bbox': [4, 5, 20, 45]}
    odd = [loose, crowd(64, 48, rows=9), rectangle(4, 4, 10, 0.5), rectangle(1e-5, 2.5, 30.0, 7) | {'segmentation': []}]
    annotations = [x | {'image_id': 5} for x in odd] + [rectangle(4, 5, 20, 10) | {'image_id': 15}] * 200
    update_tree(coco, annotations=annotations, info={'ü': 'é \ud800'})
    expected = plain(read_annotations(path))
    assert any(str(path) in note for note in expected['notes'])
    assert read(path) == (expected, False)
    assert read(path) == (expected, True)
    folder = shutil.copytree(coco / 'annotations', coco / 'copy')
    copy, is_loaded = read(folder / path.name)
    assert is_loaded
    assert copy['notes'] == [note.replace(str(path), str(folder / path.name)) for note in expected['notes']]
    boxes, is_loaded = read(path, with_masks=False)
    assert not is_loaded
    assert boxes == plain(read_annotations(path, with_masks=False))
    assert cache_of(path, 'boxes').exists()


def test_datasets_and_their_names_are_the_same_from_the_cache(coco, path):
    datasets = [CocoDataset(coco, 'val') for _ in range(2)]
    assert cache_of(path).exists()
    assert [list(x.sample_names()) for x in datasets[:1]] == [list(x.sample_names()) for x in datasets[1:]]
    expected = []
    for image in read_tree(coco, 'val')['images']:
        objects = [x for x in read_tree(coco, 'val')['annotations'] if x['image_id'] == image['id']]
        values = [[x['category_id'], x['bbox'], x['segmentation']] for x in objects]
        expected.append(f'{image["file_name"][:-4]} {json.dumps(values)}')
    assert list(datasets[1].sample_names()) == expected
    for one, other in zip(*datasets, strict=True):
        assert all(np.array_equal(one[1][key], other[1][key]) for key in one[1])


def test_a_changed_file_is_checked_again_whatever_its_time_and_size(coco, path):
    read(path)
    times, size = (path.stat().st_atime_ns, path.stat().st_mtime_ns), path.stat().st_size
    path.write_text(path.read_text().replace('"box"', '"bax"'))
    os.utime(path, ns=times)
    assert path.stat().st_size == size
    tree, is_loaded = read(path)
    assert not is_loaded
    assert tree['categories'][0]['name'] == 'bax'
    assert read(path)[1]
    update_tree(coco, annotations=[rectangle(4, 4, 10, 10) | {'image_id': 6}])
    with pytest.raises(DataError, match='is of image 6, which is not among the images'):
        read(path)


def test_a_damaged_cache_is_made_again(path):
    expected, _ = read(path)
    good = cache_of(path).read_bytes()
    for content in [b'', good[:100], good[:-1], *damaged_files(good, 60)]:
        cache_of(path).write_bytes(content)
        tree, is_loaded = read(path)
        assert tree == expected
        if not is_loaded:
            assert cache_of(path).read_bytes() != content
            assert read(path) == (expected, True)


def test_a_cache_of_another_version_is_made_again(path, monkeypatch):
    expected, _ = read(path)
    monkeypatch.setattr(annotation_cache, '_VERSION', 0)
    assert read(path) == (expected, False)


def test_a_folder_that_cannot_be_written_costs_the_cache_only(path, monkeypatch):
    def fail(*args):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(annotation_cache, 'atomic_write', fail)
    lines = []
    open_annotations(path, True, True, lines.append)
    assert lines[-1].endswith('cannot be written (Permission denied): the file is checked again at each start')
    assert not cache_of(path).exists()


def test_a_file_that_changes_while_it_is_read_is_not_cached(coco, path, monkeypatch):
    def read_and_change(path, *args):
        tree = read_annotations(path, *args)
        path.write_text(path.read_text() + ' ')
        return tree

    monkeypatch.setattr(annotation_cache, 'read_annotations', read_and_change)
    open_annotations(path, True, True, print)
    assert not cache_of(path).exists()


def test_small_files_are_not_cached(coco):
    lines = []
    path = coco / 'annotations' / 'instances_val.json'
    open_annotations(path, True, True, lines.append)
    assert (lines, cache_of(path).exists()) == ([], False)


def test_a_file_without_annotations_stays_one(coco, path):
    tree = read_tree(coco, 'val')
    write_tree(coco, 'val', {key: tree[key] for key in ('images', 'categories')})
    assert not read(path, needs_objects=False)[0]['is_labelled']
    assert read(path, needs_objects=False)[1]
    with pytest.raises(DataError, match='has no list "annotations"'):
        read(path)


def read_often(rank, path):
    """Read a file many times, and remove its cache now and then."""
    annotation_cache.MIN_CACHED_BYTES = 1
    expected = plain(read_annotations(path))
    for number in range(20):
        assert plain(open_annotations(path, True, True, lambda text: None)) == expected
        if number % 3 == rank:
            cache_of(path).unlink(missing_ok=True)


def test_two_processes_may_write_a_cache_at_once(coco):
    path = coco / 'annotations' / 'instances_val.json'
    run_ranks(read_often, path, nodes='aa')
    assert not list(path.parent.glob('*.tmp'))


def test_a_large_file_that_cannot_be_read_is_refused_in_one_line(path, monkeypatch):
    size = path.stat()
    monkeypatch.setattr(type(path), 'is_file', lambda self: True)
    monkeypatch.setattr(type(path), 'stat', lambda self, **_: size)
    path.unlink()
    with pytest.raises(DataError, match='annotation file .* cannot be read'):
        open_annotations(path, True, True, print)
