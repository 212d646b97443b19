"""The training loop of any task: updates, evaluation after each epoch, checkpoints, graceful shutdown."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from engine.distributed import average_over_processes, on_main_process, running_statistics, synchronize_gradients
from engine.evaluation import EvaluateFn, evaluate_with_ema
from engine.meter import TrainMeter, progress_bar
from engine.nonfinite import BufferBackup, HostCopy, NonFiniteError, NonFinitePolicy, check_first_bad, update_label
from engine.run import Run
from engine.signals import COMPILED_UPDATE, UPDATE, Stopped
from engine.state import TrainingState, phase_index
from logger import MetricsLog
from trackers import build_trackers
from utils import atomic_write, report_write_errors


class Update(NamedTuple):
    """Results of one update; tensors are scalars on the device.

    Attributes:
        loss: total loss, averaged over this process's batches; with virtual ranks, over all ranks.
        losses: the losses that `loss` sums, by name.
        grad_norm: over all processes, before clipping.
        lr: learning rate.
        skipped: whether the weights were left as they were.
        flags: asynchronous copy of `TrainingState.first_bad` and `skipped` to the host; None unless the policy reads
            them after every update.
    """

    loss: Tensor
    losses: dict[str, Tensor]
    grad_norm: Tensor
    lr: float
    skipped: Tensor
    flags: HostCopy | None


class Trainer:
    """Trains a network from its current state to the last epoch.

    Args:
        run: the run.
        state: the training state.
        network: the state's model, wrapped by `distribute`; not wrapped with virtual ranks.
        loaders: training batches of each phase; their sampler is the state's.
        loss_fn: mean losses of a batch, by name; their sum is minimised.
        evaluate: evaluates the state's model and its EMA weights.
        metric: key of the metric that selects the best checkpoint, of the EMA weights if there are any; higher is
            better.
        provenance: further entries of every checkpoint, from `describe_run`.
        metric_name: what the log calls the metric.
        compiles: whether the first update and evaluation compile the network; they are excluded from the ETA.
        until: epoch, and update in it, at which `fit` saves a checkpoint and returns; None for the end of the run.
    """

    def __init__(
        self,
        run: Run,
        state: TrainingState,
        network: nn.Module,
        loaders: Sequence[DataLoader],
        loss_fn: Callable[[Any], dict[str, Tensor]],
        evaluate: EvaluateFn,
        metric: str,
        provenance: Mapping[str, Any],
        metric_name: str = 'accuracy',
        compiles: bool = False,
        until: tuple[int, int] | None = None,
    ):
        self.run, self.state, self.network = run, state, network
        self.loader, self._loaders, self._phase = loaders[0], dict(enumerate(loaders)), 0
        self.loss_fn, self.evaluate = loss_fn, evaluate
        self.metric, self.metric_name, self.provenance = metric, metric_name, provenance
        self.policy = NonFinitePolicy.from_config(run.config, run.precision.may_overflow)
        self.metrics = MetricsLog(None)
        self.compiles, self.first_epoch, self.until = compiles, 0, until
        self._statistics = running_statistics(state.model)

    def fit(self) -> None:
        """Train; evaluate every `EVAL_FREQ` epochs, and save.

        Raises:
            Stopped: on a signal, after saving what was trained.
            NonFiniteError: a loss or gradient norm was not finite; the message names the newest checkpoint.
            CheckpointError: a checkpoint cannot be written.
            RunLockError: another process has taken the run's folder over.
        """
        run, state = self.run, self.state
        epochs = run.config.TRAIN.EPOCHS
        if state.epoch >= epochs:
            run.logger.info(
                f'the run is finished: it has trained {state.epoch} epochs, and TRAIN.EPOCHS is {epochs}. To train '
                f'longer, write a larger TRAIN.EPOCHS; for another run, another --tag'
            )
            return
        if self._is_out_of_patience:
            run.logger.info(
                f'the run is finished: {self._early_stop()}. To train longer, write a larger TRAIN.PATIENCE, or 0 for '
                f'no early stopping; for another run, another --tag'
            )
            return
        if run.stop.agreed():
            run.logger.info('stopped by a signal before training: start again')
            raise Stopped
        if run.process.rank == 0:
            with report_write_errors(run.output_dir):
                dump = run.config.dump().encode()
                atomic_write(run.output_dir / 'config.yaml', lambda file: file.write(dump))
            trackers = build_trackers(run.config, run.output_dir)
            with report_write_errors(run.output_dir):
                self.metrics = MetricsLog(
                    run.output_dir,
                    state.epoch,
                    state.step,
                    state.updates,
                    trackers,
                    run.logger.warning,
                )
        self.first_epoch = state.epoch
        start_time = timed_from = time.monotonic()
        first_timed_epoch = state.epoch + self.compiles
        try:
            while state.epoch < epochs and not self._is_at_end:
                self._epoch_or_save()
                if self._is_out_of_patience:
                    run.logger.info(self._early_stop())
                    break
                epochs_left, timed = epochs - state.epoch, state.epoch - first_timed_epoch
                timed_from = timed_from if timed else time.monotonic()
                left = timedelta(seconds=int((time.monotonic() - timed_from) / timed * epochs_left)) if timed else '?'
                run.logger.info(f'{epochs_left} epochs to go, about {left}')
        except NonFiniteError as error:
            newest = next((path for path in (*run.folder.checkpoints(), run.folder.best) if path.exists()), None)
            raise NonFiniteError(
                f'{error}. The last good checkpoint is {newest}' if newest else f'{error}. There is no checkpoint'
            ) from error
        finally:
            self.metrics.close()
        run.logger.info(f'Training time {timedelta(seconds=int(time.monotonic() - start_time))}')

    @property
    def _is_at_end(self) -> bool:
        """Whether training is at `until`."""
        return self.until is not None and (self.state.epoch, self.state.step) >= self.until

    @property
    def _is_out_of_patience(self) -> bool:
        """Whether `TRAIN.PATIENCE` evaluations in a row have not improved the metric."""
        return 0 < self.run.config.TRAIN.PATIENCE <= self.state.stale_evaluations

    def _early_stop(self) -> str:
        """Why the run ends early, for the log."""
        state = self.state
        return (
            f'early stopping after {state.epoch} epochs, since {state.stale_evaluations} evaluations in a row have not '
            f'improved the {self.metric_name} of {state.max_accuracy:.2f}%, and TRAIN.PATIENCE is '
            f'{self.run.config.TRAIN.PATIENCE}'
        )

    def _epoch_or_save(self) -> None:
        """Train one epoch; on a stop request, or at an end within the epoch, save a checkpoint within it."""
        try:
            self._epoch()
        except Stopped:
            path = self.save(self.state.epoch, self.state.step)
            if self._is_at_end:
                return
            self.run.logger.info(f'stopped by a signal: start again to resume from {path}')
            raise

    def _epoch(self) -> None:
        """Train one epoch, or the rest of a resumed one; evaluate and save if they are due."""
        run, state, config = self.run, self.state, self.run.config
        epoch = state.epoch
        train_metrics = self.train_one_epoch()
        metrics, is_best, state.scores = {}, False, {}
        if (epoch + 1) % config.EVAL_FREQ == 0 or epoch + 1 == config.TRAIN.EPOCHS:
            metrics, is_best = self._evaluate()
        run.lock.check()
        stops = self._is_out_of_patience
        patience = {'stale_evaluations': state.stale_evaluations, 'early_stop': int(stops)}
        patience = patience if config.TRAIN.PATIENCE else {}
        self.metrics.write(
            'epoch', state.updates, epoch=epoch, **train_metrics, **metrics, max_accuracy=state.max_accuracy, **patience
        )
        state.end_epoch()
        is_last = state.epoch == config.TRAIN.EPOCHS or stops or self._is_at_end
        is_due = state.epoch % config.SAVE_FREQ == 0 or is_last
        if is_best or is_due:
            self.save(epoch, is_best=is_best, is_due=is_due)

    def _evaluate(self) -> tuple[dict[str, float], bool]:
        """Evaluate raw and EMA weights.

        Returns:
            The metrics, those of the EMA weights with the prefix `ema_`, and whether they are the best so far.
        """
        run, state = self.run, self.state
        evaluations = evaluate_with_ema(run, self.evaluate, state.model, state.ema and state.ema.module, self.poll)
        state.scores = {name: evaluation.metrics[self.metric] for name, evaluation in evaluations.items()}
        decisive = list(evaluations.values())[-1].metrics
        if 'val_loss' in decisive:
            state.scores['loss'] = decisive['val_loss']
        is_best = on_main_process(lambda: run.folder.is_best(state.scores))
        state.add_evaluation(on_main_process(lambda: decisive[self.metric]))
        run.logger.info(f'Max {self.metric_name}: {state.max_accuracy:.2f}%')
        metrics = {
            ('ema_' if name == 'ema' else '') + key: value
            for name, evaluation in evaluations.items()
            for key, value in evaluation.metrics.items()
        }
        return metrics, is_best

    def train_one_epoch(self) -> dict[str, float]:
        """Make the epoch's updates; losses and norms are read from the device only where they are logged.

        Schedule and EMA step for an update when the gradients of the next one are queued, so that the device has work
        while the host waits to learn whether the update was skipped.

        Returns:
            `train_loss` (mean over all processes), `lr` of the last update, `seconds`, `images_per_s` of all processes.
        """
        run, state = self.run, self.state
        self._enter_phase()
        state.begin_epoch()
        self.network.train()
        self._statistics = running_statistics(state.model)
        meter = TrainMeter(run.logger, self.metrics, state, run.config.TRAIN.EPOCHS)
        images_before, lr = state.images, state.lr
        compiles_now = self.compiles and state.epoch in (self.first_epoch, state.phase.first_epoch)
        batches = () if state.epoch_done else progress_bar(self.loader, f'epoch {state.epoch}', run.process)
        pending = None  # the last update, until schedule and EMA have stepped for it
        run.stop.waits_for = COMPILED_UPDATE if compiles_now else UPDATE
        for chunk in chunked(meter.watch(batches), run.accumulation_steps * len(run.own_ranks)):
            update = pending = self.train_step(chunk, pending)
            lr = update.lr
            if compiles_now:
                compiles_now, run.stop.waits_for = False, UPDATE
                meter.leave_out()
            is_logged = (state.step - 1) % run.config.PRINT_FREQ == 0 or state.epoch_done
            hash_freq = run.config.HASH_FREQ
            is_hashed = hash_freq and ((state.step - 1) % hash_freq == 0 or state.epoch_done)
            is_saved = run.config.SAVE_STEPS and state.step % run.config.SAVE_STEPS == 0 and not state.epoch_done
            is_stopped = run.stop.agreed() or self._is_at_end
            if is_logged or is_hashed or is_saved or is_stopped:
                self.step_schedule_and_ema(pending)
                pending = None
            if is_logged or is_hashed:
                self._check_first_bad()
                run.lock.check()
            if is_logged:
                meter.log(lr, update.loss, update.grad_norm, update.losses)
            if is_hashed:
                meter.log_hash(update.loss, update.grad_norm)
            if is_stopped:
                raise Stopped
            if is_saved:
                self.save(state.epoch, state.step)
        seconds = meter.seconds
        run.logger.info(f'EPOCH {state.epoch} training takes {timedelta(seconds=int(seconds))}')
        loss, _, updates = state.sum_over_processes(state.sums.clone()).tolist()
        return {
            'train_loss': loss / updates if updates else float('nan'),
            'lr': lr,
            'seconds': seconds,
            'images_per_s': (state.images - images_before) / max(seconds, 1e-9),  # 0 where only evaluation was left
        }

    def _enter_phase(self) -> None:
        """Take the loader of the epoch's phase; worker processes of the last one end with it."""
        index = phase_index(self.state.phases, self.state.epoch)
        if index != self._phase:
            del self._loaders[self._phase]
            self.loader, self._phase = self._loaders[index], index

    def train_step(self, batches: list[Any], pending: Update | None = None) -> Update:
        """Make one update from the mean gradient of some batches.

        Args:
            batches: of this process; with virtual ranks, an equal number for each of its ranks, rank by rank.
            pending: the previous update, if schedule and EMA have yet to step for it.

        Raises:
            NonFiniteError: as `step_schedule_and_ema`, for the pending update.
        """
        run, state = self.run, self.state
        buffers = BufferBackup(state.model)
        if buffers and state.ema is not None:  # EMA averages the buffers before this forward pass changes them
            self.step_schedule_and_ema(pending)
            pending = None
        loss, losses, nonfinite = self.compute_gradient(batches)
        average_over_processes(self._statistics)  # every process evaluates and resumes with those of the checkpoint
        self.step_schedule_and_ema(pending)
        lr = state.lr
        nonfinite_ranks = state.sum_over_processes(nonfinite)
        skip = (state.first_bad[0] >= 0) | (nonfinite_ranks > 0)
        grad_norm, skipped = run.precision.step(state.optimizer, state.model, run.config.TRAIN.CLIP_GRAD, skip)
        buffers.restore_if(skipped)
        state.add_update(loss, grad_norm, skipped, self.policy.stops_at(nonfinite_ranks, grad_norm), lr)
        flags = HostCopy(torch.cat((state.first_bad, skipped[None]))) if self.policy.reads_every_update else None
        return Update(loss, losses, grad_norm, lr, skipped, flags)

    def compute_gradient(self, batches: Sequence[Any]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Leave the mean gradient of an update, over all ranks, in the weights.

        Args:
            batches: see `train_step`.

        Returns:
            The total loss and the losses by name, as in `Update`; and 1 if the total loss of this process is not
            finite, else 0. With virtual ranks, this is the number of such ranks.
        """
        if self.state.virtual_ranks:
            return self.state.virtual_ranks.mean_gradient(self.state.model, self.accumulate, batches)
        loss, losses = self.accumulate(batches)
        return loss, losses, (~loss.isfinite()).float()

    def accumulate(self, batches: Sequence[Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Accumulate the mean gradient of the batches of a rank; DDP reduces gradients at the last batch only.

        Returns:
            The mean total loss, and the mean losses by name.
        """
        run, state = self.run, self.state
        loss, losses = torch.zeros((), device=run.process.device), {}
        for number, batch in enumerate(batches, start=1):
            is_last = number == len(batches)
            with synchronize_gradients(self.network, enabled=is_last):
                with run.precision.autocast():
                    batch_losses = {name: value / len(batches) for name, value in self.loss_fn(batch).items()}
                    batch_loss = sum(batch_losses.values())
                run.precision.backward(batch_loss, state.optimizer, is_last)
            loss += batch_loss.detach()
            for name, value in batch_losses.items():
                losses[name] = losses.get(name, 0.0) + value.detach()
        return loss, losses

    def step_schedule_and_ema(self, update: Update | None) -> None:
        """Step schedule and EMA for the last update, if there is one, unless the policy finds that it was skipped.

        Where the policy reads every update, this waits for the update, but for no later work on the device.

        Raises:
            NonFiniteError: the update stops the run, or too many updates in a row were skipped.
        """
        state = self.state
        if update is None:
            return
        *first_bad, is_skipped = update.flags.tolist() if update.flags is not None else (-1, 0, False)
        check_first_bad(state.epoch, *first_bad)
        if not is_skipped:
            state.advance()
            return
        state.skip()
        label = update_label(state.epoch, state.step - 1, update.lr)
        self.run.logger.warning(f'update skipped at {label}: the loss or the gradient norm is not finite')
        self.policy.check_skipped(state.skipped_in_a_row, label)

    def _check_first_bad(self) -> None:
        """Read from the device whether an update has stopped the run.

        Raises:
            NonFiniteError: an update has.
        """
        check_first_bad(self.state.epoch, *self.state.first_bad.tolist())

    def poll(self) -> None:
        """Stop if any rank was asked to stop; every rank calls it at the same points.

        Raises:
            Stopped: on every rank.
        """
        if self.run.stop.agreed():
            raise Stopped

    def save(self, epoch: int, step: int | None = None, is_best: bool = False, is_due: bool = True) -> Path:
        """Save the state on rank 0; every process calls it at the same point and waits for it.

        The best checkpoint is written first, so a run killed in between resumes from it.

        Args:
            epoch: names the checkpoint.
            step: update within the epoch; None at its end.
            is_best: save it as `ckpt_best.pth`.
            is_due: save it as `ckpt_epoch_<n>...pth`.

        Returns:
            Where it was saved; the latter, if both.

        Raises:
            NonFiniteError: an update since the last check was not finite.
            CheckpointError: it cannot be written.
            RunLockError: another process has taken the run's folder over.
        """
        self._check_first_bad()
        state = self.state.state_dict()

        def write() -> Path:
            checkpoint = {**state, **self.provenance, 'config': self.run.plain_config}
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
