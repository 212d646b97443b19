"""Bad images, and odd ones, in both pipelines: what is read, what stops a run, and what it skips."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

import main as program
from data import IGNORED, DataError, Preprocess, build_eval_loader, build_loaders, decoding
from data.build import build_sample_transform, open_dataset
from data.seeding import seeded
from tests.helpers.datasets import BAD, ODD, as_shards, cut, encoded, photograph
from tests.helpers.images import write_images
from tests.helpers.runs import (
    CPU,
    PLAIN,
    RANDOM,
    differences,
    folder_of,
    is_identical,
    last_checkpoint,
    log_of,
    one_thread,
    records,
)

PIPELINES = ['fast', 'published']

pytestmark = pytest.mark.filterwarnings('ignore:Palette images with Transparency:UserWarning')


@pytest.fixture
def config_of(tiny_config, image_tree):
    """A function of options that gives a config with data and, where it is not among them, ON_ERROR skip."""
    options = {'DATA__DATA_PATH': str(image_tree), 'DATA__ON_ERROR': 'skip'}
    return lambda **changes: tiny_config(**(options | changes))


def bad_image(image_tree, name='train/class_1/2.png', kind='truncated'):
    """Replace an image by a bad one."""
    path = image_tree / name
    path.write_bytes(BAD[kind][0]())
    return path


def pixels(config, data, is_train=False):
    """An image as the network sees it, before its normalisation, in [0, 255]."""
    image, _ = build_sample_transform(config, is_train)(data, 'image')
    if image.dtype == torch.uint8:
        return image.permute(2, 0, 1).double()
    preprocess = Preprocess(config, CPU)
    return (image * preprocess.std + preprocess.mean).double() * 255


# Odd images


@pytest.mark.parametrize('kind', ODD)
@pytest.mark.parametrize('channels', ['3', '1'])
def test_odd_images_are_read_alike_by_both_pipelines(tiny_config, kind, channels):
    """Their mean difference is below 2 of 255."""
    options = {'MODEL__MSG__IN_CHANS': channels, 'AUG__REPROB': '0'}
    configs = [tiny_config(DATA__PIPELINE=name, **options) for name in PIPELINES]
    fast, published = (pixels(config, ODD[kind]()) for config in configs)
    assert fast.shape == published.shape == (int(channels), 28, 28)
    assert (fast - published).abs().mean() < 2
    assert published.std() > 10 or kind in ('pixel', 'pixel_jpeg', 'wide', 'tall')
    for seed in range(10 if kind in ('pixel', 'pixel_jpeg') else 1):
        images = []
        for config in configs:
            with seeded(seed):
                images.append(pixels(config, ODD[kind](), is_train=True))
        assert (images[0] - images[1]).abs().mean() < 4  # after two operations on the colours


@pytest.mark.parametrize('kind', ['cmyk', 'deep_colour', 'palette', 'alpha', 'progressive'])
def test_odd_images_look_as_the_plain_one(tiny_config, kind):
    config = tiny_config()
    assert (pixels(config, ODD[kind]()) - pixels(config, ODD['plain']())).abs().mean() < 5


@pytest.mark.parametrize('size', [(20_000, 1), (1, 20_000), (4000, 40)])
def test_strips_are_not_resized_as_a_whole(tiny_config, monkeypatch, size):
    """Of 224 pixels, the resized strip would take 4 GB."""
    monkeypatch.setattr(decoding.F, 'interpolate', lambda *_, **__: pytest.fail('resizes all of it'))
    assert pixels(tiny_config(DATA__IMG_SIZE='224'), encoded(photograph(*size))).shape == (3, 224, 224)


# ON_ERROR stop


@pytest.fixture
def small_limit(monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 200_000)  # of which Pillow allows twice as many


@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize('pipeline', PIPELINES)
@pytest.mark.parametrize('kind', BAD)
def test_bad_images_stop_with_their_names(config_of, image_tree, small_limit, pipeline, kind, split):
    path = bad_image(image_tree, f'{split}/class_1/2.png', kind)
    dataset = open_dataset(config_of(DATA__PIPELINE=pipeline, DATA__ON_ERROR='stop'), split)
    bad = list(dataset.samples.names).index('class_1/2.png')
    with pytest.raises(DataError) as error:
        dataset[bad]
    assert re.fullmatch(f'image {path} {BAD[kind][1]}', str(error.value))
    assert dataset[bad + 1].skipped == -1


@pytest.mark.parametrize('pipeline', PIPELINES)
def test_a_member_of_a_shard_that_is_cut_short_is_named_with_its_shard(config_of, image_tree, tmp_path, pipeline):
    shards = as_shards(image_tree, tmp_path / 'shards')
    path = shards / 'val' / 'shard_00001.tar'
    cut(path, 5 * 4096)  # within its last image
    options = {'DATA__DATASET': 'shards', 'DATA__DATA_PATH': str(shards), 'DATA__PIPELINE': pipeline}
    with pytest.raises(DataError) as error:
        list(build_eval_loader(config_of(**options, DATA__ON_ERROR='stop')))
    assert re.fullmatch(
        rf'image class_2/1.png in {path} is cut short \(\d+ of \d+ bytes\): remove .*', str(error.value)
    )
    targets = torch.cat([batch.target for batch in build_eval_loader(config_of(**options))])
    assert targets.tolist() == [0] * 4 + [1] * 4 + [2, IGNORED, 2, 2]


# ON_ERROR skip


@pytest.mark.parametrize('pipeline', PIPELINES)
@pytest.mark.parametrize('kind', BAD)
def test_training_takes_the_next_good_image(config_of, image_tree, small_limit, pipeline, kind):
    for name in ('class_1/7.png', 'class_2/0.png'):
        bad_image(image_tree, f'train/{name}', kind)
    dataset = open_dataset(config_of(DATA__PIPELINE=pipeline, **PLAIN), 'train')
    good = dataset[17]
    for index in (15, 16):
        sample = dataset[index]
        assert (sample.target, sample.skipped) == (2, index)
        assert torch.equal(sample.image, good.image)
    assert good.skipped == dataset[14].skipped == -1


def test_the_image_after_the_last_is_the_first(config_of, image_tree):
    bad_image(image_tree, 'train/class_2/7.png')
    assert open_dataset(config_of(), 'train')[23].target == 0


@pytest.mark.parametrize('pipeline', PIPELINES)
def test_replacements_do_not_depend_on_loader_processes(config_of, image_tree, pipeline):
    for number in (2, 3, 6):
        bad_image(image_tree, f'train/class_1/{number}.png')
    batches = [
        [batch for loader in build_loaders(config_of(DATA__PIPELINE=pipeline, DATA__NUM_WORKERS=n)) for batch in loader]
        for n in ('0', '1', '2')
    ]
    assert sorted(torch.cat([batch.skipped for batch in batches[0]]).unique().tolist()) == [-1, 10, 11, 14]
    assert is_identical(batches[0], batches[1])
    assert is_identical(batches[0], batches[2])


@pytest.mark.parametrize('world_size', [1, 2, 3, 5])
def test_ranks_leave_a_bad_image_out_of_the_evaluation_once(config_of, image_tree, world_size):
    bad_image(image_tree, 'val/class_1/2.png')
    loaders = [build_eval_loader(config_of(), rank, world_size) for rank in range(world_size)]
    batches = [batch for loader in loaders for batch in loader]
    targets, skipped = (torch.cat([batch[i] for batch in batches]) for i in (1, 3))
    assert len(targets) == 12
    assert (targets == IGNORED).sum() == 1
    assert skipped[skipped >= 0].tolist() == [6]


@pytest.mark.parametrize('pipeline', PIPELINES)
def test_metrics_are_those_without_the_bad_images_and_each_is_logged_once(config_of, image_tree, pipeline):
    """One of them makes a whole batch of the evaluation, which is repeated with EMA weights."""
    steady = {'DATA__PIPELINE': pipeline, 'TRAIN__EMA_DECAY': '0.9', 'TRAIN__EPOCHS': '2', **PLAIN}
    steady |= {'DATA__BATCH_SIZE': '11'}
    names = ['train/class_0/1.png', 'val/class_0/3.png', 'val/class_2/3.png']
    paths = [bad_image(image_tree, name) for name in names]
    config = config_of(TAG='skips', **steady)
    with one_thread():
        program.main(config)
        log = log_of(config)
        for path in paths[1:]:
            path.unlink()
        last = str(folder_of(config) / 'ckpt_epoch_1.pth')
        without = config_of(TAG='without', EVAL_MODE='True', MODEL__RESUME=last, **steady)
        program.main(without)
    for path in paths:
        assert len(re.findall(rf'WARNING skipped \(\d so far\): image {path} cannot be read', log)) == 1
    assert 'Accuracy of the network on the 10 test images' in log
    assert 'Loss nan' in log  # of the batch
    epoch = records(config, 'epoch')[-1]
    assert np.isfinite(epoch['val_loss'])
    plain, ema = log_of(without).split('EMA weights:')
    assert f' * Acc@1 {epoch["acc1"]:.3f}' in plain
    assert f' * Acc@1 {epoch["ema_acc1"]:.3f}' in ema


@pytest.mark.parametrize('pipeline', PIPELINES)
def test_a_run_with_bad_images_resumes_bit_for_bit(config_of, image_tree, pipeline):
    """What the log says of them draws no random number."""
    for number in range(6):
        bad_image(image_tree, f'train/class_1/{number}.png')
    options = RANDOM | {'DATA__PIPELINE': pipeline, 'SAVE_STEPS': '2', 'SAVE_KEEP': '0', 'TRAIN__EPOCHS': '2'}
    with one_thread():
        whole = config_of(TAG='whole', **options)
        program.main(whole)
        start = str(folder_of(whole) / 'ckpt_epoch_1_step_2.pth')
        resumed = config_of(TAG='resumed', MODEL__RESUME=start, DATA__NUM_WORKERS='2', **options)
        program.main(resumed)
    assert 'skipped (1 so far)' in log_of(resumed)
    assert differences(last_checkpoint(whole), last_checkpoint(resumed)) == []


@pytest.mark.parametrize('split', ['train', 'val'])
def test_more_bad_images_than_the_limit_stop_the_run(config_of, image_tree, split):
    for number in range(3):
        bad_image(image_tree, f'{split}/class_1/{number}.png')
    program.main(config_of(DATA__ERROR_LIMIT='3'))
    with pytest.raises(
        DataError, match=r'^3 images cannot be read, more than DATA.ERROR_LIMIT 2: see the log, or list'
    ):
        program.main(config_of(TAG='limited', DATA__ERROR_LIMIT='2'))


@pytest.mark.parametrize('split', ['train', 'val'])
def test_nothing_but_bad_images_is_one_line(config_of, image_tree, split):
    for path in (image_tree / split).rglob('*.png'):
        path.write_bytes(b'')
    loader = build_loaders(config_of())[split == 'val']
    with pytest.raises(DataError) as error:
        list(loader)
    count = 24 if split == 'train' else 12
    assert re.fullmatch(
        f'none of the {count} images from {image_tree}/{split}/class_./..png on can be read: '
        'list them with python -m tools.check_dataset',
        str(error.value),
    )


def test_long_rows_of_bad_images_are_an_error(tiny_config, tmp_path):
    tree = write_images(tmp_path / 'tree', classes=1, train=120, val=1)
    config = tiny_config(DATA__DATA_PATH=str(tree), DATA__ON_ERROR='skip', MODEL__NUM_CLASSES='1')
    dataset = open_dataset(config, 'train')
    for name in list(dataset.samples.names)[10:]:
        bad_image(tree, f'train/{name}', 'empty')
    assert dataset[21].skipped == 21  # the next good one, after 99 bad ones
    with pytest.raises(DataError, match='none of the 100 images from .* on can be read'):
        dataset[20]
