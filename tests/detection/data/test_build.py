"""Loaders from the config tree."""

import pickle
from itertools import chain

import pytest
import torch

from data import DataError
from detection.data import build_eval_loader, build_loaders
from detection.data import coco as coco_module
from tests.helpers.coco_data import CATEGORIES, crowd, read_tree, update_tree
from tests.helpers.detectors import tiny_detector
from tests.helpers.processes import run_ranks


def coco_config(root, **options):
    """The config of the data, with options of `DATA`."""
    options = {'DATA_PATH': root} | options
    return tiny_detector(*chain.from_iterable((f'DATA.{key}', str(value)) for key, value in options.items()))


def test_batches_do_not_depend_on_workers_and_shards_are_disjoint(coco):
    epochs = []
    for workers in (0, 2):
        train, val = build_loaders(coco_config(coco, NUM_WORKERS=workers))
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
    shards = [build_eval_loader(coco_config(coco), rank, 3) for rank in range(3)]
    ids = [target['image_id'] for loader in shards for _, targets in loader for target in targets]
    assert sorted(ids) == [5, 15, 25, 35]
    assert len(pickle.dumps(train.dataset)) < 2000  # a reference to shared memory
    assert len(pickle.loads(pickle.dumps(train.dataset))) == 6


@pytest.mark.parametrize(('factor', 'ranks', 'longest'), [('0', 0, 6), ('0.9', 0, 7), ('0', 2, 6)])
def test_epochs_may_be_shorter(coco, factor, ranks, longest):
    options = ('DATA.DATA_PATH', str(coco), 'DATA.REPEAT_FACTOR', factor, 'TRAIN.VIRTUAL_RANKS', str(ranks))
    options += ('DATA.BATCH_SIZE', '1')
    whole, _ = build_loaders(tiny_detector(*options))
    assert whole.batch_sampler.sampler.length >= longest
    train, _ = build_loaders(tiny_detector(*options, 'DATA.IMAGES_PER_EPOCH', '4'))
    assert len(list(train)) == 4
    notes = [note for note in train.dataset.dataset.notes if 'an epoch has' in note]
    assert all('an epoch has 4 samples' in note for note in notes)
    assert bool(notes) == (factor != '0')
    with pytest.raises(DataError, match='write at most'):
        build_loaders(tiny_detector(*options, 'DATA.IMAGES_PER_EPOCH', '99'))


AUGMENTED = ('INPUT.SCALE_JITTER', '[0.5,2.0]', 'INPUT.JITTER_SIZE', '72', 'INPUT.COPY_PASTE', '0.7')
AUGMENTED += ('DATA.REPEAT_FACTOR', '0.9')


def assert_same_batches(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for (images, targets), (other_images, other_targets) in zip(ours, theirs, strict=True):
        assert all(map(torch.equal, images, other_images))
        for target, other in zip(targets, other_targets, strict=True):
            assert target['image_id'] == other['image_id']
            assert all(torch.equal(target[key], other[key]) for key in ('boxes', 'labels', 'masks', 'has_mask'))


@pytest.mark.parametrize(('workers', 'virtual_ranks'), [(2, 0), (0, 2)])
def test_jitter_copy_paste_and_repeats_resume_within_an_epoch(coco, workers, virtual_ranks):
    def load(**options):
        opts = ['DATA.DATA_PATH', str(coco), *AUGMENTED, 'TRAIN.VIRTUAL_RANKS', virtual_ranks, 'DATA.BATCH_SIZE', '1']
        loader, _ = build_loaders(tiny_detector(*opts, *chain.from_iterable(options.items())))
        return loader, (loader.batch_sampler if virtual_ranks else loader).sampler

    loader, sampler = load()
    sampler.set_epoch(1)
    whole = list(loader)
    assert len(whole) > 6  # images are repeated
    state = sampler.state_dict()
    resumed, sampler = load(**{'DATA.NUM_WORKERS': str(workers)})
    sampler.load_state_dict(state, start=4)
    assert_same_batches(list(resumed), whole[4:])
    again, sampler = load(SEED='1')
    sampler.set_epoch(1)
    assert any(image.shape != x.shape for ([image], _), ([x], _) in zip(again, whole, strict=True))


@pytest.mark.parametrize('world_size', [2, 4])
def test_virtual_ranks_see_what_processes_see(coco, world_size):
    opts = ['DATA.DATA_PATH', str(coco), 'DATA.BATCH_SIZE', '1', *AUGMENTED]
    processes = [build_loaders(tiny_detector(*opts), rank, world_size)[0] for rank in range(world_size)]
    virtual, _ = build_loaders(tiny_detector(*opts, 'TRAIN.VIRTUAL_RANKS', world_size))
    assert_same_batches(list(virtual), list(chain.from_iterable(zip(*processes, strict=True))))


def build_and_read(rank, folder, config):
    """Build the loaders and read all of them; note who reads the annotations."""
    open_annotations = coco_module.open_annotations

    def note(path, *args, **kwargs):
        (folder / f'{rank}_{path.stem}').touch()
        return open_annotations(path, *args, **kwargs)

    coco_module.open_annotations = note
    loaders = build_loaders(config, rank, 2)
    assert [len(list(loader)) for loader in loaders] == [1, 2]
    assert len(loaders[1].dataset.ground_truth['images']) == 4


def test_one_rank_of_a_node_reads_the_annotations(coco, tmp_path):
    run_ranks(build_and_read, tmp_path, coco_config(coco, NUM_WORKERS=0), nodes='aa')
    assert sorted(path.name for path in tmp_path.glob('?_instances_*')) == ['0_instances_train', '0_instances_val']


def test_data_that_does_not_fit_the_config_is_refused(coco):
    with pytest.raises(DataError, match='no data: give --data-path'):
        build_eval_loader(coco_config(''))
    config = tiny_detector('DATA.DATA_PATH', str(coco), 'MODEL.NUM_CLASSES', 80)
    with pytest.raises(DataError, match='has 3 categories, but MODEL.NUM_CLASSES is 80.*MODEL.NUM_CLASSES 3'):
        build_eval_loader(config)
    with pytest.raises(DataError, match='6 training images make no full batch: DATA.BATCH_SIZE 4 on 2 process'):
        build_loaders(coco_config(coco, BATCH_SIZE=4), world_size=2)
    annotations = read_tree(coco, 'val')['annotations']
    for absent in ([], [crowd(64, 48, rows=9) | {'image_id': 5}]):
        update_tree(coco, annotations=absent)
        with pytest.raises(DataError, match='instances_val.json has no objects in the images to evaluate on, so AP is'):
            build_loaders(coco_config(coco))
    loader = build_eval_loader(coco_config(coco))  # for --eval it is a note
    assert 'no objects: AP and AR are undefined' in loader.dataset.notes
    update_tree(coco, annotations=annotations)
    update_tree(coco, categories=[*CATEGORIES[:2], {'id': 90, 'name': 'common'}])
    with pytest.raises(DataError, match='instances_train.json and .*instances_val.json have different categories'):
        build_loaders(coco_config(coco))
