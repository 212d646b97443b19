import pytest
import torch
from timm.scheduler import create_scheduler_v2

from engine.distributed import Process
from lr_scheduler import build_scheduler
from optimizer import build_optimizer
from tests.helpers.golden import golden
from tests.helpers.runs import CPU, build_run, build_trainer

SCHEDULES = golden('train_v1')['schedules']
IMAGENET = {'DATA__BATCH_SIZE': '128', 'TRAIN__EPOCHS': '300', 'TRAIN__WARMUP_EPOCHS': '20', 'TRAIN__BASE_LR': '5e-4'}


def schedule(config, steps_per_epoch, scale=1.0):
    optimizer = build_optimizer(config, torch.nn.Linear(2, 2), lr=config.TRAIN.BASE_LR * scale)
    return build_scheduler(config, optimizer, steps_per_epoch, lr_scale=scale), optimizer.param_groups


@pytest.mark.parametrize('name', SCHEDULES)
def test_published_schedules(tiny_config, name):
    config = tiny_config(TRAIN__LR_SCHEDULER__NAME=name, **IMAGENET)
    scale = build_run(config, Process(0, 8, CPU)).images_per_update / config.TRAIN.BASE_BATCH
    assert scale == 2
    scheduler, groups = schedule(config, 1251, scale)
    for update, rate in SCHEDULES[name].items():
        if update != 'start':
            scheduler.step_update(int(update))
        assert [group['lr'] for group in groups] == pytest.approx([rate, rate], rel=1e-9), update


@pytest.mark.parametrize('name', SCHEDULES)
def test_first_update_without_warm_up_runs_at_the_peak(tiny_config, name):
    scheduler, groups = schedule(tiny_config(TRAIN__LR_SCHEDULER__NAME=name, TRAIN__WARMUP_EPOCHS='0'), 10)
    assert groups[0]['lr'] == 0.1
    scheduler.step_update(0)
    assert groups[0]['lr'] == pytest.approx(0.1)


def test_a_schedule_by_epoch_is_that_of_timms_trainer(tiny_config):
    config = tiny_config(TRAIN__LR_SCHEDULER__UNIT='epoch', TRAIN__EPOCHS='6', TRAIN__WARMUP_EPOCHS='2')
    model, train = torch.nn.Linear(2, 2), config.TRAIN
    state = build_trainer(config, model).state
    optimizer = torch.optim.SGD(model.parameters(), lr=train.BASE_LR)
    kwargs = {'num_epochs': 6, 'warmup_epochs': 2, 'warmup_lr': train.WARMUP_LR, 'min_lr': train.MIN_LR}
    expected, _ = create_scheduler_v2(optimizer, sched='cosine', **kwargs)
    for epoch in range(6):
        for step in range(4):
            assert state.lr == pytest.approx(optimizer.param_groups[0]['lr'], rel=1e-12), (epoch, step)
            state.step += 1
            if (epoch, step) != (3, 0):
                state.advance()
            else:  # which does not delay the next epoch
                state.skip()
        state.end_epoch()
        expected.step(epoch + 1)


@pytest.mark.parametrize(('steps', 'world_size', 'images'), [('4', 2, 512), ('0', 1, 64), ('1', 1, 64)])
def test_images_per_update(tiny_config, steps, world_size, images):
    config = tiny_config(DATA__BATCH_SIZE='64', TRAIN__ACCUMULATION_STEPS=steps)
    assert build_run(config, Process(0, world_size, CPU)).images_per_update == images


def test_unknown_name_is_refused(tiny_config):
    config = tiny_config().clone()
    config.defrost()
    config.TRAIN.LR_SCHEDULER.NAME = 'poly'
    with pytest.raises(ValueError, match='write cosine, linear or step'):
        schedule(config, 10)
