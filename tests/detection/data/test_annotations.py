"""Reading COCO's annotation format, and refusing what is not in it."""

import json

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from data import DataError
from detection.data.annotations import decode_masks, read_annotations
from tests.helpers.coco_data import CATEGORIES, rectangle, update_tree


def annotation_file(root):
    return root / 'annotations' / 'instances_val.json'


def read_masks(root, *segmentations):
    """Masks of objects with these segmentations in the first image, which has 64 x 48 pixels."""
    annotations = [rectangle(4, 4, 9, 9) | {'image_id': 5, 'segmentation': x} for x in segmentations]
    update_tree(root, annotations=annotations)
    tree = read_annotations(annotation_file(root))
    return decode_masks(tree['annotations'], tree['images'][0])


def test_missing_info_crowd_flags_areas_and_ids_are_filled_in(coco):
    path = annotation_file(coco)
    assert not {'info', 'licenses'} & json.loads(path.read_text()).keys()
    tree = read_annotations(path)
    assert tree['info'] == {}
    assert [x['id'] for x in tree['annotations']] == list(range(1, len(tree['annotations']) + 1))
    for annotation in tree['annotations']:
        assert annotation['iscrowd'] == 0
        _, _, width, height = annotation['bbox']
        fraction = 1 if annotation['category_id'] == 3 else 0.5  # a rectangle or a triangle
        assert annotation['area'] == pytest.approx(width * height * fraction, rel=0.15)


def test_polygons_and_both_forms_of_run_lengths_give_the_same_mask(coco):
    mask = np.zeros((48, 64), dtype=np.uint8)
    mask[4:10, 8:18] = 1
    columns = np.diff(np.flatnonzero(np.diff(np.concatenate(([0], mask.flatten('F'), [0])))))
    counts = [8 * 48 + 4, *columns.tolist()]
    counts.append(48 * 64 - sum(counts))
    compressed = coco_mask.encode(np.asfortranarray(mask))
    compressed['counts'] = compressed['counts'].decode()
    polygon = rectangle(8, 4, 10, 6)['segmentation']
    masks = read_masks(coco, polygon, {'size': [48, 64], 'counts': counts}, compressed)
    assert torch.equal(masks, torch.from_numpy(mask).expand(3, -1, -1))


def test_compressed_run_lengths_of_pycocotools_are_read(coco):
    rng = np.random.default_rng(0)
    masks = [rng.random((48, 64)) < density for density in (0.02, 0.5, 1)]
    masks.append(np.arange(48)[:, None] + 20 < np.arange(64))  # long runs with small differences
    rles = [coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]
    decoded = read_masks(coco, *({'size': [48, 64], 'counts': rle['counts'].decode()} for rle in rles))
    assert (decoded.numpy() == masks).all()


@pytest.mark.parametrize(
    ('sections', 'message'),
    [
        ({'images': None}, 'has no list "images": it is not in COCO\'s instance format'),
        ({'annotations': [1]}, 'has no list "annotations"'),
        ({'categories': []}, 'has no categories'),
        ({'images': [{'id': 5, 'file_name': 'a.png', 'width': 4}]}, 'entry 0 of "images" has no height: add it'),
        ({'categories': [*CATEGORIES, CATEGORIES[0]]}, 'two of the categories have the id 3'),
        ({'categories': [{'id': '3', 'name': 'box'}]}, 'entry 0 of "categories" has the id \'3\': write an integer'),
        ({'images': [{'id': 5, 'file_name': 7, 'width': 4, 'height': 4}]}, 'has the file_name 7: write text'),
        ({'images': [{'id': 5, 'file_name': 'a.png', 'width': 4, 'height': 0}]}, 'a.png has no width and height'),
    ],
)
def test_invalid_sections_are_named(coco, sections, message):
    update_tree(coco, **sections)
    with pytest.raises(DataError, match=f'instances_val.json.*{message}'):
        read_annotations(annotation_file(coco))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'image_id': 6}, 'annotation 41 is of image 6, which is not among the images'),
        ({'category_id': 4}, 'annotation 41 is of category 4, which is not among the categories'),
        ({'bbox': [1, 2, -3, 4]}, r'annotation 41, of 0.png, has the box \[1, 2, -3, 4\]: write \[x, y, width'),
        ({'bbox': [1, 2, 3]}, r'has the box \[1, 2, 3\]'),
        ({'bbox': [float('nan'), 2, 3, 4]}, r'has the box \[nan'),
        ({'segmentation': []}, 'annotation 41, of 0.png, has no mask: write its "segmentation" as polygons'),
        ({'segmentation': [[1, 2, 3, 4]]}, 'has no mask'),
        ({'segmentation': {'size': [40, 30], 'counts': [5, -1]}}, 'has a mask of size'),
        ({'segmentation': {'size': [40, 30], 'counts': [5, 3]}}, 'has a mask of size'),
        ({'segmentation': {'counts': [48 * 64], 'size': [64, 48]}}, r'mask of size \[64, 48\].*\[48, 64\]'),
        ({'segmentation': {'counts': [0.5, 3071.5], 'size': [48, 64]}}, 'has a mask of size'),
        ({'segmentation': {'counts': '', 'size': [48, 64]}}, 'has a mask of size'),
        ({'segmentation': {'counts': '11', 'size': [48, 64]}}, 'has a mask of size'),
        ({'segmentation': {'counts': 'ooo', 'size': [48, 64]}}, 'has a mask of size'),
        ({'segmentation': {'counts': 'no runs!', 'size': [48, 64]}}, 'has a mask of size'),
        ({'segmentation': [[1, 2, 1e9, 4, 5, 6]]}, 'has a corner at 1000000000.0, far outside the image'),
        ({'segmentation': [[1, 2, 60, -49, 5, 6]]}, 'has a corner at -49, far outside'),
        ({'iscrowd': None}, 'has iscrowd None: write 0 or 1'),
        ({'iscrowd': '0'}, "has iscrowd '0': write 0 or 1"),
        ({'area': '12'}, "has the area '12': write the pixels"),
        ({'area': float('nan')}, 'has the area nan'),
        ({'image_id': [5]}, r'entry 0 of "annotations" has the image_id \[5\]: write an integer'),
    ],
)
def test_invalid_annotations_are_named(coco, change, message):
    update_tree(coco, annotations=[rectangle(4, 4, 10, 10) | {'image_id': 5, 'id': 41} | change])
    with pytest.raises(DataError, match=message):
        read_annotations(annotation_file(coco))


def test_a_file_that_is_missing_or_no_json_is_named(coco):
    path = annotation_file(coco)
    path.write_text(path.read_text()[:50])
    with pytest.raises(DataError, match=r'instances_val.json is not JSON'):
        read_annotations(path)
    path.unlink()
    with pytest.raises(DataError, match=r'instances_val.json cannot be read \(No such file.*give --data-path'):
        read_annotations(path)
