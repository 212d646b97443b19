"""Learning-rate schedules by update or by epoch: linear warm-up, then cosine, linear or step.

The schedule steps after the optimizer with the index of the update just made, so update k runs at
schedule(max(k - 1, 0)), as in the published code. A schedule by epoch is constant within an epoch, as in timm's
trainer.
"""

from collections.abc import Callable

import torch
from timm.scheduler import CosineLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from yacs.config import CfgNode


def build_scheduler(
    config: CfgNode,
    optimizer: torch.optim.Optimizer,
    steps_per_epoch: int,
    lr_scale: float = 1.0,
    updates_before: Callable[[int], int] | None = None,
) -> Scheduler:
    """Build the learning-rate schedule of `TRAIN.LR_SCHEDULER`, with linear warm-up.

    Call its `step_update(k)` after update k, and its `step(e)` before epoch e. Only the call that matches
    `TRAIN.LR_SCHEDULER.UNIT` changes the learning rate.

    Args:
        config: the config tree; `TRAIN` is read.
        optimizer: its groups hold the peak learning rate, already scaled.
        steps_per_epoch: updates per epoch.
        lr_scale: factor on `WARMUP_LR` and `MIN_LR`.
        updates_before: function that returns the number of updates before an epoch, for epochs of different lengths;
            the schedule `step` does not use it. None if all epochs have `steps_per_epoch` updates.

    Raises:
        ValueError: the schedule's name is unknown.
    """
    train = config.TRAIN
    by_epoch = train.LR_SCHEDULER.UNIT == 'epoch'
    steps_per_epoch = 1 if by_epoch else steps_per_epoch
    if by_epoch or updates_before is None:
        total, warmup_t = (epochs * steps_per_epoch for epochs in (train.EPOCHS, train.WARMUP_EPOCHS))
    else:
        total, warmup_t = map(updates_before, (train.EPOCHS, train.WARMUP_EPOCHS))
    warmup = {
        'warmup_t': warmup_t,
        'warmup_lr_init': train.WARMUP_LR * lr_scale,
        't_in_epochs': by_epoch,
    }
    name = train.LR_SCHEDULER.NAME
    if name == 'cosine':
        # No warm-up prefix, as published: the cosine is taken at t / total, so the rate drops at the end of warm-up.
        return CosineLRScheduler(
            optimizer, t_initial=total, lr_min=train.MIN_LR * lr_scale, cycle_limit=1, warmup_prefix=False, **warmup
        )
    if name == 'linear':
        return LinearLRScheduler(optimizer, t_initial=total, lr_min_rate=0.01, **warmup)
    if name == 'step':
        return StepLRScheduler(
            optimizer,
            decay_t=train.LR_SCHEDULER.DECAY_EPOCHS * steps_per_epoch,
            decay_rate=train.LR_SCHEDULER.DECAY_RATE,
            **warmup,
        )
    raise ValueError(f'TRAIN.LR_SCHEDULER.NAME is {name!r}: write cosine, linear or step')


class LinearLRScheduler(Scheduler):
    """Linear warm-up, then linear decay from the peak to a fraction of it.

    Args:
        optimizer: its groups hold the peak learning rate.
        t_initial: updates in total.
        lr_min_rate: final learning rate relative to the peak.
        warmup_t: updates of warm-up.
        warmup_lr_init: learning rate of the first update.
        t_in_epochs: whether t counts epochs instead of updates.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        t_initial: int,
        lr_min_rate: float,
        warmup_t: int = 0,
        warmup_lr_init: float = 0.0,
        t_in_epochs: bool = True,
    ):
        super().__init__(optimizer, param_group_field='lr', t_in_epochs=t_in_epochs)
        self.t_initial = t_initial
        self.lr_min_rate = lr_min_rate
        self.warmup_t = warmup_t
        self.warmup_lr_init = warmup_lr_init
        if warmup_t:
            self.update_groups(warmup_lr_init)

    def _get_lr(self, t: int) -> list[float]:
        if t < self.warmup_t:
            return [self.warmup_lr_init + t * (base - self.warmup_lr_init) / self.warmup_t for base in self.base_values]
        progress = min((t - self.warmup_t) / (self.t_initial - self.warmup_t), 1.0)
        return [base * (1.0 - (1.0 - self.lr_min_rate) * progress) for base in self.base_values]
