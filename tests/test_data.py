import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import Mixup
from timm.data.auto_augment import RandAugment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn
from torchvision import transforms

from data import DataError, build_criterion, build_eval_loader, build_loaders, build_mixup
from data.build import build_transform
from data.image_folder import load_image
from data.samplers import ShardSampler
from tests.conftest import write_images

PLAIN = {'AUG__MIXUP': '0', 'AUG__CUTMIX': '0', 'MODEL__LABEL_SMOOTHING': '0'}


def photo(width=400, height=300):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def steps(transform, kind):
    return [step for step in transform.transforms if isinstance(step, kind)]


def test_training_transform_is_the_published_recipe(tiny_config):
    transform = build_transform(tiny_config(DATA__IMG_SIZE='224'), is_train=True)
    [crop] = steps(transform, RandomResizedCropAndInterpolation)
    assert (crop.size, crop.scale, crop.ratio) == ((224, 224), (0.08, 1.0), (3 / 4, 4 / 3))
    assert crop.interpolation == transforms.InterpolationMode.BICUBIC
    assert steps(transform, transforms.RandomHorizontalFlip)[0].p == 0.5
    [augment] = steps(transform, RandAugment)
    assert augment.num_layers == 2
    assert {op.magnitude for op in augment.ops} == {9}
    assert {op.magnitude_std for op in augment.ops} == {0.5}
    assert not steps(transform, transforms.ColorJitter)  # replaced by the policy
    [erasing] = steps(transform, RandomErasing)
    assert (erasing.probability, erasing.max_count, erasing.rand_color, erasing.per_pixel) == (0.25, 1, False, True)
    [normalize] = steps(transform, transforms.Normalize)
    torch.testing.assert_close(normalize.mean, torch.tensor([0.485, 0.456, 0.406]))
    torch.testing.assert_close(normalize.std, torch.tensor([0.229, 0.224, 0.225]))
    assert transform(photo()).shape == (3, 224, 224)


def test_every_augmentation_can_be_switched_off(tiny_config):
    off = {'AUG__HFLIP': '0', 'AUG__AUTO_AUGMENT': 'none', 'AUG__COLOR_JITTER': '0', 'AUG__REPROB': '0'}
    off |= {'AUG__SCALE': '(1, 1)', 'AUG__RATIO': '(1, 1)', 'DATA__IMG_SIZE': '32'}
    transform = build_transform(tiny_config(**off), is_train=True)
    image = photo(32, 32)
    torch.testing.assert_close(transform(image), transform(image))
    plain = build_transform(tiny_config(**off, TEST__CROP='False'), is_train=False)
    torch.testing.assert_close(transform(image), plain(image))
    off['AUG__COLOR_JITTER'] = '0.4'
    assert steps(build_transform(tiny_config(**off), is_train=True), transforms.ColorJitter)


def test_augmentation_takes_its_options(tiny_config):
    options = {'AUG__SCALE': '(0.5, 0.6)', 'AUG__RATIO': '(1.0, 1.5)', 'AUG__HFLIP': '0.3', 'AUG__REPROB': '0.4'}
    options |= {'AUG__REMODE': 'const', 'AUG__RECOUNT': '3', 'DATA__INTERPOLATION': 'bilinear'}
    transform = build_transform(tiny_config(**options), is_train=True)
    [crop] = steps(transform, RandomResizedCropAndInterpolation)
    assert (crop.scale, crop.ratio) == ((0.5, 0.6), (1.0, 1.5))
    assert crop.interpolation == transforms.InterpolationMode.BILINEAR
    assert steps(transform, transforms.RandomHorizontalFlip)[0].p == 0.3
    [erasing] = steps(transform, RandomErasing)
    assert (erasing.probability, erasing.max_count, erasing.per_pixel) == (0.4, 3, False)


def test_evaluation_crops_or_resizes(tiny_config):
    image = photo(400, 300)
    crop = build_transform(tiny_config(DATA__IMG_SIZE='224'), is_train=False)
    [resize] = steps(crop, transforms.Resize)
    assert resize.size == 256
    assert steps(crop, transforms.CenterCrop)[0].size == (224, 224)
    assert resize.interpolation == transforms.InterpolationMode.BICUBIC
    whole = build_transform(tiny_config(DATA__IMG_SIZE='224', TEST__CROP='False'), is_train=False)
    assert steps(whole, transforms.Resize)[0].size == (224, 224)
    assert crop(image).shape == whole(image).shape == (3, 224, 224)
    assert steps(build_transform(tiny_config(DATA__IMG_SIZE='384'), is_train=False), transforms.Resize)[0].size == 438


