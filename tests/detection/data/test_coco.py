"""The dataset: samples, what is left out, errors that name a file."""

import numpy as np
import pytest
import torch
from PIL import Image

from data import DataError
from data.images import read_header
from detection.data import CocoDataset
from detection.data import coco as coco_module
from detection.data.coco import EVERYTHING, Selection
from tests.helpers.coco_data import crowd, rectangle, update_tree, wedge, write_coco
from tests.helpers.images import set_orientation


def test_a_sample_is_an_image_and_its_objects(coco):
    annotations = [wedge(4, 6, 20, 10), rectangle(30, 50, 12, 8)]
    update_tree(coco, annotations=[annotation | {'image_id': 15} for annotation in annotations])
    dataset = CocoDataset(coco, 'val')
    image, target = dataset[1]
    pixels = np.asarray(Image.open(coco / 'val' / '1.png'))
    assert torch.equal((image * 255).round().to(torch.uint8), torch.from_numpy(pixels.copy()).permute(2, 0, 1))
    assert target['image_id'] == 15
    assert target['boxes'].tolist() == [[4, 6, 24, 16], [30, 50, 42, 58]]
    assert target['labels'].tolist() == [2, 1]  # categories 7 and 3: ids have gaps
    assert dataset.classes == ['box', 'wedge', 'rare']
    assert (target['masks'].shape, target['masks'].dtype) == ((2, 64, 48), torch.uint8)
    assert target['masks'][1].nonzero().aminmax(dim=0).min.tolist() == [50, 30]
    assert target['masks'][1].sum() == 12 * 8
    assert 0.4 < target['masks'][0, 6:16, 4:24].float().mean() < 0.6  # a triangle


def test_names_of_samples_tell_boxes_masks_and_categories_apart(coco):
    def names():
        return list(CocoDataset(coco, 'val').sample_names())

    objects = [rectangle(4, 4, 10, 10), wedge(4, 4, 10, 10)]
    update_tree(coco, annotations=[objects[0] | {'image_id': 15}])
    before = names()
    assert len(before) == 4
    assert before[1].startswith('1 [')
    update_tree(coco, annotations=[objects[0] | {'image_id': 15, 'id': 7}])
    assert names() == before
    other_mask = objects[0] | {'segmentation': objects[1]['segmentation']}
    for changed in (objects[1], rectangle(4, 4, 10, 11), other_mask, objects[0] | {'category_id': 7}):
        update_tree(coco, annotations=[changed | {'image_id': 15}])
        assert [a != b for a, b in zip(names(), before, strict=True)] == [False, True, False, False]


def test_images_without_objects_are_evaluated_but_not_trained_on(coco):
    update_tree(coco, annotations=[rectangle(4, 4, 10, 10) | {'image_id': 15}])
    evaluation, training = CocoDataset(coco, 'val'), CocoDataset(coco, 'val', is_train=True)
    assert (len(evaluation), len(training)) == (4, 1)
    assert training[0][1]['image_id'] == 15
    unused = '2 of 3 categories have no object to train on: wedge, rare'
    assert training.notes == ['3 images without objects left out', unused]
    _, target = evaluation[0]
    assert (target['boxes'].shape, target['labels'].shape) == ((0, 4), (0,))
    assert target['masks'].shape == (0, 48, 64)
    update_tree(coco, annotations=[])
    for selection in (EVERYTHING, Selection(empty_images=True)):
        with pytest.raises(DataError, match=r'instances_val.json: none of its images has an object to train on'):
            CocoDataset(coco, 'val', is_train=True, selection=selection)


def test_crowds_and_boxes_without_area_are_left_out_and_boxes_are_clipped(coco):
    without_area = [rectangle(4, 4, 0, 10), rectangle(4, 4, 10, 0.5), rectangle(65, 4, 10, 10)]
    annotations = [*without_area, crowd(64, 48, rows=9), rectangle(-6, 40, 16, 20)]
    update_tree(coco, annotations=[annotation | {'image_id': 5} for annotation in annotations])
    dataset = CocoDataset(coco, 'val', is_train=True)
    _, target = dataset[0]
    assert target['boxes'].tolist() == [[0, 40, 10, 48]]
    assert target['masks'].sum() == 10 * 8
    assert dataset.notes == [
        '3 images without objects left out',
        '1 crowd regions left out',
        '3 boxes without area left out',
        '2 of 3 categories have no object to train on: wedge, rare',
    ]


