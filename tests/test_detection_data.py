"""COCO's format: what is read, what is refused by name, augmentation, and the order of images."""

import json
import pickle
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from data import DataError
from detection.config import load_config
from detection.data import CocoDataset, build_eval_loader, build_loaders
from detection.data.annotations import read_annotations
from detection.data.samplers import GroupedTrainSampler
from detection.data.transforms import TrainTransform, flip, random_crop, resize
from tests.conftest import ROOT
from tests.helpers.coco import CATEGORIES, crowd, read_tree, rectangle, wedge, write_coco, write_tree

TINY_3X = ROOT / 'detection' / 'configs' / 'cascade_mask_rcnn_msg_tiny_3x.yaml'


@pytest.fixture
def coco(tmp_path):
    return write_coco(tmp_path / 'coco')


def coco_config(root, *opts):
    """The config of small images, two a batch."""
    small = {'DATA.DATA_PATH': str(root), 'DATA.TRAIN_SPLIT': 'train', 'DATA.VAL_SPLIT': 'val', 'DATA.NUM_WORKERS': 0}
    small |= {'MODEL.NUM_CLASSES': 3, 'INPUT.TRAIN_SHORT': [40, 48], 'INPUT.MAX_LONG': 80}
    small |= {'INPUT.CROP_RESIZE': [40, 50], 'INPUT.CROP_SIZE': [24, 40]}
    return load_config(TINY_3X, [*chain(*small.items()), *opts])


def rewrite(root, split='val', **parts):
    """Replace parts of a file of annotations."""
    write_tree(root, split, read_tree(root, split) | parts)


# What is read


def test_a_sample_is_the_image_and_its_objects(coco):
    rewrite(coco, annotations=[wedge(4, 6, 20, 10) | {'image_id': 15}, rectangle(30, 50, 12, 8) | {'image_id': 15}])
    dataset = CocoDataset(coco, 'val')
    image, target = dataset[1]
    pixels = np.asarray(Image.open(coco / 'val' / '1.png'))
    assert torch.equal((image * 255).round().to(torch.uint8), torch.from_numpy(pixels.copy()).permute(2, 0, 1))
    assert target['image_id'] == 15
    assert target['boxes'].tolist() == [[4, 6, 24, 16], [30, 50, 42, 58]]
    assert target['labels'].tolist() == [2, 1]  # categories 7 and 3, with holes in their ids
    assert [category['name'] for category in dataset.categories] == ['box', 'wedge', 'rare']
    assert (target['masks'].shape, target['masks'].dtype) == ((2, 64, 48), torch.uint8)
    assert target['masks'][1].nonzero().aminmax(dim=0).min.tolist() == [50, 30]
    assert target['masks'][1].sum() == 12 * 8
    assert 0.4 < target['masks'][0, 6:16, 4:24].float().mean() < 0.6  # a triangle


def test_polygons_and_both_kinds_of_run_lengths_are_the_same_mask(coco):
    polygon = rectangle(8, 4, 10, 6) | {'image_id': 5}  # of 64 x 48
    mask = np.zeros((48, 64), dtype=np.uint8)
    mask[4:10, 8:18] = 1
    columns = np.diff(np.flatnonzero(np.diff(np.concatenate(([0], mask.flatten('F'), [0])))))
    plain = {'size': [48, 64], 'counts': [8 * 48 + 4, *columns.tolist()]}
    plain['counts'].append(48 * 64 - sum(plain['counts']))
    packed = coco_mask.encode(np.asfortranarray(mask))
    packed['counts'] = packed['counts'].decode()
    rewrite(coco, annotations=[polygon, polygon | {'segmentation': plain}, polygon | {'segmentation': packed}])
    _, target = CocoDataset(coco, 'val')[0]
    for each in target['masks']:
        assert torch.equal(each, torch.from_numpy(mask))


def test_images_without_objects_are_evaluated_but_not_trained_on(coco):
    rewrite(coco, annotations=[rectangle(4, 4, 10, 10) | {'image_id': 15}])
    every, trained = CocoDataset(coco, 'val'), CocoDataset(coco, 'val', is_train=True)
    assert (len(every), len(trained)) == (4, 1)
    assert trained[0][1]['image_id'] == 15
    assert trained.notes == ['3 images without objects left out']
    _, target = every[0]
    assert (target['boxes'].shape, target['labels'].shape) == ((0, 4), (0,))
    assert target['masks'].shape == (0, 48, 64)
    rewrite(coco, annotations=[])
    with pytest.raises(DataError, match=r'instances_val.json: none of its images has an object to learn'):
        CocoDataset(coco, 'val', is_train=True)


