"""Log lines of training: losses, norms, speed, memory; and progress bars."""

import logging
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from engine.distributed import Process
from engine.memory import peak_memory_mb
from engine.state import TrainingState
from engine.weights import hash_weights
from logger import MetricsLog

Batch = TypeVar('Batch')


def progress_bar(loader: DataLoader, name: str, process: Process) -> tqdm:
    """The loader's batches, with a progress bar where rank 0 has a terminal."""
    return tqdm(loader, name, leave=False, disable=None if process.rank == 0 else True)


class TrainMeter:
    """Logs an epoch's losses and gradient norms, which are averaged over the ranks and read from the device only then.

    Args:
        logger: gets the line.
        metrics: gets the record.
        state: the run's training state.
        epochs: number of epochs of the run.
    """

    def __init__(self, logger: logging.Logger, metrics: MetricsLog, state: TrainingState, epochs: int):
        self.logger, self.metrics, self.state, self.epochs = logger, metrics, state, epochs
        self.start_time = self.timed_from = self.logged_time = time.monotonic()
        self.first_timed_step = self.logged_step = state.step
        self.wait = self.wait_before_timed = self.logged_wait = 0.0

    @property
    def seconds(self) -> float:
        """Seconds since the epoch began or was resumed."""
        return time.monotonic() - self.start_time

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches, and time how long each takes to arrive, which is logged as `data`."""
        batches = iter(batches)
        while True:
            start = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.wait += time.monotonic() - start
            yield batch

    def leave_out(self) -> None:
        """Exclude the updates so far from the mean time and the ETA: they include the compilation of the network."""
        self.timed_from, self.first_timed_step, self.wait_before_timed = time.monotonic(), self.state.step, self.wait

    def log(self, lr: float, loss: Tensor, grad_norm: Tensor, losses: dict[str, Tensor]) -> None:
        """Log the last update and the means of the epoch so far; every rank calls it at the same points.

        Args:
            lr: learning rate of the update.
            loss: its total loss on this rank, a device scalar like the others.
            grad_norm: its gradient norm, over all ranks.
            losses: its losses on this rank, by name.
        """
        state, now = self.state, time.monotonic()
        on_all_ranks = torch.stack((torch.ones_like(loss), loss, *losses.values(), *state.sums))
        sums = state.sum_over_processes(on_all_ranks).tolist()
        ranks, last_loss, *last_losses, loss_sum, norm_sum, updates = sums
        last_loss, last_norm = last_loss / ranks, grad_norm.item()
        mean_loss, mean_norm = (x / updates if updates else float('nan') for x in (loss_sum, norm_sum))
        last_steps, timed_steps = state.step - self.logged_step, state.step - self.first_timed_step
        last_time, last_wait = (now - self.logged_time) / last_steps, (self.wait - self.logged_wait) / last_steps
        mean_time, mean_wait = last_time, last_wait
        if timed_steps:
            mean_time, mean_wait = (
                (now - self.timed_from) / timed_steps,
                (self.wait - self.wait_before_timed) / timed_steps,
            )
        images_per_s = state.images_per_update / last_time
        memory = peak_memory_mb(state.device)
        eta = timedelta(seconds=int(mean_time * (state.steps_per_epoch - state.step))) if timed_steps else '?'
        self.logger.info(
            f'Train: [{state.epoch}/{self.epochs}][{state.step - 1}/{state.steps_per_epoch}]\t'
            f'eta {eta} lr {lr:.6f}\ttime {last_time:.4f} ({mean_time:.4f})\t'
            f'data {last_wait:.4f} ({mean_wait:.4f})\tloss {last_loss:.4f} ({mean_loss:.4f})\t'
            f'grad_norm {last_norm:.4f} ({mean_norm:.4f})\tmem {memory:.0f}MB\t{images_per_s:.0f} images/s'
        )
        record = {name: value / ranks for name, value in zip(losses, last_losses, strict=True)}
        record |= {'epoch': state.epoch, 'step': state.step - 1, 'lr': lr, 'loss': last_loss, 'grad_norm': last_norm}
        self.metrics.write(
            'train', state.updates, **record, data_s=last_wait, images_per_s=images_per_s, memory_mb=memory
        )
        self.logged_step, self.logged_time, self.logged_wait = state.step, now, self.wait

    def log_hash(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Write a record with a hash of the weights after the last update; every rank calls it at the same points.

        Args:
            loss: total loss of the update on this rank, a device scalar.
            grad_norm: its gradient norm, over all ranks.
        """
        state = self.state
        ranks, loss_sum = state.sum_over_processes(torch.stack((torch.ones_like(loss), loss))).tolist()
        if self.metrics.folder is not None:
            self.metrics.write(
                'hash',
                state.updates,
                epoch=state.epoch,
                step=state.step - 1,
                loss=loss_sum / ranks,
                grad_norm=grad_norm.item(),
                weights_hash=hash_weights(state.model.state_dict()),
            )
