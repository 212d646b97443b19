"""The fast pipeline against the published one: equal random choices, nearly equal pixels."""

import pickle
import random

import cv2
import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image
from timm.data import auto_augment
from timm.data.auto_augment import RandAugment, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms

from config import load_config
from data import Preprocess, array_augment, build_loaders
from data.array_augment import use_arrays
from data.build import build_sample_transform
from data.decoding import EncodedImage
from data.fast_transforms import FastEvalTransform, FastTrainTransform, draw_rectangles
from data.seeding import seeded
from data.transforms import PublishedTransform, train_steps
from tests.helpers.datasets import encoded, photograph
from tests.helpers.images import noise
from tests.helpers.paths import ROOT
from tests.helpers.pipelines import GEOMETRY_ALONE, compare_crops, compare_evaluation, compare_operations, difference
from tests.helpers.runs import CPU, PLAIN
from tools.sample_images import FileSamples, make_jpegs

MSG_TINY = ROOT / 'configs' / 'msg_tiny_p4_win7_224.yaml'


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    return FileSamples(make_jpegs(tmp_path_factory.mktemp('photographs'), 12))


@pytest.fixture(scope='module')
def large_photographs(photographs, tmp_path_factory):
    """Of four megapixels, which are decoded at half the size and less."""
    folder, paths = tmp_path_factory.mktemp('large'), []
    for name in list(photographs.names)[:4]:
        paths.append(folder / name.rpartition('/')[2])
        Image.open(name).resize((2301, 1727), Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return FileSamples(paths)


@pytest.mark.parametrize(('images', 'limit'), [('photographs', 0.05), ('large_photographs', 2)])
def test_crops_and_evaluated_images_are_the_published_ones(request, images, limit):
    """On average within two levels of 255 where JPEGs are decoded at a part of their size, else a twentieth of one."""
    samples = request.getfixturevalue(images)
    assert np.mean(compare_crops(load_config(MSG_TINY, GEOMETRY_ALONE), samples, crops=4)) < limit
    assert np.mean(compare_evaluation(load_config(MSG_TINY), samples)) < limit
    assert np.mean(compare_evaluation(load_config(MSG_TINY, ['TEST.CROP', 'False']), samples)) < limit


def test_large_jpegs_are_decoded_at_a_part_of_their_size(large_photographs, monkeypatch):
    shapes = []
    decode = EncodedImage._decode
    monkeypatch.setattr(EncodedImage, '_decode', lambda *args: shapes.append((x := decode(*args)).shape) or x)
    compare_evaluation(load_config(MSG_TINY), large_photographs)
    assert set(shapes) == {(864, 1151, 3)}  # a half; a quarter would leave less than two pixels per pixel


def test_operations_are_pils(photographs):
    for interpolation in ('bicubic', 'bilinear', 'nearest'):
        config = load_config(MSG_TINY, ['DATA.INTERPOLATION', interpolation])
        differences = compare_operations(config, photographs)
        assert len(differences) == 27
        means = {name: np.mean(values) for name, values in differences.items()}
        assert max(means.values()) < 2, means


@pytest.mark.parametrize('mode', ['RGB', 'L'])
def test_operations_on_levels_are_pils_within_one(mode):
    """Of noise, of a part of the levels, and of a single one."""
    arguments = {'auto_contrast': [()], 'equalize': [()], 'invert': [()], 'posterize': [(-2,), (0,), (1,), (7,), (8,)]}
    arguments |= {'solarize': [(0,), (1,), (100,), (256,)], 'solarize_add': [(40,)], 'brightness': [(0.3,), (1.7,)]}
    for change in (lambda level: level, lambda level: 40 + level // 4, lambda level: 7):
        image = noise(31, 17).convert(mode).point(change)
        pixels = np.array(image)
        for name, values in arguments.items():
            for value in values:
                theirs = np.asarray(getattr(auto_augment, name)(image, *value)).astype(int)
                ours = getattr(array_augment, name)(pixels, *value)
                assert np.abs(ours - theirs).max() <= 1, (name, value)
        assert np.array_equal(pixels, np.array(image))  # unchanged


def test_grey_images_go_through_the_same_operations(photographs):
    image = Image.open(photographs.names[0]).convert('L').resize((64, 64))
    for policy in ('rand-m9-n1-mstd0.5-inc1-p1', 'rand-m9-n1-mstd0.5-p1'):
        published, fast = (rand_augment_transform(policy, {'img_mean': (128,)}) for _ in range(2))
        fast = use_arrays(fast)
        for seed in range(40):
            with seeded(seed):
                theirs = np.asarray(published(image))
            with seeded(seed):
                ours = fast(np.array(image))
            assert difference(ours, theirs) < 3  # at 64 pixels, borders count more


def record_choices(config, monkeypatch, transform_of, samples, epochs=6):
    """Boxes, flips, and operations with their arguments, of each sample in several epochs."""
    choices = []
    get_params = RandomResizedCropAndInterpolation.get_params

    def note(kind, function, *noted):
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            choices.append((kind, *(noted and [x(args, result) for x in noted])))
            return result

        return call

    box = staticmethod(note('box', get_params, lambda args, result: result))
    monkeypatch.setattr(RandomResizedCropAndInterpolation, 'get_params', box)
    monkeypatch.setattr(F, 'hflip', note('flip', F.hflip))
    monkeypatch.setattr(cv2, 'flip', note('flip', cv2.flip))
    transform = transform_of(config)
    [policy] = getattr(transform, 'policies', None) or [
        step for step in transform.transform.transforms if isinstance(step, RandAugment)
    ]
    for op in policy.ops:
        op.aug_fn = note(op.name, op.aug_fn, lambda args, result: args[1:])
    for epoch in range(epochs):
        for index in range(len(samples)):
            choices.append(('sample', epoch, index))
            with seeded(0, epoch, index):
                transform(samples.read(index), '')
    monkeypatch.undo()
    return choices


def test_boxes_flips_and_operations_are_the_published_ones(monkeypatch, photographs):
    """Not only alike in distribution: the same for each (seed, epoch, index)."""
    config = load_config(MSG_TINY)
    fast = record_choices(config, monkeypatch, FastTrainTransform, photographs)
    published = record_choices(config, monkeypatch, lambda config: PublishedTransform(config, True), photographs)
    assert fast == published
    kinds = {choice[0] for choice in fast}
    assert len(kinds) == 3 + 15  # every operation occurred
    assert len([choice for choice in fast if choice[0] == 'box']) == 6 * 12


def test_an_operation_of_the_users_replaces_timms_in_both_pipelines(monkeypatch):
    def rotate(image, degrees, **_):
        return Image.new(image.mode, image.size, 'red')

    monkeypatch.setitem(auto_augment.NAME_TO_OP, 'Rotate', rotate)
    policy = rand_augment_transform('rand-m9-n1', {}, {'Rotate': 1.0})
    for op in policy.ops:
        op.prob = 1.0
    pixels = np.array(noise(9, 9))
    published = np.array(policy(Image.fromarray(pixels)))
    fast = use_arrays(policy)(pixels)
    assert np.array_equal(published, fast)
    assert (fast == (255, 0, 0)).all()


@pytest.mark.parametrize('policy', ['original', 'v0', 'augmix-m3-w3', 'none'])
def test_other_policies_take_arrays_too(policy):
    config = load_config(MSG_TINY, ['AUG.AUTO_AUGMENT', policy])
    fast, (_, published, _) = FastTrainTransform(config).policies, train_steps(config)
    assert len(fast) == len(published) == 1  # none has colour jitter
    differences = []
    for seed in range(10):
        with seeded(seed):
            theirs = np.asarray(published[0](noise(32, 32)))
        with seeded(seed):
            differences.append(difference(fast[0](np.array(noise(32, 32))), theirs))
    assert np.median(differences) < 2


@pytest.mark.parametrize('count', [1, 3])
def test_rectangles_are_timms(count):
    erasing = RandomErasing(probability=0.7, max_count=count, device='cpu')
    drawn = 0
    for seed in range(100):
        image = torch.ones(1, 56, 56)
        random.seed(seed)
        erasing(image)
        random.seed(seed)
        expected = torch.ones(1, 56, 56)
        for top, left, height, width in draw_rectangles(erasing, 56):
            expected[:, top : top + height, left : left + width] = 0
            drawn += 1
        assert torch.equal(image, expected)
    assert drawn > 50


def test_evaluation_crops_at_torchvisions_pixel():
    """Sizes whose resized sides and margins round up, down and to even."""
    fast = FastEvalTransform(load_config(MSG_TINY))
    gradient = np.arange(640)
    for width, height in ((500, 375), (375, 500), (333, 500), (257, 640), (256, 256), (301, 299), (640, 257)):
        image = Image.fromarray((gradient[None, :width] * 255 // width + 0 * gradient[:height, None]).astype(np.uint8))
        resized = transforms.Resize(256)(image)
        crop = fast.crop((width, height))
        assert crop.size == resized.size
        cropped = transforms.CenterCrop(224)(resized)
        left, top, *size = map(int, crop.window)
        assert size == [224, 224]
        assert np.array_equal(np.asarray(cropped), np.asarray(resized)[top : top + 224, left : left + 224])


def test_both_pipelines_train_on_the_same_images(tiny_config, image_tree):
    """With all randomness off, batches differ by rounding alone."""
    batches = []
    for pipeline in ('fast', 'published'):
        config = tiny_config(DATA__DATA_PATH=str(image_tree), DATA__PIPELINE=pipeline, **PLAIN)
        train, _ = build_loaders(config)
        batches.append([Preprocess(config, CPU)(batch) for batch in train])
    for (fast, targets), (published, expected) in zip(*batches, strict=True):
        assert torch.equal(targets, expected)
        assert (fast - published).abs().max() < 2 / 255 / 0.22


@pytest.mark.parametrize('pipeline', ['fast', 'published'])
@pytest.mark.parametrize(
    'options',
    [
        ['AUG.AUTO_AUGMENT', 'rand-m9-mstd0.5-inc1'],
        ['AUG.AUTO_AUGMENT', 'augmix-m3-w3'],
        ['AUG.AUTO_AUGMENT', 'original', 'DATA.INTERPOLATION', 'nearest'],
        ['AUG.AUTO_AUGMENT', 'none', 'AUG.COLOR_JITTER', '0.4'],
    ],
)
def test_transforms_can_be_handed_to_workers(pipeline, options):
    config = load_config(MSG_TINY, [*options, 'DATA.PIPELINE', pipeline])
    data = encoded(photograph())
    for is_train in (True, False):
        transform = build_sample_transform(config, is_train)
        copy = pickle.loads(pickle.dumps(transform))
        images = []
        for each in (transform, copy):
            with seeded(1):
                images.append(each(data, 'name')[0])
        assert torch.equal(*images)
