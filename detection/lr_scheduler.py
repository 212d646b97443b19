"""The learning-rate schedule of detection: linear warm-up over some updates, then drops before some epochs."""

import torch
from timm.scheduler import MultiStepLRScheduler
from yacs.config import CfgNode


class UpdateSchedule(MultiStepLRScheduler):
    """Learning rates by update: `step_update(k)`, called after update k, sets that of update k + 1."""

    def _get_lr(self, t: int) -> list[float]:
        return super()._get_lr(t + 1)


def build_scheduler(config: CfgNode, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> UpdateSchedule:
    """Build the schedule of `TRAIN`; call its `step_update(k)` after update k, as in the root's lr_scheduler.py.

    Args:
        config: the config tree.
        optimizer: its groups hold the peak learning rate, already scaled.
        steps_per_epoch: updates per epoch.
    """
    train = config.TRAIN
    return UpdateSchedule(
        optimizer,
        # timm drops one update before the one it is given.
        decay_t=[epoch * steps_per_epoch + 1 for epoch in train.LR_SCHEDULER.DECAY_EPOCHS],
        decay_rate=train.LR_SCHEDULER.DECAY_RATE,
        warmup_t=train.WARMUP_STEPS,
        warmup_lr_init=train.WARMUP_FACTOR * optimizer.param_groups[0]['lr'],
        warmup_prefix=False,
        t_in_epochs=False,
    )
