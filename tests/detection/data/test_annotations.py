"""Reading COCO's annotation format, and refusing what is not in it."""

import json

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from data import DataError
from detection.data.annotations import decode_masks, read_annotations
from tests.helpers.coco_data import CATEGORIES, crowd, read_tree, rectangle, update_tree


def annotation_file(root):
    return root / 'annotations' / 'instances_val.json'


def read_masks(root, box, *segmentations):
    """Masks of objects with this box and these segmentations in the first image, which has 64 x 48 pixels."""
    annotations = [rectangle(*box) | {'image_id': 5, 'segmentation': x} for x in segmentations]
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
    masks = read_masks(coco, (8, 4, 10, 6), polygon, {'size': [48, 64], 'counts': counts}, compressed)
    assert torch.equal(masks, torch.from_numpy(mask).expand(3, -1, -1))


def test_compressed_run_lengths_of_pycocotools_are_read(coco):
    rng = np.random.default_rng(0)
    masks = [rng.random((48, 64)) < density for density in (0.02, 0.5, 1)]
    masks.append(np.arange(48)[:, None] + 20 < np.arange(64))  # long runs with small differences
    rles = [coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]
    decoded = read_masks(coco, (0, 0, 64, 48), *({'size': [48, 64], 'counts': rle['counts'].decode()} for rle in rles))
    assert (decoded.numpy() == masks).all()


def test_polygons_without_area_count_for_their_boxes_alone(coco):
    flat = [[[]], [[20, 20, 30, 20]], [[20, 20], []]]
    objects = [rectangle(20, 20, 10, 10) | {'image_id': 5, 'segmentation': x} for x in flat]
    update_tree(coco, annotations=[*objects, rectangle(4, 4, 10, 10) | {'image_id': 5}])
    tree = read_annotations(annotation_file(coco))
    assert ['segmentation' in x for x in tree['annotations']] == [False, False, False, True]
    assert [x['area'] for x in tree['annotations']] == [100] * 4
    assert tree['notes'] == [
        '3 of 4 annotations have no mask, and count for boxes only',
        f'3 of them have polygons of fewer than three corners, such as {annotation_file(coco)}: annotation 1, of 0.png',
    ]


def test_plain_oddities_are_read(coco):
    """Ids of annotations and keys that nothing reads may be anything; whole floats and null areas are understood."""
    tree = read_tree(coco, 'val')
    expected = read_annotations(annotation_file(coco))
    for x in tree['annotations']:
        x |= {'id': f'6f1c-{x["id"]}', 'image_id': float(x['image_id']), 'width': 3.5, 'name': None, 'area': None}
        x |= {'category_id': float(x['category_id']), 'iscrowd': False, 'attributes': [1], 'file_name': 7}
    for x in tree['images']:
        x |= {'width': float(x['width']), 'name': 3, 'category_id': None}
    update_tree(coco, annotations=tree['annotations'], images=tree['images'])
    read = read_annotations(annotation_file(coco))
    keys = ('id', 'image_id', 'category_id', 'bbox', 'area', 'iscrowd', 'segmentation')
    for ours, theirs in zip(read['annotations'], expected['annotations'], strict=True):
        assert {key: ours[key] for key in keys} == {key: theirs[key] for key in keys}
        assert type(ours['image_id']) is type(ours['iscrowd']) is int


