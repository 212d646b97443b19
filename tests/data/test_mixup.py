import pytest
import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from data import build_criterion, build_mixup


@pytest.mark.parametrize(
    ('options', 'is_mixed', 'loss'),
    [
        ({}, True, SoftTargetCrossEntropy),
        ({'AUG__MIXUP': '0'}, True, SoftTargetCrossEntropy),  # CutMix alone has soft targets too
        ({'AUG__CUTMIX': '0'}, True, SoftTargetCrossEntropy),
        ({'AUG__MIXUP': '0', 'AUG__CUTMIX': '0', 'AUG__CUTMIX_MINMAX': '(0.2, 0.8)'}, True, SoftTargetCrossEntropy),
        ({'AUG__MIXUP': '0', 'AUG__CUTMIX': '0'}, False, LabelSmoothingCrossEntropy),
        ({'AUG__MIXUP': '0', 'AUG__CUTMIX': '0', 'MODEL__LABEL_SMOOTHING': '0'}, False, nn.CrossEntropyLoss),
    ],
)
@pytest.mark.parametrize('mode', ['batch', 'pair', 'elem'])
def test_loss_matches_the_targets(tiny_config, options, is_mixed, loss, mode):
    config = tiny_config(**options, AUG__MIXUP_MODE=mode)
    mixup, criterion = build_mixup(config), build_criterion(config)
    assert isinstance(mixup, Mixup) == is_mixed
    assert type(criterion) is loss
    _, targets = mixup(torch.rand(4, 3, 28, 28), torch.tensor([0, 1, 2, 0]))
    assert targets.shape == ((4, 3) if is_mixed else (4,))
    assert criterion(torch.randn(4, 3), targets).isfinite()


def test_mixup_takes_its_options(tiny_config):
    config = tiny_config(
        AUG__MIXUP='0.3', AUG__CUTMIX='0.7', AUG__MIXUP_PROB='0.6', AUG__MIXUP_SWITCH_PROB='0.2', AUG__MIXUP_MODE='elem'
    )
    mixup = build_mixup(config)
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.mix_prob, mixup.switch_prob) == (0.3, 0.7, 0.6, 0.2)
    assert (mixup.mode, mixup.label_smoothing, mixup.num_classes) == ('elem', 0.1, 3)
