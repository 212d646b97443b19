import pytest
import torch

from lr_scheduler import build_scheduler, learning_rate_scale, updates_per_epoch
from optimizer import build_optimizer
from tests.helpers.golden import golden

SCHEDULES = golden('train_v1')['schedules']
IMAGENET = {'DATA__BATCH_SIZE': '128', 'TRAIN__EPOCHS': '300', 'TRAIN__WARMUP_EPOCHS': '20', 'TRAIN__BASE_LR': '5e-4'}


def schedule_of(config, steps_per_epoch, scale=1.0):
    optimizer = build_optimizer(config, torch.nn.Linear(2, 2), lr=config.TRAIN.BASE_LR * scale)
    return build_scheduler(config, optimizer, steps_per_epoch, lr_scale=scale), optimizer.param_groups


@pytest.mark.parametrize('name', SCHEDULES)
def test_schedules_are_the_published_ones(tiny_config, name):
    config = tiny_config(TRAIN__LR_SCHEDULER__NAME=name, **IMAGENET)
    scale = learning_rate_scale(config, world_size=8)
    assert scale == 2
    scheduler, groups = schedule_of(config, 1251, scale)
    for update, rate in SCHEDULES[name].items():
        if update != 'start':
            scheduler.step_update(int(update))
        assert [group['lr'] for group in groups] == pytest.approx([rate, rate], rel=1e-9), update


@pytest.mark.parametrize('name', SCHEDULES)
def test_without_warm_up_the_first_update_runs_at_the_peak(tiny_config, name):
    scheduler, groups = schedule_of(tiny_config(TRAIN__LR_SCHEDULER__NAME=name, TRAIN__WARMUP_EPOCHS='0'), 10)
    assert groups[0]['lr'] == 0.1
    scheduler.step_update(0)
    assert groups[0]['lr'] == pytest.approx(0.1)


def test_rates_scale_with_the_images_of_an_update(tiny_config):
    config = tiny_config(DATA__BATCH_SIZE='64', TRAIN__ACCUMULATION_STEPS='4')
    assert updates_per_epoch(config, batches=9) == 3
    assert learning_rate_scale(config, world_size=2) == 1.0
    assert learning_rate_scale(tiny_config(DATA__BATCH_SIZE='64', TRAIN__ACCUMULATION_STEPS='0'), world_size=1) == 0.125


def test_an_unknown_name_is_refused(tiny_config):
    config = tiny_config().clone()
    config.defrost()
    config.TRAIN.LR_SCHEDULER.NAME = 'poly'
    with pytest.raises(ValueError, match='write cosine, linear or step'):
        schedule_of(config, 10)
