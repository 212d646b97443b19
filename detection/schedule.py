"""The learning rate of the detection recipe: a linear warm-up of some updates, then drops before some epochs."""

import torch
from timm.scheduler import MultiStepLRScheduler
from yacs.config import CfgNode


def build_scheduler(config: CfgNode, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> MultiStepLRScheduler:
    """The schedule of `TRAIN`; call its `step_update(k)` after update k, as of the root's lr_scheduler.py.

    Args:
        config: the config tree.
        optimizer: its groups hold the peak learning rate, already scaled.
        steps_per_epoch: updates in an epoch.
    """
    train = config.TRAIN
    return MultiStepLRScheduler(
        optimizer,
        # timm drops one update before the one it is told, so update 27 n, which runs at 27 n - 1, is the first to drop.
        decay_t=[epoch * steps_per_epoch for epoch in train.LR_SCHEDULER.DECAY_EPOCHS],
        decay_rate=train.LR_SCHEDULER.DECAY_RATE,
        warmup_t=train.WARMUP_STEPS,
        warmup_lr_init=train.WARMUP_FACTOR * optimizer.param_groups[0]['lr'],
        warmup_prefix=False,
        t_in_epochs=False,
    )
