"""The training loop of any task: updates, evaluation after each epoch, checkpoints, and an orderly stop."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from yacs.config import CfgNode

from checkpoint import CheckpointFolder, save_checkpoint
from guard import NonFiniteGuard
from launcher import Process
from logger import MetricsLog, TrainMeter
from lr_scheduler import accumulation_steps
from precision import ApexPrecision, Precision
from signals import Stopped, StopRequest
from training_state import TrainingState
from utils import all_reduce_sum, on_main_process, synchronize_gradients, writing_in


class Run(NamedTuple):
    """What all parts of a job share."""

    config: CfgNode
    process: Process
    precision: Precision | ApexPrecision
    output_dir: Path
    logger: logging.Logger


class Update(NamedTuple):
    """What an update tells, in scalars on the device.

    Attributes:
        loss: the mean over this process's batches.
        grad_norm: over all processes, before clipping.
        bad_losses: how many processes had a loss that was not finite.
        skipped: whether the weights were left as they are.
        parts: what the loss is the sum of, by name; empty where it is one.
    """

    loss: Tensor
    grad_norm: Tensor
    bad_losses: Tensor
    skipped: Tensor
    parts: dict[str, Tensor]


class Trainer:
    """Trains a network from where its state stands to the last epoch.

    Args:
        run: the job.
        state: where training stands.
        network: the state's model, wrapped by `distribute`.
        loader: training batches; its sampler is the state's.
        loss_of: the mean loss of a batch, from the network (wrapped, where there are several processes) and the batch,
            or what it is the sum of, by name.
        evaluate: figures of a network, not wrapped. It calls the function that it is given now and then, at the same
            points in every process, which raises `Stopped` where training has been asked to stop.
        score: which figure is best when it is highest; of the average of the weights, where there is one.
        entries: what checkpoints hold beside the state.
        title: what the log calls the score.
    """

    def __init__(
        self,
        run: Run,
        state: TrainingState,
        network: nn.Module,
        loader: DataLoader,
        loss_of: Callable[[nn.Module, Any], Tensor | dict[str, Tensor]],
        evaluate: Callable[[nn.Module, Callable[[], None]], dict[str, float]],
        score: str,
        entries: dict[str, Any],
        title: str = 'accuracy',
    ):
        self.run, self.state, self.network, self.loader = run, state, network, loader
        self.loss_of, self.evaluate, self.score, self.entries = loss_of, evaluate, score, entries
        self.title = title
        self.guard = NonFiniteGuard(run.config, run.precision.may_overflow, run.process.device, run.logger)
        self.folder = CheckpointFolder(run.output_dir, run.config.SAVE_KEEP, run.logger)
        self.metrics = MetricsLog(None)
        self.stop = StopRequest()

    def fit(self) -> None:
        """Train, evaluating and saving after each epoch.

        Raises:
            Stopped: on a signal, with everything saved.
            FloatingPointError: a loss or a gradient norm was not finite; the message names the newest checkpoint.
            CheckpointError: a checkpoint cannot be written.
        """
        run, state = self.run, self.state
        epochs = run.config.TRAIN.EPOCHS
        if state.epoch >= epochs:
            run.logger.info(f'nothing to train: epoch {state.epoch} of TRAIN.EPOCHS {epochs}')
            return
        if run.process.rank == 0:
            run.logger.info(f'config:\n{run.config.dump()}')
            with writing_in(run.output_dir):
                (run.output_dir / 'config.yaml').write_text(run.config.dump())
                self.folder.remove_temporary()
                self.metrics = MetricsLog(run.output_dir, state, run.config.TENSORBOARD)
        began, first_epoch = time.time(), state.epoch
        try:
            with self.stop:
                while state.epoch < epochs:
                    self._epoch_or_save()
                    left = (time.time() - began) / (state.epoch - first_epoch) * (epochs - state.epoch)
                    run.logger.info(f'{epochs - state.epoch} epochs to go, about {timedelta(seconds=int(left))}')
        except FloatingPointError as error:
            newest = next((path for path in (*self.folder.all(), self.folder.best) if path.exists()), None)
            raise FloatingPointError(
                f'{error}. The last good checkpoint is {newest}' if newest else f'{error}. There is no checkpoint'
            ) from error
        run.logger.info(f'Training time {timedelta(seconds=int(time.time() - began))}')

    def _epoch_or_save(self) -> None:
        """An epoch, or what a stop leaves of it, saved."""
        try:
            self._epoch()
        except Stopped:
            path = self.save(self.state.epoch, self.state.step)
            how = 'start again without --resume' if self.run.config.MODEL.RESUME else 'start again'
            self.run.logger.info(f'stopped by a signal: {how} to continue from {path}')
            raise

    def _epoch(self) -> None:
        """Train, evaluate and save one epoch, or what is left of it."""
        run, state, config = self.run, self.state, self.run.config
        epoch = state.epoch
        fit = self.train_one_epoch()
        figures = self.evaluate(state.model, self.poll)
        score = figures[self.score]
        if state.ema is not None:
            run.logger.info('average of the weights:')
            of_average = self.evaluate(state.ema.module, self.poll)
            figures |= {f'ema_{name}': value for name, value in of_average.items()}
            score = of_average[self.score]
        is_best = score > state.max_accuracy
        state.max_accuracy = max(state.max_accuracy, score)
        run.logger.info(f'Max {self.title}: {state.max_accuracy:.2f}%')
        self.metrics.write('epoch', state.updates, epoch=epoch, **fit, **figures, max_accuracy=state.max_accuracy)
        state.end_epoch()
        is_due = state.epoch % config.SAVE_FREQ == 0 or state.epoch == config.TRAIN.EPOCHS
        if is_best or is_due:
            self.save(epoch, is_best=is_best, is_due=is_due)

    def train_one_epoch(self) -> dict[str, float]:
        """The epoch's updates; losses and norms are read from the device only where they are logged.

        Returns:
            `train_loss` (mean over all processes), `lr` of the last update, `seconds`, `images_per_s` of all processes.
        """
        run, state, optimizer = self.run, self.state, self.state.optimizer
        state.begin_epoch()
        self.network.train()
        meter = TrainMeter(run.logger, self.metrics, state, run.config.TRAIN.EPOCHS)
        images_before, lr = state.images, optimizer.param_groups[0]['lr']
        batches = progress(self.loader, f'epoch {state.epoch}', run.process) if not self._is_trained() else ()
        for group in groups(batches, accumulation_steps(run.config)):
            lr = optimizer.param_groups[0]['lr']
            update = self.train_step(group)
            updated = self.guard.update(
                update.bad_losses, update.grad_norm, update.skipped, state.epoch, state.step, lr
            )
            meter.update(update.loss, update.grad_norm, update.skipped, update.parts)
            state.advance(updated)
            if (state.step - 1) % run.config.PRINT_FREQ == 0 or self._is_trained():
                self.guard.check()
                meter.log(lr)
            self.poll()
            if run.config.SAVE_STEPS and state.step % run.config.SAVE_STEPS == 0 and not self._is_trained():
                self.save(state.epoch, state.step)
        seconds = meter.seconds
        run.logger.info(f'EPOCH {state.epoch} training takes {timedelta(seconds=int(seconds))}')
        loss, _, updates = all_reduce_sum(state.sums.clone()).tolist()
        return {
            'train_loss': loss / updates if updates else float('nan'),
            'lr': lr,
            'seconds': seconds,
            'images_per_s': (state.images - images_before) / max(seconds, 1e-9),  # of a whole epoch that was left: 0
        }

    def _is_trained(self) -> bool:
        return self.state.step == self.state.steps_per_epoch

    def train_step(self, batches: list[Any]) -> Update:
        """One update from the mean gradient of some batches; processes exchange gradients at the last batch only."""
        run, optimizer = self.run, self.state.optimizer
        loss, parts = torch.zeros((), device=run.process.device), {}
        # Statistics of batch norms, into which a bad batch goes before the update is skipped
        statistics = [(b, b.clone()) for b in self.state.model.buffers() if b.is_floating_point()]
        for number, batch in enumerate(batches, start=1):
            is_last = number == len(batches)
            with synchronize_gradients(self.network, enabled=is_last):
                with run.precision.autocast():
                    told = self.loss_of(self.network, batch)
                    of_batch = (sum(told.values()) if isinstance(told, dict) else told) / len(batches)
                run.precision.backward(of_batch, optimizer, is_last)
            loss += of_batch.detach()
            for name, part in told.items() if isinstance(told, dict) else ():
                parts[name] = parts.get(name, 0.0) + part.detach() / len(batches)
        bad_losses = all_reduce_sum((~loss.isfinite()).float())
        veto = self.guard.veto | (bad_losses > 0)
        norm, skipped = run.precision.step(optimizer, self.state.model, run.config.TRAIN.CLIP_GRAD, veto)
        for buffer, before in statistics:
            buffer.copy_(torch.where(skipped, before, buffer))
        return Update(loss, norm, bad_losses, skipped, parts)

    def poll(self) -> None:
        """Stop where any process has been asked to; every process calls it at the same points.

        Raises:
            Stopped: in every process.
        """
        if self.stop.agreed():
            raise Stopped

    def save(self, epoch: int, step: int | None = None, is_best: bool = False, is_due: bool = True) -> Path:
        """Save the state, in rank 0; every process calls it at the same point and waits for it.

        The best checkpoint is written first, so that a run killed in between finds out again that it is.

        Args:
            epoch: that the checkpoint is named by.
            step: and update inside it, unless it ends the epoch.
            is_best: save it as the best one.
            is_due: save it among those of the run.

        Returns:
            Where it was saved.

        Raises:
            FloatingPointError: an update since the last check was not finite.
            CheckpointError: it cannot be written.
        """
        self.guard.check()
        state = self.state.state_dict()

        def write() -> Path:
            checkpoint = state | self.entries | {'config': yaml.safe_load(self.run.config.dump())}
            if is_best:
                save_checkpoint(self.folder.best, checkpoint)
            return self.folder.save(checkpoint, epoch, step) if is_due else self.folder.best

        return on_main_process(write)


def progress(loader: DataLoader, name: str, process: Process) -> tqdm:
    """The loader's batches, with a bar where rank 0 has a terminal."""
    return tqdm(loader, name, leave=False, disable=None if process.rank == 0 else True)


def groups(batches: Iterable, size: int) -> Iterator[list]:
    """Consecutive lists of `size` batches; the last may be shorter."""
    batches = iter(batches)
    while group := list(islice(batches, size)):
        yield group


def batches_short(loader: DataLoader, world_size: int) -> int:
    """How many batches fewer this process's share of the evaluation images has than rank 0's, which is the largest."""
    return math.ceil(math.ceil(len(loader.dataset) / world_size) / loader.batch_size) - len(loader)
