import pytest
import torch

from detection.lr_scheduler import build_scheduler
from tests.helpers.detectors import tiny_detector

PEAK = 0.02


@pytest.fixture
def config():
    schedule = 'TRAIN.EPOCHS 4 TRAIN.WARMUP_STEPS 5 TRAIN.LR_SCHEDULER.DECAY_EPOCHS [2,3]'
    return tiny_detector(*schedule.split())


@pytest.fixture
def optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)


def test_warmup_is_linear_and_the_rate_drops_before_its_epochs(config, optimizer):
    scheduler = build_scheduler(config, optimizer, steps_per_epoch=10)
    rates = []
    for update in range(40):
        if update:  # as `TrainingState` does before update k
            scheduler.step_update(update - 1)
        rates.append(optimizer.param_groups[0]['lr'] / PEAK)
    warmup = [0.001 + 0.999 * update / 5 for update in range(5)]
    assert rates == pytest.approx(warmup + [1.0] * 15 + [0.1] * 10 + [0.01] * 10)


@pytest.mark.parametrize(('update', 'factor'), [(2, 0.001 + 0.999 * 2 / 5), (19, 1.0), (20, 0.1), (30, 0.01)])
def test_a_new_schedule_resumes_at_any_update(config, optimizer, update, factor):
    build_scheduler(config, optimizer, steps_per_epoch=10).step_update(update - 1)
    assert optimizer.param_groups[0]['lr'] == pytest.approx(PEAK * factor)
