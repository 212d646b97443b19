import pytest
import torch
from timm.data.auto_augment import RandAugment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms

from data import DataError, Preprocess, build_eval_loader, build_loaders
from data.transforms import build_transform
from tests.helpers.images import noise
from tests.helpers.runs import CPU


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
    assert transform(noise()).shape == (3, 224, 224)


def test_every_augmentation_can_be_switched_off(tiny_config):
    off = {'AUG__HFLIP': '0', 'AUG__AUTO_AUGMENT': 'none', 'AUG__COLOR_JITTER': '0', 'AUG__REPROB': '0'}
    off |= {'AUG__SCALE': '(1, 1)', 'AUG__RATIO': '(1, 1)', 'DATA__IMG_SIZE': '32'}
    transform = build_transform(tiny_config(**off), is_train=True)
    image = noise(32, 32)
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
    image = noise(400, 300)
    crop = build_transform(tiny_config(DATA__IMG_SIZE='224'), is_train=False)
    [resize] = steps(crop, transforms.Resize)
    assert resize.size == 256
    assert steps(crop, transforms.CenterCrop)[0].size == (224, 224)
    assert resize.interpolation == transforms.InterpolationMode.BICUBIC
    whole = build_transform(tiny_config(DATA__IMG_SIZE='224', TEST__CROP='False'), is_train=False)
    assert steps(whole, transforms.Resize)[0].size == (224, 224)
    assert crop(image).shape == whole(image).shape == (3, 224, 224)
    assert steps(build_transform(tiny_config(DATA__IMG_SIZE='384'), is_train=False), transforms.Resize)[0].size == 438


@pytest.mark.parametrize('pipeline', ['fast', 'published'])
def test_grey_images_for_a_network_with_one_channel(tiny_config, image_tree, pipeline):
    config = tiny_config(DATA__PIPELINE=pipeline, MODEL__MSG__IN_CHANS='1', DATA__DATA_PATH=str(image_tree))
    train, val = build_loaders(config)
    preprocess = Preprocess(config, CPU)
    for loader in (train, val):
        assert preprocess(next(iter(loader)))[0].shape == (4, 1, 28, 28)
    with pytest.raises(DataError, match='IN_CHANS is 4.*write 3 or 1'):
        build_eval_loader(tiny_config(MODEL__MSG__IN_CHANS='4', DATA__DATA_PATH=str(image_tree)))


@pytest.mark.parametrize('policy', ['bogus', 'rand-m9-foo3'])
def test_unknown_policy_is_reported(tiny_config, policy):
    with pytest.raises(DataError, match=f"AUTO_AUGMENT is '{policy}', which timm cannot parse: write none"):
        build_loaders(tiny_config(AUG__AUTO_AUGMENT=policy, DATA__DATA_PATH='nowhere'))


@pytest.mark.parametrize(('channels', 'mode'), [('3', 'RGB'), ('1', 'L')])
def test_every_operation_of_the_policy_runs_at_every_magnitude(tiny_config, channels, mode):
    """Magnitudes are drawn around 9 and some operations are rare, but timm and Pillow must agree on all."""
    [augment] = steps(build_transform(tiny_config(MODEL__MSG__IN_CHANS=channels), is_train=True), RandAugment)
    assert len(augment.ops) == 15
    for op in augment.ops:
        op.prob, op.magnitude_std = 1.0, 0
        for op.magnitude in range(11):
            assert op(noise(32, 24).convert(mode)).size == (32, 24), op
