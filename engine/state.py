"""Training state: everything that changes while a run trains. A run resumed from it ends with the same bits."""

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from data.samplers import TrainSampler
from engine.checkpoint import CheckpointError, saved_progress
from engine.distributed import all_reduce_sum, gather_on_main_process
from engine.precision import ApexPrecision, Precision
from engine.virtual_ranks import VirtualRanks
from engine.weights import load_weights
from utils import first_line, random_states, set_random_states, shortened


class Phase(NamedTuple):
    """Epochs of a run with the same batches; a run has one phase, unless `DATA.IMG_SIZES` changes the image size.

    Attributes:
        first_epoch: epoch with which the phase begins.
        steps_per_epoch: updates per epoch.
        images_per_epoch: images per epoch, over all ranks.
        images_per_update: images per update, over all ranks; the last update of an epoch may have fewer.
    """

    first_epoch: int
    steps_per_epoch: int
    images_per_epoch: int
    images_per_update: int


def phase_index(phases: Sequence[Phase], epoch: int) -> int:
    """Index of the phase that an epoch belongs to."""
    return max(i for i, phase in enumerate(phases) if phase.first_epoch <= epoch or i == 0)


def updates_before(phases: Sequence[Phase], epoch: int) -> int:
    """Number of updates in all epochs before one, if none is skipped."""
    ends = [phase.first_epoch for phase in phases[1:]] + [epoch]
    return sum(
        phase.steps_per_epoch * max(min(end, epoch) - phase.first_epoch, 0)
        for phase, end in zip(phases, ends, strict=True)
    )


