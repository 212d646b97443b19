"""Repeat-factor sampling: the published formula, and how often images are seen."""

import pickle
from collections import Counter
from itertools import chain

import pytest
import torch

from data.samplers import TrainSampler, draw_repeats
from detection.data import build_loaders
from detection.data.coco import CocoDataset
from detection.data.repeat_factors import repeat_factors
from detection.data.samplers import GroupedTrainSampler
from tests.helpers.coco_data import CATEGORIES, crowd, read_tree, rectangle, update_tree
from tests.helpers.detectors import tiny_detector

BOX, WEDGE, RARE = (category['id'] for category in CATEGORIES)


@pytest.fixture
def long_tail(coco):
    """Six training images: boxes in all, wedges in two of them, a rare object (and a crowd of them) in one of these."""
    images = read_tree(coco, 'train')['images']
    objects = [(image, BOX) for image in images for _ in range(3)]
    objects += [(images[1], WEDGE), (images[1], WEDGE), (images[4], WEDGE), (images[4], RARE)]
    annotations = [rectangle(4, 4, 10, 10) | {'image_id': image['id'], 'category_id': x} for image, x in objects]
    region = crowd(images[0]['width'], images[0]['height'], rows=9)
    annotations.append(region | {'image_id': images[0]['id'], 'category_id': RARE})
    update_tree(coco, 'train', annotations=annotations)
    return coco


def test_repeat_factors_are_those_of_the_paper(long_tail):
    dataset = CocoDataset(long_tail, 'train', is_train=True).share()
    # Fractions of the images: boxes 1, wedges 1/3, rare objects 1/6. At 1/2: sqrt(3/2) and sqrt(3)
    assert repeat_factors(dataset, 0.5).tolist() == pytest.approx([1, 1.2247449, 1, 1, 1.7320508, 1])
    assert repeat_factors(dataset, 0.2).tolist() == pytest.approx([1, 1, 1, 1, 1.0954451, 1])
    assert repeat_factors(dataset, 0.1).tolist() == [1] * 6


def test_a_factor_is_rounded_to_its_neighbours_and_right_on_average():
    factors = torch.tensor([1.0, 1.25, 2.5, 3.9, 1.0, 1.6], dtype=torch.float64)
    total, counts = 1500, Counter()
    for seed in range(total):
        drawn = Counter(draw_repeats(factors, torch.Generator().manual_seed(seed)).tolist())
        assert drawn.total() in (11, 12)  # of 11.25
        for index, factor in enumerate(factors.tolist()):
            assert drawn[index] in (int(factor), -int(-factor // 1))
        counts += drawn
    means = torch.tensor([counts[index] / total for index in range(6)])
    torch.testing.assert_close(means, factors.float(), atol=0.05, rtol=0)  # four standard deviations


@pytest.mark.parametrize('world_size', [1, 2, 4])
def test_epochs_are_as_long_and_differ_and_ranks_share_them(world_size):
    factors = torch.linspace(1, 3, 50, dtype=torch.float64) ** 1.5
    length = int(factors.sum())
    epochs = []
    for epoch in range(2):
        samplers = [TrainSampler(50, rank, world_size, seed=3, repeat_factors=factors) for rank in range(world_size)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        keys = list(chain.from_iterable(zip(*samplers, strict=True)))[:length]
        indices = [key[1] for key in keys]
        assert len(set(keys)) == len(keys) == length  # each copy is augmented differently
        assert set(indices) == set(range(50))
        epochs.append(indices)
    assert Counter(epochs[0]) != Counter(epochs[1])  # rounded anew


def test_a_sampler_with_repeats_resumes_within_an_epoch():
    groups, factors = [index % 3 == 0 for index in range(50)], torch.linspace(1, 2, 50)
    sampler = GroupedTrainSampler(groups, 4, seed=1, repeat_factors=factors)
    sampler.set_epoch(2)
    whole = list(sampler)
    state = pickle.loads(pickle.dumps(sampler.state_dict()))
    resumed = GroupedTrainSampler(groups, 4, seed=1, repeat_factors=factors)
    resumed.load_state_dict(state, start=12)
    assert list(resumed) == whole[12:]
    assert len(whole) == 75
    batches = [{groups[key[1]] for key in whole[start : start + 4]} for start in range(0, 72, 4)]
    assert sum(len(batch) > 1 for batch in batches) <= 1
    with pytest.raises(ValueError, match='epoch of 75 images, but there are 50 now'):
        GroupedTrainSampler(groups, 4).load_state_dict(state, start=12)


def test_rare_classes_are_seen_more_often_in_training(long_tail):
    def count(threshold):
        opts = ['DATA.DATA_PATH', str(long_tail), 'DATA.BATCH_SIZE', '1', 'DATA.REPEAT_FACTOR', threshold]
        loader, _ = build_loaders(tiny_detector(*opts))
        labels, samples = Counter(), 0
        for epoch in range(60):
            loader.sampler.set_epoch(epoch)
            for _, index, *_ in loader.sampler:
                samples += 1
                labels.update({x['category_id'] for x in loader.dataset.dataset.objects(index)})
        return samples / 60, labels[RARE] / 60, loader.dataset.dataset.notes

    samples, rare, notes = count('0.5')
    assert samples == 6  # of 6.96, rounded down
    assert rare == pytest.approx(1.73 * 6 / 6.5, abs=0.2)
    assert any('6 samples of 6 images: 2 images are repeated, at most 1.7 times on average' in x for x in notes)
    samples, rare, notes = count('0')
    assert (samples, rare) == (6, 1)
    assert not any('REPEAT_FACTOR' in x for x in notes)
