"""A small dataset in COCO's format, with gaps in the category ids, crowds and odd sizes, as in real ones."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

CATEGORIES = [{'id': 3, 'name': 'box'}, {'id': 7, 'name': 'wedge'}, {'id': 90, 'name': 'rare'}]
SIZES = [(64, 48), (48, 64), (60, 44), (64, 64), (40, 64)]  # width and height


def rectangle(x, y, width, height):
    """An annotation's category, box and mask."""
    corners = [x, y, x + width, y, x + width, y + height, x, y + height]
    return {'category_id': 3, 'bbox': [x, y, width, height], 'segmentation': [corners]}


def wedge(x, y, width, height):
    """The same for a triangle."""
    return {'category_id': 7, 'bbox': [x, y, width, height], 'segmentation': [[x, y, x + width, y, x, y + height]]}


def crowd(width, height, rows):
    """The top rows of an image as a crowd region, in uncompressed run lengths (column by column)."""
    counts = [0] + [rows, height - rows] * width
    size = [height, width]
    return {
        'category_id': 3,
        'iscrowd': 1,
        'bbox': [0, 0, width, rows],
        'segmentation': {'counts': counts, 'size': size},
    }


def write_coco(root: Path, train: int = 6, val: int = 4, seed: int = 0) -> Path:
    """Images of noise with one to three brighter objects each, in `train/` and `val/`; no `info`, no `area`."""
    rng = np.random.default_rng(seed)
    (root / 'annotations').mkdir(parents=True)
    for split, count in (('train', train), ('val', val)):
        (root / split).mkdir()
        tree = {'images': [], 'annotations': [], 'categories': CATEGORIES}
        for number in range(count):
            width, height = SIZES[number % len(SIZES)]
            pixels = rng.integers(0, 100, (height, width, 3), dtype=np.uint8)
            image = {'id': 10 * number + 5, 'file_name': f'{number}.png', 'width': width, 'height': height}
            for _ in range(rng.integers(1, 4)):
                shape = rectangle if rng.random() < 0.5 else wedge
                w, h = (int(side) for side in rng.integers(8, 20, 2))
                x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
                tree['annotations'].append(
                    shape(x, y, w, h) | {'image_id': image['id'], 'id': len(tree['annotations'])}
                )
                pixels[y : y + h, x : x + w] += 120
            Image.fromarray(pixels).save(root / split / image['file_name'])
            tree['images'].append(image)
        write_tree(root, split, tree)
    return root


def read_tree(root: Path, split: str) -> dict:
    return json.loads((root / 'annotations' / f'instances_{split}.json').read_text())


def write_tree(root: Path, split: str, tree: dict) -> None:
    (root / 'annotations' / f'instances_{split}.json').write_text(json.dumps(tree))


def update_tree(root: Path, split: str = 'val', **sections: list) -> None:
    """Replace sections of an annotation file."""
    write_tree(root, split, read_tree(root, split) | sections)
