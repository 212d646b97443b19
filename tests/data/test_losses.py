"""Binary cross entropy, and class weights of both losses."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from data import DataError, build_criterion, build_mixup, class_weights
from data.build import build_loaders
from data.class_balance import draw_weights
from data.dataset import ImageDataset
from data.images import PartError
from data.python_dataset import PythonDataset
from main import TASK
from tests.helpers.images import write_images
from tests.helpers.runs import PLAIN, build_run

LOGITS = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
TARGETS = torch.tensor([0, 1, 2, 0, 0, 0, 1, 0])
WEIGHTS = torch.tensor([0.5, 1.0, 3.0])
UNMIXED = {'AUG__MIXUP': '0', 'AUG__CUTMIX': '0'}


def dataset_of(targets, classes=3):
    """A dataset that a user wrote, with or without the attribute `targets`."""
    samples = [None] * (12 if targets is None else len(targets))
    dataset = type('Labelled', (list,), {} if targets is None else {'targets': targets})(samples)
    return ImageDataset(PythonDataset(dataset, 'mine (train)', classes), None)


@pytest.mark.parametrize('mixed', [False, True])
def test_bce_is_that_of_each_class(tiny_config, mixed):
    options = {} if mixed else UNMIXED
    config = tiny_config(TRAIN__LOSS='bce', **options)
    _, targets = build_mixup(config)(torch.rand(8, 3, 28, 28), TARGETS)
    soft = targets if mixed else F.one_hot(TARGETS, 3) * 0.9 + 0.1 / 3
    expected = F.binary_cross_entropy_with_logits(LOGITS, soft)
    assert build_criterion(config)(LOGITS, targets) == pytest.approx(expected.item())
    summed = build_criterion(tiny_config(TRAIN__LOSS='bce', TRAIN__BCE_SUM='True', **options))
    assert summed(LOGITS, targets) == pytest.approx(3 * expected.item())
    hard = build_criterion(tiny_config(TRAIN__LOSS='bce', TRAIN__BCE_THRESHOLD='0.2', **options))
    expected = F.binary_cross_entropy_with_logits(LOGITS, (soft > 0.2).float())
    assert hard(LOGITS, targets) == pytest.approx(expected.item())
    weighted = build_criterion(config, WEIGHTS)
    expected = F.binary_cross_entropy_with_logits(LOGITS, soft, pos_weight=WEIGHTS)
    assert weighted(LOGITS, targets) == pytest.approx(expected.item())
    with torch.autocast('cpu', torch.bfloat16):
        loss = weighted(LOGITS.bfloat16(), targets)
    assert loss.dtype == torch.float32
    assert loss == weighted(LOGITS.bfloat16().float(), targets)


def test_labels_of_several_classes_are_smoothed_towards_a_half(tiny_config):
    config = tiny_config(TRAIN__LOSS='bce', DATA__MULTI_LABEL='True', **UNMIXED)
    targets = torch.tensor([[1.0, 0, 1], [0, 0, 0]])
    expected = F.binary_cross_entropy_with_logits(LOGITS[:2], targets * 0.9 + 0.05)
    assert build_criterion(config)(LOGITS[:2], targets) == pytest.approx(expected.item())


@pytest.mark.parametrize('options', [{}, UNMIXED, PLAIN], ids=['mixed', 'smoothed', 'plain'])
def test_class_weights_of_the_cross_entropy(tiny_config, options):
    config = tiny_config(**options)
    _, targets = build_mixup(config)(torch.rand(8, 3, 28, 28), TARGETS)
    plain, equal = build_criterion(config), build_criterion(config, torch.ones(3))
    assert equal(LOGITS, targets) == pytest.approx(plain(LOGITS, targets).item())
    weighted = build_criterion(config, WEIGHTS)
    soft = targets if targets.ndim == 2 else F.one_hot(targets, 3).float()
    if options is UNMIXED:
        soft = soft * 0.9 + 0.1 / 3
    expected = -(WEIGHTS * soft * LOGITS.log_softmax(dim=1)).sum(dim=1).mean()
    assert weighted(LOGITS, targets) == pytest.approx(expected.item())
    # The mean over two ranks, or two accumulated batches, is that of one batch
    halves = [weighted(LOGITS[part], targets[part]) for part in (slice(4), slice(4, 8))]
    assert sum(halves) / 2 == pytest.approx(expected.item())
    assert type(weighted) is not nn.CrossEntropyLoss


def test_weights_follow_the_sizes_of_the_classes(tiny_config):
    targets = torch.tensor([0] * 8 + [1] * 2 + [2] * 2)  # as torchvision's MNIST has them
    dataset = dataset_of(targets)
    assert class_weights(tiny_config(), dataset) is None
    balanced = class_weights(tiny_config(TRAIN__CLASS_WEIGHTS='balanced'), dataset)
    assert balanced.tolist() == [0.5, 2.0, 2.0]
    root = class_weights(tiny_config(TRAIN__CLASS_WEIGHTS='sqrt'), dataset)
    assert root[1] / root[0] == pytest.approx(2)
    assert root[targets].mean() == pytest.approx(1)
    assert balanced[targets].mean() == 1
    assert draw_weights(tiny_config(), dataset) is None
    for kind, totals in (('balanced', [1, 1, 1]), ('sqrt', [8**0.5, 2**0.5, 2**0.5])):
        weights = draw_weights(tiny_config(DATA__SAMPLING=kind), dataset).numpy()
        assert np.bincount(targets, weights) == pytest.approx(totals)


@pytest.fixture
def unbalanced(tmp_path):
    """A folder with 1 image of the first class, and 20 of each of the others."""
    folder = write_images(tmp_path / 'images', train=20)
    for path in sorted((folder / 'train' / 'class_0').iterdir())[1:]:
        path.unlink()
    return folder


def test_loaders_draw_rare_classes_as_often_as_others(tiny_config, unbalanced):
    options = {'DATA__DATA_PATH': str(unbalanced), 'DATA__SAMPLING': 'balanced'}
    batches = list(build_loaders(tiny_config(**options))[0])
    targets = torch.cat([batch.target for batch in batches])
    assert len(targets) == 40  # of 41 images
    assert (targets == 0).sum() > 7
    copies = torch.cat([batch.image for batch in batches])[targets == 0]
    assert len({image.numpy().tobytes() for image in copies}) == len(copies)  # each augmented in its own way
    repeated = list(build_loaders(tiny_config(**options, AUG__REPEATS='2'))[0].sampler)
    assert [key[1] for key in repeated[0:40:2]] == [key[1] for key in repeated[1:41:2]]


def test_training_weights_the_classes(tiny_config, unbalanced):
    config = tiny_config(DATA__DATA_PATH=str(unbalanced), TRAIN__CLASS_WEIGHTS='balanced', **PLAIN)
    loader, _ = build_loaders(config)
    loss_fn = TASK.build_loss(build_run(config), lambda images: torch.zeros(len(images), 3), loader.dataset.dataset)
    weights = torch.tensor([41 / 3, 41 / 60, 41 / 60])
    for batch in loader:
        assert loss_fn(batch)['loss'] == pytest.approx(weights[batch.target].mean().item() * math.log(3))


def test_what_cannot_be_weighted_is_told(tiny_config):
    config = tiny_config(TRAIN__CLASS_WEIGHTS='balanced', DATA__SAMPLING='sqrt')
    for function, setting in ((class_weights, 'TRAIN.CLASS_WEIGHTS balanced'), (draw_weights, 'DATA.SAMPLING sqrt')):
        with pytest.raises(DataError, match=rf'{setting} needs .* mine \(train\) has no attribute `targets`: give'):
            function(config, dataset_of(None))
    with pytest.raises(DataError, match='class 1 of .* has no images, so it gets no weight: add some, or write TRAIN'):
        class_weights(config, dataset_of([0, 2, 2]))
    for targets in (['cat', 'dog', 'cat'], [0, 1, 3], [[0, 1], [1], []]):
        with pytest.raises(PartError, match='`targets` of .* are not .*class indices.*: give one for each sample'):
            draw_weights(config, dataset_of(targets))