def test_grey_images_for_a_network_of_one_channel(tiny_config, image_tree):
    config = tiny_config(MODEL__MSG__IN_CHANS='1', DATA__DATA_PATH=str(image_tree))
    train, val = build_loaders(config)
    for loader in (train, val):
        assert next(iter(loader))[0].shape == (4, 1, 28, 28)
    with pytest.raises(DataError, match='IN_CHANS is 4.*write 3 or 1'):
        build_eval_loader(tiny_config(MODEL__MSG__IN_CHANS='4', DATA__DATA_PATH=str(image_tree)))


def test_pictures_are_turned_where_asked_and_16_bits_are_not_clipped(tmp_path):
    turned = Image.new('RGB', (4, 2), 'red')
    turned.getexif()[0x0112] = 6  # a quarter to the right
    turned.save(tmp_path / 'turned.jpg', exif=turned.getexif())
    assert load_image(tmp_path / 'turned.jpg').size == (4, 2)
    assert load_image(tmp_path / 'turned.jpg', upright=True).size == (2, 4)
    Image.fromarray(np.array([[0, 256, 40000, 65535]], dtype=np.uint16)).save(tmp_path / 'deep.png')
    assert np.asarray(load_image(tmp_path / 'deep.png', 'L')).tolist() == [[0, 1, 156, 255]]


def test_loaders(tiny_config, image_tree):
    config = tiny_config(DATA__DATA_PATH=str(image_tree), DATA__BATCH_SIZE='10', DATA__NUM_WORKERS='2')
    train, val = build_loaders(config)
    assert [len(images) for images, _ in train] == [10, 10]  # of 24: full batches only
    assert [len(images) for images, _ in val] == [10, 2]  # of 12: every image
    assert torch.cat([targets for _, targets in val]).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    orders = []
    for epoch in (0, 1, 0):
        train.sampler.set_epoch(epoch)
        orders.append(list(train.sampler))
    assert orders[0] != orders[1]
    assert orders[0] == orders[2]


@pytest.mark.parametrize('world_size', [1, 2, 3, 8])
@pytest.mark.parametrize('length', [0, 1, 5, 17])
def test_shards_hold_every_image_once(length, world_size):
    shards = [ShardSampler(length, rank, world_size) for rank in range(world_size)]
    assert sorted(i for shard in shards for i in shard) == list(range(length))
    assert [len(list(shard)) for shard in shards] == [len(shard) for shard in shards]


@pytest.mark.parametrize(
    ('options', 'mixed', 'loss'),
    [
        ({}, True, SoftTargetCrossEntropy),
        ({'AUG__MIXUP': '0'}, True, SoftTargetCrossEntropy),  # CutMix alone has soft targets too
        ({'AUG__CUTMIX': '0'}, True, SoftTargetCrossEntropy),
        ({'AUG__MIXUP': '0', 'AUG__CUTMIX': '0', 'AUG__CUTMIX_MINMAX': '(0.2, 0.8)'}, True, SoftTargetCrossEntropy),
        ({'AUG__MIXUP': '0', 'AUG__CUTMIX': '0'}, False, LabelSmoothingCrossEntropy),
        (PLAIN, False, nn.CrossEntropyLoss),
    ],
)
@pytest.mark.parametrize('mode', ['batch', 'pair', 'elem'])
def test_the_loss_follows_the_targets(tiny_config, options, mixed, loss, mode):
    config = tiny_config(**options, AUG__MIXUP_MODE=mode)
    mixup, criterion = build_mixup(config), build_criterion(config)
    assert isinstance(mixup, Mixup) == mixed
    assert type(criterion) is loss
    _, targets = mixup(torch.rand(4, 3, 28, 28), torch.tensor([0, 1, 2, 0]))
    assert targets.shape == ((4, 3) if mixed else (4,))
    assert criterion(torch.randn(4, 3), targets).isfinite()


def test_mixup_takes_its_options(tiny_config):
    config = tiny_config(
        AUG__MIXUP='0.3', AUG__CUTMIX='0.7', AUG__MIXUP_PROB='0.6', AUG__MIXUP_SWITCH_PROB='0.2', AUG__MIXUP_MODE='elem'
    )
    mixup = build_mixup(config)
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.mix_prob, mixup.switch_prob) == (0.3, 0.7, 0.6, 0.2)
    assert (mixup.mode, mixup.label_smoothing, mixup.num_classes) == ('elem', 0.1, 3)


@pytest.mark.parametrize('policy', ['bogus', 'rand-m9-foo3'])
def test_a_policy_that_timm_cannot_read_is_told(tiny_config, policy):
    with pytest.raises(DataError, match=f"AUTO_AUGMENT is '{policy}', which timm cannot read: write none"):
        build_loaders(tiny_config(AUG__AUTO_AUGMENT=policy, DATA__DATA_PATH='nowhere'))


