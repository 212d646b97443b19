"""A cache of checked annotation files: one of COCO's size takes long to check, and seconds to load again.

The cache is next to its annotation file and holds the SHA-256 hash of it, so it is never used for another content,
whatever the times of the files say. It is written atomically, so several processes may write it. It has arrays only and
is read without unpickling; a checksum of each array, which `numpy.load` verifies, shows damage.
"""

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from detection.data.annotation_table import AnnotationTable, ImageTable, JsonList
from detection.data.annotations import read_annotations
from utils import atomic_write, first_line

# Smaller files are read within a few seconds.
MIN_CACHED_BYTES = 10_000_000

# Changes with what is checked and stored: caches of other versions are replaced.
_VERSION = 1

# What zipfile and NumPy raise on a damaged file
_DAMAGE = ValueError, KeyError, TypeError, EOFError, MemoryError, NotImplementedError, RuntimeError, zipfile.BadZipFile

Log = Callable[[str], None]


def open_annotations(path: Path, with_masks: bool, needs_objects: bool, log: Log) -> dict[str, Any]:
    """Read a file of annotations, from its cache if it is large and has been read before; see `read_annotations`.

    Args:
        path: the file.
        with_masks: read the masks too.
        needs_objects: refuse a file without a section of annotations.
        log: gets a line about a large file before it is read, and about its cache.

    Raises:
        DataError: it cannot be used.
    """
    size = path.stat().st_size if path.is_file() else 0
    if size < MIN_CACHED_BYTES:
        return read_annotations(path, with_masks, needs_objects)
    cache = path.with_name(f'{path.name}.{"masks" if with_masks else "boxes"}.cache')
    log(f'reading annotation file {path}, {size / 1e6:,.0f} MB')
    digest = _sha256(path)
    tree = _load(cache, digest, path, log)
    if tree is not None and (tree['is_labelled'] or not needs_objects):
        log(f'it is loaded from its cache {cache}')
        return tree
    log('it has no cache yet: all annotations are checked, which the next start need not do')
    tree = read_annotations(path, with_masks, needs_objects)
    if digest and _sha256(path) == digest:  # the file has not been replaced meanwhile
        _save(cache, digest, path, tree, log)
    return tree


def _sha256(path: Path) -> str:
    """The hash of a file's content; empty where it cannot be read, which `read_annotations` reports."""
    try:
        with path.open('rb') as file:
            return hashlib.file_digest(file, 'sha256').hexdigest()
    except OSError:
        return ''


def _save(cache: Path, digest: str, path: Path, tree: dict[str, Any], log: Log) -> None:
    """Write the cache of a file; where the folder cannot be written, the log says so."""
    header = {key: tree[key] for key in ('info', 'categories', 'notes', 'is_labelled')}
    header |= {'version': _VERSION, 'sha256': digest, 'path': str(path)}
    images, annotations = tree['images'], tree['annotations']
    arrays = {
        'header': np.frombuffer(json.dumps(header).encode(), np.uint8),
        'image_ids': images.ids,
        'image_sizes': images.sizes,
        'image_names': images.names.content,
        'image_name_ends': images.names.ends,
        'columns': annotations.columns,
        'shapes': annotations.shapes.content,
        'shape_ends': annotations.shapes.ends,
    }
    try:
        atomic_write(cache, lambda file: np.savez(file, **arrays))
    except OSError as error:
        log(f'its cache {cache} cannot be written ({error.strerror}): the file is checked again at each start')
    else:
        log(f'the next start loads it from its cache {cache}')


def _load(cache: Path, digest: str, path: Path, log: Log) -> dict[str, Any] | None:
    """The content of a cache; None where there is none of this version and for this content of the file."""
    try:
        with np.load(cache, allow_pickle=False) as file:
            header = json.loads(file['header'].tobytes())
            if (header['version'], header['sha256']) != (_VERSION, digest):
                return None
            names = JsonList.of(file['image_names'], file['image_name_ends'])
            images = ImageTable(file['image_ids'], file['image_sizes'], names)
            annotations = AnnotationTable(file['columns'], JsonList.of(file['shapes'], file['shape_ends']))
    except FileNotFoundError:
        return None
    except (*_DAMAGE, OSError) as error:
        log(f'its cache {cache} cannot be read ({first_line(error)}), and is made again')
        return None
    # Notes name the file as it was called when it was checked.
    notes = [note.replace(header['path'], str(path)) for note in header['notes']]
    tree = {key: header[key] for key in ('info', 'categories', 'is_labelled')}
    return tree | {'images': images, 'annotations': annotations, 'notes': notes}
