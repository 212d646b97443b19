"""Read all images of a dataset, and find duplicates: byte-identical files, and re-encoded or resized copies.

Copies are found by a perceptual hash: imagehash's `phash` with 256 bits. Photographs that are encoded again or resized
mostly differ from the original in fewer than 16 bits, and different ones in more than 50. Crops and mirrored copies are
not found.
"""

import hashlib
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import imagehash
import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch.utils.data import Dataset
from tqdm import tqdm

from data.images import ImageHeader, decode_image, read_header
from data.workers import WorkerLoader

# Bits in which the perceptual hashes of two copies may differ
MAX_DISTANCE = 16

HASH_BITS = 256

# Grey levels by which the pixels of a thumbnail must vary: the hash of a flat image says nothing.
_MIN_CONTRAST = 2

# Images that are compared with each other where parts of their hashes agree, in the order of the hashes
_MAX_NEIGHBOURS = 128


class CheckedImage(NamedTuple):
    """What is known of an image.

    Attributes:
        content: see `content_hash`; 0 for an image that cannot be read.
        picture: see `perceptual_hash`; empty for an image that cannot be read.
        is_rotated: whether its EXIF tag turns it.
        kind, text: of its problem, or two empty strings.
    """

    content: int = 0
    picture: bytes = b''
    is_rotated: bool = False
    kind: str = ''
    text: str = ''


def check_image(data: bytes, name: str) -> tuple[CheckedImage, ImageHeader]:
    """Decode an encoded image, without warnings.

    Raises:
        DataError: it cannot be decoded.
    """
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        image, header = decode_image(data, name), read_header(name, data)
    return CheckedImage(content_hash(data), perceptual_hash(image), header.orientation != 1), header


def check_images(dataset: Dataset, workers: int, name: str) -> Iterator[CheckedImage]:
    """Read all images of a dataset, in order, with a progress bar.

    Args:
        dataset: of `CheckedImage`.
        workers: processes; 0 reads in this one.
        name: of the split, for the progress bar.
    """
    loader = WorkerLoader(dataset, batch_size=32, num_workers=workers, collate_fn=list)
    with tqdm(total=len(dataset), desc=f'check {name}', unit='image', disable=None) as bar:
        for batch in loader:
            yield from batch
            bar.update(len(batch))


def content_hash(data: bytes) -> int:
    """A hash of a file's content that fits into 64 bits, and is not 0."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), 'little') or 1


def perceptual_hash(image: Image.Image) -> bytes:
    """The perceptual hash of an image, `HASH_BITS` bits; empty for a flat image."""
    thumbnail = image.convert('L').resize((64, 64), Image.Resampling.LANCZOS)
    if np.asarray(thumbnail).std() < _MIN_CONTRAST:
        return b''
    return np.packbits(imagehash.phash(thumbnail, hash_size=16).hash).tobytes()


def similar_pairs(hashes: list[bytes]) -> np.ndarray:
    """Pairs of images whose perceptual hashes differ in at most `MAX_DISTANCE` bits.

    Two hashes that differ in at most 16 bits agree in at least one of 17 parts. So only images that agree in a part are
    compared; where many do, each is compared with the next `_MAX_NEIGHBOURS` of them.

    Args:
        hashes: of `perceptual_hash`.

    Returns:
        Indices (pairs, 2), the smaller one first, sorted. Of images with equal hashes, each is paired with the first.
    """
    known = np.array([index for index, value in enumerate(hashes) if value], np.int64)
    if not len(known):
        return np.zeros((0, 2), np.int64)
    codes = np.frombuffer(b''.join(hashes), np.uint64).reshape(len(known), -1)
    unique, first, inverse = np.unique(codes, axis=0, return_index=True, return_inverse=True)
    inverse = inverse.reshape(-1)
    equal = np.flatnonzero(first[inverse] != np.arange(len(known)))
    found = [np.zeros(0, np.int64)]  # pairs (i, j) of `unique` as i * its length + j
    bits = np.unpackbits(unique.view(np.uint8), axis=1)
    for part in np.array_split(np.arange(HASH_BITS), MAX_DISTANCE + 1):
        key = bits[:, part] @ (1 << np.arange(len(part)))
        order = np.argsort(key, kind='stable')
        key = key[order]
        for step in range(1, min(len(order), _MAX_NEIGHBOURS + 1)):
            starts = np.flatnonzero(key[:-step] == key[step:])
            if not len(starts):
                break
            one, other = order[starts], order[starts + step]
            near = np.bitwise_count(unique[one] ^ unique[other]).sum(axis=1, dtype=np.int64) <= MAX_DISTANCE
            found.append(one[near] * len(unique) + other[near])
        found = [np.unique(np.concatenate(found))]
    one, other = divmod(found[0], len(unique))
    pairs = np.concatenate([np.stack([first[inverse[equal]], equal], 1), np.stack([first[one], first[other]], 1)])
    pairs = known[np.sort(pairs, axis=1)]
    return pairs[np.lexsort(pairs.T[::-1])]


def group_copies(contents: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """A number for each image (N,) int64 that is the same for copies of one picture.

    Args:
        contents: `content_hash` of each image (N,).
        pairs: indices (P, 2) of images that are copies of each other too.
    """
    _, first, inverse = np.unique(contents, return_index=True, return_inverse=True)
    nodes = np.arange(len(contents))
    edges = np.concatenate([np.stack([nodes, first[inverse.reshape(-1)]], axis=1), pairs])
    graph = coo_array((np.ones(len(edges), np.int8), edges.T), shape=(len(nodes), len(nodes)))
    return connected_components(graph, directed=False)[1].astype(np.int64)