def test_missing_folders_are_named(tiny_config, image_tree, tmp_path):
    with pytest.raises(DataError, match='no data: give --data-path'):
        build_loaders(tiny_config())
    with pytest.raises(DataError, match=r'nowhere/train does not exist: give --data-path'):
        build_loaders(tiny_config(DATA__DATA_PATH=str(tmp_path / 'nowhere')))
    (tmp_path / 'flat' / 'val').mkdir(parents=True)
    with pytest.raises(DataError, match='flat/val has no class folders'):
        build_eval_loader(tiny_config(DATA__DATA_PATH=str(tmp_path / 'flat')))


def test_an_empty_class_is_named(tiny_config, image_tree):
    for image in (image_tree / 'train' / 'class_1').iterdir():
        image.unlink()
    with pytest.raises(DataError, match=r'train/class_1 holds no images: add some or remove it'):
        build_loaders(tiny_config(DATA__DATA_PATH=str(image_tree)))


def test_another_number_of_classes_is_told(tiny_config, image_tree):
    with pytest.raises(DataError, match='has 3 class folders, but MODEL.NUM_CLASSES is 10.*MODEL.NUM_CLASSES 3'):
        build_loaders(tiny_config(DATA__DATA_PATH=str(image_tree), MODEL__NUM_CLASSES='10'))


def test_splits_with_different_classes_are_told(tiny_config, image_tree):
    (image_tree / 'val' / 'class_2').rename(image_tree / 'val' / 'class_3')
    with pytest.raises(DataError, match='different class folders: class_2, class_3'):
        build_loaders(tiny_config(DATA__DATA_PATH=str(image_tree)))


def test_batches_that_cannot_be_are_told(tiny_config, image_tree):
    with pytest.raises(DataError, match='24 training images make no full batch.*needs 60'):
        build_loaders(tiny_config(DATA__DATA_PATH=str(image_tree), DATA__BATCH_SIZE='30'), world_size=2)
    with pytest.raises(DataError, match='BATCH_SIZE is 3.*write an even --batch-size'):
        build_loaders(tiny_config(DATA__DATA_PATH=str(image_tree), DATA__BATCH_SIZE='3'))
    build_loaders(tiny_config(DATA__DATA_PATH=str(image_tree), DATA__BATCH_SIZE='3', **PLAIN))
    build_eval_loader(tiny_config(DATA__DATA_PATH=str(image_tree), DATA__BATCH_SIZE='3'))


def damage(path: Path, how: str) -> None:
    if how == 'truncated':
        photo().save(path, 'JPEG')
        path.write_bytes(path.read_bytes()[:5000])
    else:
        path.write_bytes({'garbage': b'not an image' * 50, 'empty': b''}[how])


@pytest.mark.parametrize(('how', 'workers'), [('truncated', 0), ('truncated', 1), ('garbage', 0), ('empty', 0)])
def test_an_image_that_cannot_be_read_is_named_in_one_line(tiny_config, tmp_path, how, workers):
    root = write_images(tmp_path / 'tree', val=1)
    damaged = root / 'val' / 'class_1' / 'damaged.jpg'
    damage(damaged, how)
    loader = build_eval_loader(tiny_config(DATA__DATA_PATH=str(root), DATA__NUM_WORKERS=workers))
    with pytest.raises(DataError) as error:
        list(loader)
    assert str(error.value).startswith(f'image {damaged} cannot be read (')
    assert str(error.value).endswith('): replace or remove it')
    assert '\n' not in str(error.value)


def test_loader_can_be_sent_to_a_process_that_does_not_fork(tiny_config, image_tree):
    train, _ = build_loaders(tiny_config(DATA__DATA_PATH=str(image_tree)))
    assert len(pickle.loads(pickle.dumps(train.dataset))) == 24


@pytest.mark.parametrize(('channels', 'mode'), [('3', 'RGB'), ('1', 'L')])
def test_every_operation_of_the_policy_runs_at_every_magnitude(tiny_config, channels, mode):
    """Magnitudes are drawn around 9 and some operations are rare, but timm and Pillow must agree on all."""
    [augment] = steps(build_transform(tiny_config(MODEL__MSG__IN_CHANS=channels), is_train=True), RandAugment)
    assert len(augment.ops) == 15
    for op in augment.ops:
        op.prob, op.magnitude_std = 1.0, 0
        for op.magnitude in range(11):
            assert op(photo(32, 24).convert(mode)).size == (32, 24), op