def test_crowds_and_boxes_without_area_are_no_objects_and_others_are_clipped(coco):
    wrong = [rectangle(4, 4, 0, 10), rectangle(4, 4, 10, 0.5), rectangle(70, 4, 10, 10), crowd(64, 48, rows=9)]
    right = rectangle(-6, 40, 16, 20)
    rewrite(coco, annotations=[each | {'image_id': 5} for each in (*wrong, right)])
    dataset = CocoDataset(coco, 'val', is_train=True)
    _, target = dataset[0]
    assert target['boxes'].tolist() == [[0, 40, 10, 48]]
    assert target['masks'].sum() == 10 * 8
    assert dataset.notes == [
        '3 images without objects left out',
        '1 crowd regions left out',
        '3 boxes without area left out',
    ]


def test_compressed_run_lengths_are_read_as_pycocotools_writes_them(coco):
    rng = np.random.default_rng(0)
    masks = [rng.random((48, 64)) < share for share in (0.02, 0.5, 1)]
    masks.append(np.arange(48)[:, None] + 20 < np.arange(64))  # long runs, that change by little
    runs = [coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]
    shapes = [{'size': [48, 64], 'counts': run['counts'].decode()} for run in runs]
    rewrite(coco, annotations=[rectangle(4, 4, 9, 9) | {'image_id': 5, 'segmentation': shape} for shape in shapes])
    _, target = CocoDataset(coco, 'val')[0]
    assert (target['masks'].numpy() == masks).all()


# What is refused


@pytest.mark.parametrize(
    ('parts', 'told'),
    [
        ({'images': None}, 'has no list "images": it is not in the format of COCO'),
        ({'annotations': [1]}, 'has no list "annotations"'),
        ({'categories': []}, 'has no categories'),
        ({'images': [{'id': 5, 'file_name': 'a.png', 'width': 4}]}, 'entry 0 of "images" has no height: add it'),
        ({'categories': [*CATEGORIES, CATEGORIES[0]]}, 'two of the categories have the id 3'),
        (
            {'categories': [{'id': '3', 'name': 'box'}]},
            'entry 0 of "categories" has the id \'3\': write a whole number',
        ),
        ({'images': [{'id': 5, 'file_name': 7, 'width': 4, 'height': 4}]}, 'has the file_name 7: write text'),
        ({'images': [{'id': 5, 'file_name': 'a.png', 'width': 4, 'height': 0}]}, 'a.png has no width and height'),
    ],
)
def test_a_file_in_another_format_is_told(coco, parts, told):
    rewrite(coco, **parts)
    with pytest.raises(DataError, match=f'instances_val.json.*{told}'):
        CocoDataset(coco, 'val')


@pytest.mark.parametrize(
    ('change', 'told'),
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
        ({'segmentation': [[1, 2, 1e9, 4, 5, 6]]}, 'has a corner at 1000000000.0, far outside of the image'),
        ({'segmentation': [[1, 2, 60, -49, 5, 6]]}, 'has a corner at -49, far outside'),
        ({'iscrowd': None}, 'has iscrowd None: write 0 or 1'),
        ({'iscrowd': '0'}, "has iscrowd '0': write 0 or 1"),
        ({'area': '12'}, "has the area '12': write the pixels"),
        ({'area': float('nan')}, 'has the area nan'),
        ({'image_id': [5]}, r'entry 0 of "annotations" has the image_id \[5\]: write a whole number'),
    ],
)
def test_an_annotation_that_cannot_be_is_named(coco, change, told):
    rewrite(coco, annotations=[rectangle(4, 4, 10, 10) | {'image_id': 5, 'id': 41} | change])
    with pytest.raises(DataError, match=told):
        CocoDataset(coco, 'val')


def test_files_that_are_missing_or_damaged_are_named(coco):
    path = coco / 'annotations' / 'instances_val.json'
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
    path.write_text(path.read_text()[:50])
    with pytest.raises(DataError, match=r'instances_val.json is not JSON'):
        CocoDataset(coco, 'val')


