"""Where a training run stands, complete: a run continued from it ends with the same bits as one never interrupted."""

from dataclasses import dataclass, field
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from checkpoint import CheckpointError, load_weights
from data.samplers import TrainSampler
from data.seeding import random_states, set_random_states
from precision import ApexPrecision, Precision
from utils import gather_on_main_process


@dataclass
class TrainingState:
    """Everything that changes while a run trains, and its place in the run.

    Attributes:
        model: the network, not wrapped, with its starting weights.
        optimizer: of its parameters.
        scheduler: of the optimizer's learning rate, per update.
        precision: of the run.
        sampler: of the training images.
        device: of this process.
        steps_per_epoch: updates in an epoch.
        images_per_epoch: images that all processes together see in an epoch.
        images_per_update: and in an update; the last of an epoch may have fewer.
        ema: average of the weights, if there is one.
        epoch: this one, from 0.
        step: updates made in it.
        skipped: updates of the whole run that left the weights as they were.
        max_accuracy: best accuracy so far, in percent.
        sums: of the epoch's losses and gradient norms, and their number, (3,); of this process.
    """

    model: nn.Module
    optimizer: Optimizer
    scheduler: Scheduler
    precision: Precision | ApexPrecision
    sampler: TrainSampler
    device: torch.device
    steps_per_epoch: int
    images_per_epoch: int
    images_per_update: int
    ema: ModelEmaV3 | None = None
    epoch: int = 0
    step: int = 0
    skipped: int = 0
    max_accuracy: float = -1.0
    sums: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.sums = torch.zeros(3, device=self.device)
        self._position_schedule()

    @property
    def updates(self) -> int:
        """Updates of the weights in the whole run."""
        return max(self.epoch * self.steps_per_epoch + self.step - self.skipped, 0)

    @property
    def images(self) -> int:
        """Images of the epoch that all processes together have seen."""
        return min(self.step * self.images_per_update, self.images_per_epoch)

    def advance(self, updated: bool) -> None:
        """Count an update; schedule and average move on only if it has changed the weights."""
        if updated:
            self.scheduler.step_update(self.updates)
            if self.ema is not None:
                self.ema.update(self.model)
        else:
            self.skipped += 1
        self.step += 1

    def begin_epoch(self) -> None:
        """Shuffle for this epoch, unless it was begun before the run was interrupted."""
        if self.step == 0:
            self.sampler.set_epoch(self.epoch)
            self.sums.zero_()

    def end_epoch(self) -> None:
        """Go on to the next epoch."""
        self.epoch, self.step = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any] | None:
        """A checkpoint's entries, in rank 0; None in the others. Every process calls it at the same point."""
        ranks = gather_on_main_process({'random': random_states(self.device), 'sums': self.sums.cpu()})
        if ranks is None:
            return None
        state = {
            'model': self.model.state_dict(),
            'optimizer': self.optimizer.state_dict(),
            'lr_scheduler': self.scheduler.state_dict(),
            'precision': self.precision.state_dict(),
            # As published, the last epoch that was begun; `place` is where to continue.
            'epoch': self.epoch if self.step else self.epoch - 1,
            'max_accuracy': self.max_accuracy,
            'place': {'epoch': self.epoch, 'step': self.step, 'images': self.images, 'skipped': self.skipped},
            'ranks': ranks,
        }
        if self.step:
            state['sampler'] = self.sampler.state_dict()
        if self.ema is not None:
            state['model_ema'] = self.ema.module.state_dict()
        return state

    def load_state_dict(self, checkpoint: dict[str, Any], rank: int, world_size: int) -> list[str]:
        """Continue a checkpoint, whose weights the network has already.

        The schedule is a function of the config and the update alone, so that a longer run, another batch size or
        another number of processes takes effect; its saved state is for other programs. Inside an epoch, another batch
        size continues after the last whole update.

        Args:
            checkpoint: of `state_dict`, or a published one, which ends an epoch.
            rank: of this process.
            world_size: processes.

        Returns:
            What keeps the run from going on exactly as it would have; nothing if it does.

        Raises:
            CheckpointError: it holds weights only, another optimizer's state, or a place in another data set.
        """
        missing = [name for name in ('optimizer', 'epoch', 'max_accuracy') if checkpoint.get(name) is None]
        if missing:
            raise CheckpointError(
                f'the checkpoint has no {", ".join(missing)}, so it cannot be continued: '
                f'start a new run from it with --pretrained'
            )
        notes = []
        self._load_optimizer(checkpoint['optimizer'])
        self.precision.load_state_dict(checkpoint.get('precision', checkpoint))  # published: Apex's, as `amp`
        self.max_accuracy = checkpoint['max_accuracy']
        if self.ema is not None:
            if 'model_ema' in checkpoint:
                load_weights(self.ema.module, {'model': checkpoint['model_ema']}, 'model_ema of the checkpoint')
            else:
                notes.append('it has no average of the weights: a new one starts from its weights')
        place = checkpoint.get('place', {'epoch': checkpoint['epoch'] + 1, 'step': 0, 'images': 0, 'skipped': 0})
        self.epoch, self.skipped = place['epoch'], place['skipped']
        self.step = min(place['images'] // self.images_per_update, self.steps_per_epoch)
        if place['images'] == self.images_per_epoch:
            self.step = self.steps_per_epoch
        if self.step != place['step']:
            notes.append(f'update {place["step"]} of its epoch is update {self.step} here')
        if 'sampler' in checkpoint:
            try:
                self.sampler.load_state_dict(checkpoint['sampler'], self.images)
            except ValueError as error:
                raise CheckpointError(
                    f'the checkpoint cannot be continued: {error}: take one of the end of an epoch'
                ) from error
        ranks = checkpoint.get('ranks', [])
        if len(ranks) == world_size:
            set_random_states(ranks[rank]['random'], self.device)
            self.sums = ranks[rank]['sums'].to(self.device)
        else:
            was = f'{len(ranks)} processes' if ranks else 'another program'
            notes.append(f'it is of {was}: random numbers start anew')
        self._position_schedule()
        return notes

    def _load_optimizer(self, theirs: dict[str, Any]) -> None:
        """Load the optimizer's state, but not its options, which are the config's."""
        ours = self.optimizer.state_dict()['param_groups']
        try:
            if any((name in theirs['param_groups'][0]) != (name in ours[0]) for name in ('betas', 'momentum')):
                raise ValueError('AdamW and SGD keep different states')
            pairs = zip(ours, theirs['param_groups'], strict=True)
            groups = [{**our, 'params': their['params']} for our, their in pairs]
            self.optimizer.load_state_dict({'state': theirs['state'], 'param_groups': groups})
        except (LookupError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint's optimizer is another than the config's ({error}): "
                f'write the TRAIN.OPTIMIZER it was made with, or start a new run from it with --pretrained'
            ) from error

    def _position_schedule(self) -> None:
        if self.updates:  # the scheduler was made for the first
            self.scheduler.step_update(self.updates - 1)