def test_missing_and_damaged_files_are_named(coco):
    with pytest.raises(DataError, match=r'instances_test.json cannot be read \(No such file.*give --data-path'):
        CocoDataset(coco, 'test')
    (coco / 'val' / '2.png').unlink()
    with pytest.raises(DataError, match=r'image .*val/2.png does not exist, and 0 more of .*instances_val.json'):
        CocoDataset(coco, 'val')
    Image.new('RGB', (48, 64)).save(coco / 'val' / '2.png')
    with pytest.raises(DataError, match=r'val/2.png has 48 x 64 pixels, but .* says 60 x 44: replace'):
        CocoDataset(coco, 'val')[2]
    (coco / 'val' / '2.png').write_bytes(b'no image')
    with pytest.raises(DataError, match=r'val/2.png cannot be read'):
        CocoDataset(coco, 'val')[2]
    (coco / 'val').rename(coco / 'elsewhere')
    with pytest.raises(DataError, match=r'folder .*coco/val, with images of .* does not exist'):
        CocoDataset(coco, 'val')


def test_images_are_turned_upright(coco):
    """As in prediction; a half turn keeps the size, so nothing else tells."""
    plain, _ = CocoDataset(coco, 'val')[0]
    assert CocoDataset(coco, 'val').notes == []
    set_orientation(coco / 'val' / '0.png', 3)
    dataset = CocoDataset(coco, 'val')
    assert torch.equal(dataset[0][0], plain.flip(1, 2))
    (note,) = dataset.notes
    assert note.startswith('1 of 4 sampled images have an EXIF orientation and are turned upright')


def test_annotations_of_the_upright_image_are_read(coco):
    plain, _ = CocoDataset(coco, 'val')[0]
    path = coco / 'val' / '0.png'
    stored = Image.open(path).transpose(Image.Transpose.ROTATE_90)
    stored.save(path)
    set_orientation(path, 6)  # a quarter to the right
    assert torch.equal(CocoDataset(coco, 'val')[0][0], plain)


def test_images_as_stored_with_annotations_of_the_upright_ones_are_refused(coco):
    path = coco / 'val' / '0.png'
    Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path)
    set_orientation(path, 6)
    with pytest.raises(DataError, match='its size as EXIF turns it upright: write --opts DATA.EXIF True'):
        CocoDataset(coco, 'val', upright=False)


def test_annotations_of_the_stored_image_are_refused(coco):
    message = (
        r'val/0.png, turned upright by its EXIF orientation 6, has 48 x 64 pixels, but .*instances_val.json '
        r'says 64 x 48, its size as stored: write --opts DATA.EXIF False, remove the EXIF tag, or annotate the upright'
    )
    opened_before = CocoDataset(coco, 'val')
    plain, _ = opened_before[0]
    set_orientation(coco / 'val' / '0.png', 6)
    with pytest.raises(DataError, match=message):
        CocoDataset(coco, 'val')
    with pytest.raises(DataError, match=message):
        opened_before[0]
    stored = CocoDataset(coco, 'val', upright=False)
    assert torch.equal(stored[0][0], plain)
    (note,) = stored.notes
    assert note.endswith('have an EXIF orientation and are read as stored; DATA.EXIF True turns them upright')
    update_tree(coco, annotations=[], images=[{'id': 5, 'file_name': '0.png', 'width': 60, 'height': 44}])
    with pytest.raises(DataError, match='EXIF orientation 6, has 48 x 64 pixels, but .* says 60 x 44: replace one'):
        CocoDataset(coco, 'val')


def test_the_headers_of_at_most_100_images_are_read(tmp_path, monkeypatch):
    root, read = write_coco(tmp_path / 'many', val=250), []
    monkeypatch.setattr(coco_module, 'read_header', lambda path: read.append(path) or read_header(path))
    CocoDataset(root, 'val')
    numbers = [int(path.stem) for path in read]
    assert numbers == list(range(0, 250, 3))