def test_what_does_not_fit_the_config_is_told(coco):
    with pytest.raises(DataError, match='no data: give --data-path'):
        build_eval_loader(coco_config(''))
    with pytest.raises(DataError, match='has 3 categories, but MODEL.NUM_CLASSES is 80.*MODEL.NUM_CLASSES 3'):
        build_eval_loader(coco_config(coco, 'MODEL.NUM_CLASSES', 80))
    with pytest.raises(DataError, match='6 training images make no full batch: DATA.BATCH_SIZE 4 on 2 process'):
        build_loaders(coco_config(coco, 'DATA.BATCH_SIZE', 4), world_size=2)
    rewrite(coco, categories=[*CATEGORIES[:2], {'id': 90, 'name': 'common'}])
    with pytest.raises(DataError, match='instances_train.json and .*instances_val.json have different categories'):
        build_loaders(coco_config(coco))


# Augmentation


def square(height=30, width=40, top=6, left=10, side=8):
    """An image whose brightest square is its only object."""
    image, mask = torch.zeros(3, height, width), torch.zeros(1, height, width, dtype=torch.uint8)
    image[:, top : top + side, left : left + side] = mask[:, top : top + side, left : left + side] = 1
    boxes = torch.tensor([[left, top, left + side, top + side]], dtype=torch.float32)
    return image, {'boxes': boxes, 'labels': torch.tensor([2]), 'masks': mask, 'image_id': 7}


def box_of(mask):
    rows, columns = mask.nonzero().unbind(dim=1)
    return torch.stack((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)).float()


def test_a_flip_mirrors_image_box_and_mask():
    image, target = flip(*square())
    assert target['boxes'].tolist() == [[22, 6, 30, 14]]
    assert torch.equal(box_of(target['masks'][0]), target['boxes'][0])
    assert torch.equal(image[0].bool(), target['masks'][0].bool())
    again = flip(image, target)
    assert torch.equal(again[1]['boxes'], square()[1]['boxes'])


@pytest.mark.parametrize(
    ('short', 'long', 'size'), [(60, 1000, (60, 80)), (60, 60, (45, 60)), (15, 1000, (15, 20)), (30, 40, (30, 40))]
)
def test_a_resize_keeps_the_proportions_and_the_long_side_in_bounds(short, long, size):
    image, target = resize(*square(), short, long)
    assert tuple(image.shape[1:]) == tuple(target['masks'].shape[1:]) == size
    scale = size[0] / 30
    torch.testing.assert_close(target['boxes'], square()[1]['boxes'] * scale)
    assert (box_of(target['masks'][0]) - target['boxes'][0]).abs().max() <= 0.5  # a mask has whole pixels
    assert ((image[0] > 0.5) == target['masks'][0].bool()).float().mean() > 0.98


def test_a_crop_keeps_what_it_shows():
    whole, target = square()
    whole[0] = torch.arange(30 * 40).view(30, 40)  # the pixels' places
    sizes, seen = set(), set()
    for seed in range(60):
        torch.manual_seed(seed)
        image, cropped = random_crop(whole, target, 8, 20)
        height, width = image.shape[1:]
        top, left = divmod(int(image[0, 0, 0]), 40)
        assert torch.equal(image, whole[:, top : top + height, left : left + width])
        sizes |= {height, width}
        mask = target['masks'][0, top : top + height, left : left + width]
        seen.add(len(cropped['boxes']))
        if mask.any():
            assert torch.equal(cropped['boxes'][0], box_of(mask))
            assert torch.equal(cropped['masks'][0], mask)
            assert cropped['labels'].tolist() == [2]
        else:
            assert cropped['boxes'].shape == (0, 4)
            assert cropped['masks'].shape == (0, height, width)
    assert (min(sizes), max(sizes)) == (8, 20)
    assert seen == {0, 1}
    image, _ = random_crop(*square(5, 60, 0, 0, 4), 8, 20)
    assert image.shape[1] == 5  # as far as the image goes


def test_the_augmentation_of_training_is_the_published_one():
    config = load_config(TINY_3X)
    assert (config.INPUT.CROP_RESIZE, config.INPUT.CROP_SIZE) == ([400, 500, 600], [384, 600])
    transform = TrainTransform(config)
    sizes, kept_proportions, lost = set(), 0, 0
    for seed in range(80):
        torch.manual_seed(seed)
        image, target = transform(*square(375, 500, 60, 100, 40))
        sizes.add(min(image.shape[1:]))
        assert max(image.shape[1:]) <= 1333
        kept_proportions += abs(image.shape[2] / image.shape[1] - 500 / 375) < 0.01
        lost += len(target['boxes']) == 0
        assert target['masks'].shape[1:] == image.shape[1:]
    assert sizes <= set(range(480, 801, 32))
    assert len(sizes) >= 8
    assert 25 <= kept_proportions <= 60  # about half are not cropped
    assert lost < 40