def test_images_with_texts_as_ids_are_numbered(coco):
    tree = read_tree(coco, 'val')
    for x in tree['images']:
        x['id'] = f'../{x["id"]}'
    for x in tree['annotations']:
        x['image_id'] = f'../{x["image_id"]}'
    update_tree(coco, annotations=tree['annotations'], images=tree['images'])
    read = read_annotations(annotation_file(coco))
    assert [x['id'] for x in read['images']] == [1, 2, 3, 4]
    of_file = [int(x['image_id'][3:]) // 10 + 1 for x in tree['annotations']]
    assert [x['image_id'] for x in read['annotations']] == of_file
    assert any('ids of images are texts: results have numbers instead' in note for note in read['notes'])
    update_tree(coco, annotations=[rectangle(4, 4, 10, 10) | {'image_id': 1}])
    with pytest.raises(DataError, match='is of image 1, which is not among the images'):
        read_annotations(annotation_file(coco))


@pytest.mark.parametrize(
    ('sections', 'message'),
    [
        ({'images': None}, 'has no list "images": it is not in COCO\'s instance format'),
        ({'annotations': [1]}, 'entry 0 of "annotations" is not an object: remove it'),
        ({'categories': []}, 'has no categories'),
        ({'images': [{'id': 5, 'file_name': 'a.png', 'width': 4}]}, 'entry 0 of "images" has no height: add it'),
        ({'categories': [*CATEGORIES, CATEGORIES[0]]}, 'two of the categories have the id 3'),
        ({'categories': [*CATEGORIES, {'id': 8, 'name': 'wedge'}]}, "two of the categories have the name 'wedge'"),
        ({'categories': [{'id': '3', 'name': 'box'}]}, 'entry 0 of "categories" has the id \'3\': write an integer'),
        ({'images': [{'id': 5, 'file_name': 7, 'width': 4, 'height': 4}]}, 'has the file_name 7: write text'),
        ({'images': [{'id': 5, 'file_name': 'a.png', 'width': 4, 'height': 0}]}, 'a.png has no width and height'),
        (
            {'images': [{'id': 5, 'file_name': 'a.png', 'width': 10**9, 'height': 48}]},
            'has 1000000000 x 48 pixels, too',
        ),
        (
            {'images': [{'id': True, 'file_name': 'a.png', 'width': 4, 'height': 4}]},
            'has the id True: write an integer',
        ),
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
        ({'segmentation': []}, 'no annotation has a mask: write --opts MODEL.MASK.ENABLED False for boxes only'),
        ({'segmentation': None}, 'no annotation has a mask'),
        ({'segmentation': [[1, 2, 3, 4]]}, 'no annotation has a mask'),
        (
            {'segmentation': [[1, 2, 3, 4, 5]]},
            'annotation 41, of 0.png, has no mask: write its "segmentation" as',
        ),
        ({'segmentation': [1, 2, 3, 4, 5, 6]}, 'annotation 41, of 0.png, has no mask'),
        ({'segmentation': [[1, 2, 60, 4] * 50_000]}, 'has a mask with an outline of 5900000 pixels'),
        ({'bbox': [1, 2, 10**400, 4]}, 'has the box'),
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


@pytest.mark.parametrize(
    ('box', 'message'),
    [
        (
            [5000, 5000, 50, 50],
            r'box \[5000, 5000, 50, 50\], which is not in the image of 64 x 48 pixels; 1 of 201 boxes',
        ),
        ([-50, -50, 5000, 5000], r'box \[-50, -50, 5000, 5000\], which is not in the image of 64 x 48 pixels'),
        ([-20, 4, 10, 10], r'box \[-20, 4, 10, 10\], which is not in the image'),
        (
            [40, 30, 10, 10],
            r'box \[40, 30, 10, 10\], but its mask is in \[4, 5, 20, 10\]; 1 of 201 boxes are misplaced',
        ),
    ],
)
def test_a_box_outside_its_image_or_apart_from_its_mask_is_refused(coco, box, message):
    right = [rectangle(4, 5, 20, 10) | {'image_id': 5}] * 200
    update_tree(coco, annotations=[rectangle(4, 5, 20, 10) | {'image_id': 5, 'id': 41, 'bbox': box}, *right])
    with pytest.raises(DataError, match=f'annotation 41, of 0.png, has the {message}.*: write .x, y, width, height'):
        read_annotations(annotation_file(coco))


@pytest.mark.parametrize('as_run_lengths', [False, True])
def test_a_file_of_corners_is_refused_with_a_hint(coco, as_run_lengths):
    tree = read_tree(coco, 'val')
    sizes = {image['id']: (image['height'], image['width']) for image in tree['images']}
    for annotation in tree['annotations']:
        x, y, width, height = annotation['bbox']
        annotation['bbox'] = [x, y, x + width, y + height]
        if as_run_lengths:
            (rle,) = coco_mask.frPyObjects(annotation['segmentation'], *sizes[annotation['image_id']])
            annotation['segmentation'] = {'size': rle['size'], 'counts': rle['counts'].decode()}
    update_tree(coco, annotations=tree['annotations'])
    with pytest.raises(DataError, match=r'boxes are misplaced: they fit as \[x1, y1, x2, y2\], so convert them'):
        read_annotations(annotation_file(coco))


def test_a_few_loose_boxes_are_noted_and_many_refused(coco):
    right, loose = rectangle(4, 5, 20, 20), rectangle(4, 5, 20, 20) | {'bbox': [4, 5, 20, 45]}
    update_tree(coco, annotations=[x | {'image_id': 5} for x in [loose] * 2 + [right] * 198])
    (note,) = read_annotations(annotation_file(coco))['notes']
    assert note.startswith('2 boxes do not fit their masks, such as')
    assert note.endswith('has the box [4, 5, 20, 45], but its mask is in [4, 5, 20, 20]')
    update_tree(coco, annotations=[x | {'image_id': 5} for x in [loose] * 3 + [right] * 198])
    with pytest.raises(DataError, match='3 of 201 boxes are misplaced'):
        read_annotations(annotation_file(coco))


def test_rounded_padded_and_clipped_boxes_are_accepted(coco):
    rounded = rectangle(3, 3, 3, 3) | {'bbox': [2, 5, 2, 2]}  # IoU of 1 in 12, but within two pixels
    padded = rectangle(10, 10, 20, 20) | {'bbox': [7, 7, 26, 26]}
    beyond = rectangle(50, 30, 14, 18) | {'bbox': [50, 30, 30, 30]}  # the image ends at 64 x 48
    border = rectangle(64, 10, 0, 10)
    empty = rectangle(4, 4, 10, 10) | {'segmentation': {'size': [48, 64], 'counts': [48 * 64]}}
    region = crowd(64, 48, rows=9) | {'bbox': [40, 30, 10, 10]}
    annotations = [rounded, padded, beyond, border, empty, region]
    update_tree(coco, annotations=[annotation | {'image_id': 5} for annotation in annotations])
    assert read_annotations(annotation_file(coco))['notes'] == []


def test_a_file_that_is_missing_or_no_json_is_named(coco):
    path = annotation_file(coco)
    path.write_text(path.read_text()[:50])
    with pytest.raises(DataError, match=r'instances_val.json is not JSON'):
        read_annotations(path)
    path.unlink()
    with pytest.raises(DataError, match=r'instances_val.json cannot be read \(No such file.*give --data-path'):
        read_annotations(path)