@dataclass
class TrainingState:
    """Everything that changes while a run trains, and its progress.

    Attributes:
        model: the network, not wrapped, with its starting weights.
        optimizer: the optimizer of `model`.
        scheduler: the learning-rate schedule, stepped per update.
        precision: the run's precision.
        sampler: draws the training images.
        device: this process's device.
        phases: the run's phases, in order; the optimizer and the schedule have the learning rates of the first.
        ema: exponential moving average of the weights, if any.
        virtual_ranks: the virtual ranks of this process, with their random states; None where a process is one rank.
        epoch: current epoch, from 0.
        step: updates made in it.
        skipped: updates of the whole run that left the weights as they were.
        skipped_in_a_row: number of consecutive skipped updates, up to the last update; not saved.
        max_accuracy: best metric so far, in percent.
        stale_evaluations: evaluations since `max_accuracy` last rose.
        scores: last metrics of the `raw` weights and, if there are any, of the `ema` weights, in percent; and the
            `loss` that breaks ties between equal ones, where the task has one.
        sums: sums of the epoch's losses and gradient norms on this process, and their number, (3,); with virtual ranks,
            the losses are means over all ranks.
        first_bad: step and learning rate of the epoch's first update that stops the run, (2,), -1 for none; see
            `NonFinitePolicy`. Not saved.
    """

    model: nn.Module
    optimizer: Optimizer
    scheduler: Scheduler
    precision: Precision | ApexPrecision
    sampler: TrainSampler
    device: torch.device
    phases: Sequence[Phase]
    ema: ModelEmaV3 | None = None
    virtual_ranks: VirtualRanks | None = None
    epoch: int = 0
    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    max_accuracy: float = -1.0
    stale_evaluations: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    sums: Tensor = field(init=False)
    first_bad: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.sums = torch.zeros(3, device=self.device)
        self.first_bad = torch.full((2,), -1.0, device=self.device)
        self._set_schedule()

    @property
    def phase(self) -> Phase:
        """The phase of the current epoch."""
        return self.phases[phase_index(self.phases, self.epoch)]

    @property
    def steps_per_epoch(self) -> int:
        """Updates in the current epoch."""
        return self.phase.steps_per_epoch

    @property
    def images_per_epoch(self) -> int:
        """Images in the current epoch, over all ranks."""
        return self.phase.images_per_epoch

    @property
    def images_per_update(self) -> int:
        """Images per update of the current epoch, over all ranks."""
        return self.phase.images_per_update

    @property
    def updates(self) -> int:
        """Updates of the weights in the whole run."""
        return max(updates_before(self.phases, self.epoch) + self.step - self.skipped, 0)

    @property
    def lr(self) -> float:
        """Learning rate of the next update; that of the head, if layers have different rates."""
        return max(group['lr'] for group in self.optimizer.param_groups)

    @property
    def images(self) -> int:
        """Images of the epoch seen so far, over all ranks."""
        return min(self.step * self.images_per_update, self.images_per_epoch)

    @property
    def epoch_done(self) -> bool:
        """Whether every update of the epoch was made."""
        return self.step == self.steps_per_epoch

    def begin_epoch(self) -> None:
        """Shuffle for this epoch, unless it is being resumed."""
        if self.step == 0:
            self.sampler.set_epoch(self.epoch)
            self.sums.zero_()

    def add_update(self, loss: Tensor, grad_norm: Tensor, skipped: Tensor, is_bad: Tensor, lr: float) -> None:
        """Count an update, and add it to the epoch's sums unless it was skipped; tensors are device scalars.

        Args:
            loss: of this process; with virtual ranks, of all ranks.
            grad_norm: of all processes.
            skipped: whether it left the weights as they were.
            is_bad: whether it stops the run.
            lr: its learning rate.
        """
        self.sums += torch.where(skipped, 0, torch.stack((loss, grad_norm, torch.ones_like(loss))))
        is_first = is_bad & (self.first_bad[0] < 0)
        self.first_bad[0].masked_fill_(is_first, self.step)
        self.first_bad[1].masked_fill_(is_first, lr)
        self.step += 1

    def sum_over_processes(self, values: Tensor) -> Tensor:
        """Sum values of this process over all processes, in place; values of all virtual ranks stay as they are."""
        return values if self.virtual_ranks else all_reduce_sum(values)

    def advance(self) -> None:
        """Advance schedule and EMA after the last update, which has changed the weights."""
        self.skipped_in_a_row = 0
        self._set_schedule()
        if self.ema is not None:
            self.ema.update(self.model)

    def skip(self) -> None:
        """Count the last update as skipped: schedule and EMA stay as they are."""
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1

    def add_evaluation(self, metric: float) -> None:
        """Count an evaluation with a metric, which is the same on every rank; one that is NaN improves nothing."""
        is_better = metric > self.max_accuracy
        self.stale_evaluations = 0 if is_better else self.stale_evaluations + 1
        self.max_accuracy = metric if is_better else self.max_accuracy

    def forget_best(self) -> None:
        """Forget the best metric, which is of other data."""
        self.max_accuracy, self.stale_evaluations = -1.0, 0

    def end_epoch(self) -> None:
        """Go on to the next epoch, perhaps with another learning rate."""
        self.epoch, self.step = self.epoch + 1, 0
        self._set_schedule()

    def state_dict(self) -> dict[str, Any] | None:
        """A checkpoint's entries on rank 0, None on the others. Every process calls it at the same point."""
        states = self.virtual_ranks.random_states if self.virtual_ranks else [random_states(self.device)]
        gathered = gather_on_main_process([{'random': random, 'sums': self.sums.cpu()} for random in states])
        if gathered is None:
            return None
        state = {
            'model': self.model.state_dict(),
            'optimizer': self.optimizer.state_dict() | {'class': type(self.optimizer).__name__},
            'lr_scheduler': self.scheduler.state_dict(),
            'precision': self.precision.state_dict(),
            # As published: the last epoch begun. `progress` says where to resume.
            'epoch': self.epoch if self.step else self.epoch - 1,
            'max_accuracy': self.max_accuracy,
            'scores': self.scores,
            'progress': {
                'epoch': self.epoch,
                'step': self.step,
                'images': self.images,
                'skipped': self.skipped,
                'stale_evaluations': self.stale_evaluations,
            },
            'ranks': [rank for ranks in gathered for rank in ranks],
        }
        if self.step:
            state['sampler'] = self.sampler.state_dict()
        if self.ema is not None:
            state['model_ema'] = self.ema.module.state_dict()
        return state

    def load_state_dict(self, checkpoint: dict[str, Any], rank: int, world_size: int) -> list[str]:
        """Resume from a checkpoint, whose weights the network already has.

        The schedule is a function of only the config and the update, so a longer run, another batch size or another
        number of processes takes effect; its saved state is for other programs. Within an epoch, another batch size
        resumes after the last whole update.

        Args:
            checkpoint: from `state_dict`, or a published one, which ends an epoch.
            rank: this process's rank; with virtual ranks, the first one that it computes.
            world_size: number of processes, or of virtual ranks.

        Returns:
            What keeps the run from resuming bit for bit; empty if nothing does.

        Raises:
            CheckpointError: it holds weights only, another optimizer's state, an epoch of other data, or entries that
                are not what `state_dict` gives.
        """
        if 'ignored' in checkpoint:
            names = ', '.join(checkpoint['ignored'])
            raise CheckpointError(
                f'entries of the checkpoint are not what a run writes ({names}), so no run can be resumed from it: '
                f'start a new run with --pretrained'
            )
        missing = [name for name in ('optimizer', 'epoch', 'max_accuracy') if checkpoint.get(name) is None]
        if missing:
            raise CheckpointError(
                f'the checkpoint has no {", ".join(missing)}, so no run can be resumed from it: '
                f'start a new run with --pretrained'
            )
        try:
            return self._restore(checkpoint, rank, world_size)
        except (CheckpointError, torch.OutOfMemoryError):
            raise
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
            raise CheckpointError(
                f"the checkpoint's training state is not what a run writes ({first_line(error)}): "
                f'start a new run with --pretrained'
            ) from error

    def _restore(self, checkpoint: dict[str, Any], rank: int, world_size: int) -> list[str]:
        """Restore a checkpoint whose entries may have any type; wrong types raise errors of any kind."""
        notes = []
        self._load_optimizer(checkpoint['optimizer'])
        self.precision.load_state_dict(checkpoint.get('precision', checkpoint))  # published: Apex's, as `amp`
        self.max_accuracy, self.scores = checkpoint['max_accuracy'], checkpoint.get('scores', {})
        if self.ema is not None:
            if 'model_ema' in checkpoint:
                load_weights(self.ema.module, {'model': checkpoint['model_ema']}, "the checkpoint's model_ema")
            else:
                notes.append('it has no EMA weights: EMA starts from its weights')
        progress = saved_progress(checkpoint)
        self.epoch, self.skipped = progress['epoch'], progress['skipped']
        self.stale_evaluations = progress.get('stale_evaluations', 0)
        self.step = min(progress['images'] // self.images_per_update, self.steps_per_epoch)
        if progress['images'] == self.images_per_epoch:
            self.step = self.steps_per_epoch
        if self.step != progress['step']:
            notes.append(f'update {progress["step"]} of its epoch is update {self.step} here')
        if 'sampler' in checkpoint:
            try:
                self.sampler.load_state_dict(checkpoint['sampler'], self.images)
            except ValueError as error:
                raise CheckpointError(
                    f'the run cannot be resumed from the checkpoint: {error}: take one from the end of an epoch'
                ) from error
        ranks = checkpoint.get('ranks', [])
        if len(ranks) == world_size:
            if self.virtual_ranks:
                count = len(self.virtual_ranks.random_states)
                self.virtual_ranks.restore([entry['random'] for entry in ranks[rank : rank + count]])
                sums = torch.stack([entry['sums'] for entry in ranks])  # equal, unless DDP has saved them
                self.sums = sums.double().mean(dim=0).to(self.sums)
            else:
                set_random_states(ranks[rank]['random'], self.device)
                self.sums = ranks[rank]['sums'].to(self.device)
        else:
            origin = '' if ranks else 'it comes from another program: '
            notes.append(f'{origin}random numbers are not restored')
        self._set_schedule()
        return notes

    def _load_optimizer(self, theirs: dict[str, Any]) -> None:
        """Load the optimizer's state, but not its options, which are the config's."""
        ours = self.optimizer.state_dict()['param_groups']
        try:
            before, now = _class_of(theirs), type(self.optimizer).__name__
            if before != now:
                raise ValueError(f'{shortened(str(before))} and {now} keep different states')
            if len(ours) != len(theirs['param_groups']):
                raise ValueError('another number of parameter groups')
            pairs = zip(ours, theirs['param_groups'], strict=True)
            # Adan and Lamb count their updates in the groups.
            groups = [{**our, **{k: their[k] for k in ('params', 'step') if k in their}} for our, their in pairs]
            initial = dict(self.optimizer.state)
            self.optimizer.load_state_dict({'state': theirs['state'], 'param_groups': groups})
            self._check_optimizer_state(initial)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"the checkpoint's optimizer is different from the config's ({error}): "
                f'write its TRAIN.OPTIMIZER, LAYER_DECAY and FROZEN_STAGES, or start a new run with --pretrained'
            ) from error

    def _check_optimizer_state(self, initial: dict[Tensor, dict[str, Any]]) -> None:
        """Check the optimizer's state, whose errors would otherwise only show in the next update.

        Each parameter's state is compared with that after a first update of a parameter of the same shape.

        Args:
            initial: state of each parameter with which the optimizer was built; few optimizers have one.

        Raises:
            ValueError: it lacks an average of a parameter, or has one of another shape.
        """
        for group in self.optimizer.param_groups:
            for parameter in group['params']:
                state = self.optimizer.state.get(parameter)
                if not state:  # such as of a frozen parameter
                    continue
                expected = _first_state(self.optimizer, group, parameter, initial.get(parameter, {}))
                if not expected.keys() <= state.keys():
                    raise ValueError('it lacks averages of gradients')
                pairs = [(state[name], value) for name, value in expected.items() if isinstance(value, Tensor)]
                if any(not isinstance(ours, Tensor) or ours.shape != value.shape for ours, value in pairs):
                    raise ValueError('its averages of gradients have other shapes')

    def _set_schedule(self) -> None:
        """Set the learning rate of the next update; it follows the images per update of the phase linearly."""
        if self.updates:  # a new scheduler is set for the first update
            self.scheduler.step_update(self.updates - 1)  # schedules by update
            self.scheduler.step(self.epoch)  # schedules by epoch
            factor = self.images_per_update / self.phases[0].images_per_update
            for group in self.optimizer.param_groups if factor != 1 else ():
                group['lr'] *= factor


def _class_of(state: dict[str, Any]) -> str:
    """Class of the optimizer that a state is of; older versions had AdamW and SGD, and did not record it."""
    return state.get('class') or ('AdamW' if 'betas' in state['param_groups'][0] else 'SGD')


def _first_state(
    optimizer: Optimizer, group: dict[str, Any], parameter: Tensor, initial: dict[str, Any]
) -> dict[str, Any]:
    """State that an optimizer has of a parameter after its first update; the optimizer stays as it is."""
    trial = nn.Parameter(torch.ones_like(parameter))
    trial.grad = torch.zeros_like(trial)
    options = copy.deepcopy({name: value for name, value in group.items() if name != 'params'})  # some count updates
    optimizer = copy.copy(optimizer)
    optimizer.state, optimizer.param_groups = defaultdict(dict), [{'params': [trial]} | options]
    optimizer.state[trial] = copy.deepcopy(initial)
    optimizer.step()
    return optimizer.state[trial]