# The order of images


def batches_of(sampler, batch_size):
    indices = [index for _, index in sampler]
    return [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]


@pytest.mark.parametrize('world_size', [1, 2])
def test_batches_are_of_one_group_and_an_epoch_has_every_image_once(world_size):
    groups = [index % 5 == 0 for index in range(103)]
    samplers = [GroupedTrainSampler(groups, 4, rank, world_size, seed=3) for rank in range(world_size)]
    orders = []
    for epoch in (0, 1):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        batches = [batches_of(sampler, 4) for sampler in samplers]
        steps = [list(chain(*parts)) for parts in zip(*batches, strict=True)][: 103 // (4 * world_size)]
        assert sum(len({groups[index] for index in step}) > 1 for step in steps) <= 1
        kinds = [groups[step[0]] for step in steps]
        assert len(set(kinds)) == 2
        assert kinds != sorted(kinds)  # neither group comes first
        seen = [index for _, index in samplers[0]]
        seen += [index for sampler in samplers[1:] for _, index in sampler]
        assert sorted(set(seen)) == list(range(103))
        assert len(seen) <= 103 + world_size - 1
        orders.append(steps)
    assert orders[0] != orders[1]


def test_a_group_smaller_than_a_batch_is_seen():
    groups = [index < 3 for index in range(90)]
    sampler = GroupedTrainSampler(groups, 16)
    rare = 0
    for epoch in range(20):
        sampler.set_epoch(epoch)
        rare += sum(index < 3 for batch in batches_of(sampler, 16)[:5] for index in batch)
    assert rare > 40  # 60 * 80 / 90 = 53 on average


def test_a_sampler_continues_inside_an_epoch():
    groups = [index % 3 == 0 for index in range(50)]
    sampler = GroupedTrainSampler(groups, 4, seed=1)
    sampler.set_epoch(2)
    whole = list(sampler)
    state = pickle.loads(pickle.dumps(sampler.state_dict()))
    other = GroupedTrainSampler(groups, 4, seed=1)
    other.load_state_dict(state, start=12)
    assert list(other) == whole[12:]
    with pytest.raises(ValueError, match='epoch of 50 images, but there are 49 now'):
        GroupedTrainSampler(groups[:49], 4).load_state_dict(state, start=12)


# Loaders


def test_loaders_give_lists_whichever_process_loads(coco):
    epochs = []
    for workers in (0, 2):
        train, val = build_loaders(coco_config(coco, 'DATA.NUM_WORKERS', workers))
        train.sampler.set_epoch(1)
        epochs.append(list(train))
        assert [len(images) for images, _ in val] == [1, 1, 1, 1]
        assert [target['image_id'] for _, targets in val for target in targets] == [5, 15, 25, 35]
        assert val.dataset.categories == CATEGORIES
    assert len(epochs[0]) == 3
    for (images, targets), (other_images, other_targets) in zip(*epochs, strict=True):
        for image, other in zip(images, other_images, strict=True):
            assert torch.equal(image, other)
        for target, other in zip(targets, other_targets, strict=True):
            for key in ('boxes', 'labels', 'masks'):
                assert torch.equal(target[key], other[key])
    shares = [build_eval_loader(coco_config(coco), rank, 3) for rank in range(3)]
    ids = [target['image_id'] for loader in shares for _, targets in loader for target in targets]
    assert sorted(ids) == [5, 15, 25, 35]
    assert len(pickle.loads(pickle.dumps(train.dataset))) == 6  # for a process that does not fork


def test_a_json_without_what_pycocotools_wants_is_completed(coco):
    path = coco / 'annotations' / 'instances_val.json'
    assert not {'info', 'licenses'} & json.loads(path.read_text()).keys()
    tree = read_annotations(path)
    assert tree['info'] == {}
    assert [each['id'] for each in tree['annotations']] == list(range(1, len(tree['annotations']) + 1))
    for each in tree['annotations']:
        assert each['iscrowd'] == 0
        half = 1 if each['category_id'] == 3 else 0.5
        assert each['area'] == pytest.approx(each['bbox'][2] * each['bbox'][3] * half, rel=0.15)
