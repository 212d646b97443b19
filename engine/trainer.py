"""The training loop of any task: updates, evaluation after each epoch, checkpoints, and an orderly stop."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from engine.distributed import all_reduce_sum, on_main_process, synchronize_gradients
from engine.evaluation import Poll, evaluate_with_ema, progress_bar
from engine.meter import TrainMeter
from engine.nonfinite import NonFiniteCheck, NonFiniteError
from engine.run import Run
from engine.signals import Stopped
from engine.state import TrainingState
from logger import MetricsLog
from utils import atomic_write, remove_dead_temporaries, report_write_errors


class Update(NamedTuple):
    """Results of one update, in scalars on the device.

    Attributes:
        loss: total loss, averaged over this process's batches.
        grad_norm: over all processes, before clipping.
        nonfinite_ranks: number of processes whose loss was not finite.
        skipped: whether the weights were left as they are.
        losses: the losses that `loss` sums, by name.
    """

    loss: Tensor
    grad_norm: Tensor
    nonfinite_ranks: Tensor
    skipped: Tensor
    losses: dict[str, Tensor]


class Trainer:
    """Trains a network from its current state to the last epoch.

    Args:
        run: the run.
        state: the training state.
        network: the state's model, wrapped by `distribute`.
        loader: training batches; its sampler is the state's.
        loss_fn: mean losses of a batch, by name; their sum is minimised.
        evaluate_fn: returns the metrics of a network, not wrapped. It must call its second argument regularly, at the
            same points on every rank; that raises `Stopped` when a stop was requested.
        metric: the metric whose highest value is the best, of the EMA weights where there are any.
        extra_state: further entries of the checkpoints.
        metric_name: what the log calls the metric.
        compiles: whether the first update or evaluation compiles the network, which estimates of time leave out.
    """

    def __init__(
        self,
        run: Run,
        state: TrainingState,
        network: nn.Module,
        loader: DataLoader,
        loss_fn: Callable[[Any], dict[str, Tensor]],
        evaluate_fn: Callable[[nn.Module, Poll], dict[str, float]],
        metric: str,
        extra_state: dict[str, Any],
        metric_name: str = 'accuracy',
        compiles: bool = False,
    ):
        self.run, self.state, self.network, self.loader = run, state, network, loader
        self.loss_fn, self.evaluate_fn = loss_fn, evaluate_fn
        self.metric, self.metric_name, self.extra_state = metric, metric_name, extra_state
        self.nonfinite = NonFiniteCheck(run.config, run.precision.may_overflow, run.process.device, run.logger)
        self.metrics = MetricsLog(None)
        self.compiles, self.best_score = compiles, -math.inf
        self._unsettled = False  # whether schedule and EMA have yet to follow the last update

    def fit(self) -> None:
        """Train; evaluate every `EVAL_FREQ` epochs, and save.

        Raises:
            Stopped: on a signal, with everything saved.
            NonFiniteError: a loss or gradient norm was not finite; the message names the newest checkpoint.
            CheckpointError: a checkpoint cannot be written.
        """
        run, state = self.run, self.state
        epochs = run.config.TRAIN.EPOCHS
        if state.epoch >= epochs:
            run.logger.info(f'nothing to train: epoch {state.epoch} of TRAIN.EPOCHS {epochs}')
            return
        if run.stop.agreed():
            run.logger.info('stopped by a signal before training: start again')
            raise Stopped
        if run.process.rank == 0:
            run.logger.info(f'config:\n{run.config.dump()}')
            with report_write_errors(run.output_dir):
                dump = run.config.dump().encode()
                atomic_write(run.output_dir / 'config.yaml', lambda file: file.write(dump))
                remove_dead_temporaries(run.output_dir)
                self.metrics = MetricsLog(
                    run.output_dir, state.epoch, state.step, state.updates, run.config.TENSORBOARD
                )
        on_disk = on_main_process(run.folder.best_score)
        self.best_score = -math.inf if on_disk is None else on_disk
        start_time = timed_from = time.time()
        first_timed_epoch = state.epoch + self.compiles
        try:
            while state.epoch < epochs:
                self._epoch_or_save()
                epochs_left, timed = epochs - state.epoch, state.epoch - first_timed_epoch
                timed_from = timed_from if timed else time.time()
                left = timedelta(seconds=int((time.time() - timed_from) / timed * epochs_left)) if timed else '?'
                run.logger.info(f'{epochs_left} epochs to go, about {left}')
        except NonFiniteError as error:
            newest = next((path for path in (*run.folder.checkpoints(), run.folder.best) if path.exists()), None)
            raise NonFiniteError(
                f'{error}. The last good checkpoint is {newest}' if newest else f'{error}. There is no checkpoint'
            ) from error
        run.logger.info(f'Training time {timedelta(seconds=int(time.time() - start_time))}')

    def _epoch_or_save(self) -> None:
        """Train one epoch; on a stop request, save what there is of it."""
        try:
            self._epoch()
        except Stopped:
            path = self.save(self.state.epoch, self.state.step)
            again = 'start again without --resume' if self.run.config.MODEL.RESUME else 'start again'
            self.run.logger.info(f'stopped by a signal: {again} to resume from {path}')
            raise

    def _epoch(self) -> None:
        """Train, perhaps evaluate, and save one epoch, or the rest of it."""
        run, state, config = self.run, self.state, self.run.config
        epoch = state.epoch
        train_metrics = self.train_one_epoch()
        metrics, is_best, state.scores = {}, False, {}
        if (epoch + 1) % config.EVAL_FREQ == 0 or epoch + 1 == config.TRAIN.EPOCHS:
            metrics, is_best = self._evaluate()
        run.lock.check()
        self.metrics.write(
            'epoch', state.updates, epoch=epoch, **train_metrics, **metrics, max_accuracy=state.max_accuracy
        )
        state.end_epoch()
        is_due = state.epoch % config.SAVE_FREQ == 0 or state.epoch == config.TRAIN.EPOCHS
        if is_best or is_due:
            self.save(epoch, is_best=is_best, is_due=is_due)

    def _evaluate(self) -> tuple[dict[str, float], bool]:
        """Metrics of the weights, and those of the EMA weights as `ema_...`; and whether they are the best so far."""
        run, state = self.run, self.state
        metrics, ema_metrics = evaluate_with_ema(
            run, lambda model: self.evaluate_fn(model, self.poll), state.model, state.ema and state.ema.module
        )
        score = (ema_metrics or metrics)[self.metric]
        state.scores = {'raw': metrics[self.metric]} | ({'ema': score} if ema_metrics else {})
        is_best = score > self.best_score
        self.best_score, state.max_accuracy = max(self.best_score, score), max(state.max_accuracy, score)
        run.logger.info(f'Max {self.metric_name}: {state.max_accuracy:.2f}%')
        return metrics | {f'ema_{name}': value for name, value in (ema_metrics or {}).items()}, is_best

    def train_one_epoch(self) -> dict[str, float]:
        """Make the epoch's updates; losses and norms are read from the device only where they are logged.

        Returns:
            `train_loss` (mean over all processes), `lr` of the last update, `seconds`, `images_per_s` of all processes.
        """
        run, state = self.run, self.state
        state.begin_epoch()
        self.network.train()
        meter = TrainMeter(run.logger, self.metrics, state, run.config.TRAIN.EPOCHS)
        images_before, lr = state.images, state.lr
        batches = () if state.epoch_done else progress_bar(self.loader, f'epoch {state.epoch}', run.process)
        for chunk in chunked(meter.watch(batches), run.accumulation_steps):
            update = self.train_step(chunk)
            lr = state.lr
            self.nonfinite.record(update.nonfinite_ranks, update.grad_norm, update.skipped, state.epoch, state.step, lr)
            state.record(update.loss, update.grad_norm, update.skipped)
            state.step += 1
            self._unsettled = True
            if self.compiles:  # in this update
                self.compiles = False
                meter.leave_out()
            if (state.step - 1) % run.config.PRINT_FREQ == 0 or state.epoch_done:
                self.settle()
                self.nonfinite.check()
                run.lock.check()
                meter.log(lr, update.loss, update.grad_norm, update.losses)
            self.poll()
            if run.config.SAVE_STEPS and state.step % run.config.SAVE_STEPS == 0 and not state.epoch_done:
                self.save(state.epoch, state.step)
        seconds = meter.seconds
        run.logger.info(f'EPOCH {state.epoch} training takes {timedelta(seconds=int(seconds))}')
        loss, _, updates = all_reduce_sum(state.sums.clone()).tolist()
        return {
            'train_loss': loss / updates if updates else float('nan'),
            'lr': lr,
            'seconds': seconds,
            'images_per_s': (state.images - images_before) / max(seconds, 1e-9),  # 0 where only evaluation was left
        }

    def train_step(self, batches: list[Any]) -> Update:
        """Make one update from the mean gradient of some batches; gradients are reduced at the last batch only.

        Raises:
            NonFiniteError: as `settle`, for the update before.
        """
        run, optimizer = self.run, self.state.optimizer
        loss, losses = torch.zeros((), device=run.process.device), {}
        # Batch-norm statistics, which a nonfinite batch reaches before its update is skipped
        statistics = [(b, b.clone()) for b in self.state.model.buffers() if b.is_floating_point()]
        if statistics and self.state.ema is not None:  # which averages them as they are after the last update
            self.settle()
        for number, batch in enumerate(batches, start=1):
            is_last = number == len(batches)
            with synchronize_gradients(self.network, enabled=is_last):
                with run.precision.autocast():
                    batch_losses = {name: value / len(batches) for name, value in self.loss_fn(batch).items()}
                    batch_loss = sum(batch_losses.values())
                run.precision.backward(batch_loss, optimizer, is_last)
            loss += batch_loss.detach()
            for name, value in batch_losses.items():
                losses[name] = losses.get(name, 0.0) + value.detach()
        self.settle()
        nonfinite_ranks = all_reduce_sum((~loss.isfinite()).float())
        skip_update = self.nonfinite.skip_update | (nonfinite_ranks > 0)
        norm, skipped = run.precision.step(optimizer, self.state.model, run.config.TRAIN.CLIP_GRAD, skip_update)
        for buffer, before in statistics:
            buffer.copy_(torch.where(skipped, before, buffer))
        return Update(loss, norm, nonfinite_ranks, skipped, losses)

    def settle(self) -> None:
        """Let schedule and EMA follow the last update, unless they have.

        Called when the gradients of the next one are on their way, so the device has work while the host waits. Batch
        norm's statistics change in the forward pass: where EMA averages them, it is called before.

        Raises:
            NonFiniteError: see `NonFiniteCheck.updated`.
        """
        if self._unsettled:
            self._unsettled = False
            self.state.advance(self.nonfinite.updated())

    def poll(self) -> None:
        """Stop where any process was asked to; every process calls it at the same points.

        Raises:
            Stopped: in every process.
        """
        if self.run.stop.agreed():
            raise Stopped

    def save(self, epoch: int, step: int | None = None, is_best: bool = False, is_due: bool = True) -> Path:
        """Save the state on rank 0; every process calls it at the same point and waits for it.

        The best checkpoint is written first, so a run killed in between resumes from it.

        Args:
            epoch: names the checkpoint.
            step: update within the epoch; None at its end.
            is_best: save it as the best one.
            is_due: save it among those of the run.

        Returns:
            Where it was saved.

        Raises:
            NonFiniteError: an update since the last check was not finite.
            CheckpointError: it cannot be written.
            RunLockError: another process has taken the run's folder over.
        """
        self.settle()
        self.nonfinite.check()
        state = self.state.state_dict()

        def write() -> Path:
            checkpoint = state | self.extra_state | {'config': self.run.plain_config}
            self.run.lock.check()
            if is_best:
                self.run.folder.save_best(checkpoint)
            return self.run.folder.save(checkpoint, epoch, step) if is_due else self.run.folder.best

        return on_main_process(write)


def chunked(batches: Iterable, size: int) -> Iterator[list]:
    """Consecutive lists of `size` batches; the last may be shorter."""
    batches = iter(batches)
    while chunk := list(islice(batches, size)):
        yield chunk
