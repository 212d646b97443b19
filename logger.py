"""What a run says: a console on rank 0, a log file per rank, metrics.jsonl, TensorBoard, the lines of training."""

import json
import logging
import math
import resource
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from termcolor import colored
from torch import Tensor

from checkpoint import replace_file
from training_state import TrainingState
from utils import writing_in


def create_logger(output_dir: Path, rank: int) -> logging.Logger:
    """The run's logger, writing to `log_rank<rank>.txt` and, on rank 0, to the console.

    Args:
        output_dir: the run's folder; made if it is not there.
        rank: of this process.

    Raises:
        ConfigError: the folder cannot be made or written to.
    """
    logger = logging.getLogger(f'msg_transformer.rank{rank}')
    for handler in logger.handlers[:]:  # of an earlier run in this process
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.INFO)
    logger.propagate = False

    prefix, date_format = '[%(asctime)s %(filename)s:%(lineno)d]', '%Y-%m-%d %H:%M:%S'
    with writing_in(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(output_dir / f'log_rank{rank}.txt')
    file.setFormatter(logging.Formatter(f'{prefix}: %(levelname)s %(message)s', date_format))
    logger.addHandler(file)
    if rank == 0:
        console = logging.StreamHandler(sys.stdout)
        console.setFormatter(logging.Formatter(f'{colored(prefix, "green")}: %(levelname)s %(message)s', date_format))
        logger.addHandler(console)
    return logger


class MetricsLog:
    """A run's figures for programs: `metrics.jsonl`, one JSON object a line, and TensorBoard's files.

    Args:
        folder: the run's; None writes nothing, on ranks that do not log.
        state: where the run stands. Records of what comes after, of a run that is continued from an earlier
            checkpoint, are removed, since they come again.
        tensorboard: write for TensorBoard too.
    """

    def __init__(self, folder: Path | None, state: TrainingState | None = None, tensorboard: bool = False):
        self.folder = folder
        if folder is None:
            return
        self.path = folder / 'metrics.jsonl'
        self._remove_after(state.epoch, state.step)
        self.writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(folder / 'tensorboard', purge_step=state.updates + 1)

    def write(self, kind: str, updates: int, **record: Any) -> None:
        """Append a record; a number that is not finite, which JSON does not know, becomes null.

        Args:
            kind: train or epoch.
            updates: that the run has made.
            record: what else there is to say.

        Raises:
            ConfigError: the folder cannot be written to.
        """
        if self.folder is None:
            return
        record = {'kind': kind, 'updates': updates} | record
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        with writing_in(self.folder):
            with self.path.open('a') as file:
                file.write(json.dumps(finite) + '\n')
            if self.writer is not None:
                for key in record.keys() - {'kind', 'updates'}:
                    self.writer.add_scalar(f'{kind}/{key}', record[key], updates)
                self.writer.flush()

    def _remove_after(self, epoch: int, step: int) -> None:
        """Keep the records of the epochs before this one, and of its first updates; not a last line cut short."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines(keepends=True):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            is_before = record['epoch'] < epoch or (record['epoch'] == epoch and record.get('step', step) < step)
            if line.endswith('\n') and is_before:
                kept.append(line)
        replace_file(self.path, lambda file: file.write(''.join(kept).encode()))


class TrainMeter:
    """Losses and gradient norms of an epoch, which are read from the device only where they are logged.

    Args:
        logger: gets the line.
        metrics: gets the record.
        state: of the run, whose `sums` it adds to.
        epochs: in all.
    """

    def __init__(self, logger: logging.Logger, metrics: MetricsLog, state: TrainingState, epochs: int):
        self.logger, self.metrics, self.state, self.epochs = logger, metrics, state, epochs
        self.last = torch.zeros(2, device=state.device)  # loss, gradient norm
        self.parts: dict[str, Tensor] = {}
        self.began = time.time()
        self.first_step = self.logged_step = state.step
        self.logged_time = self.began

    @property
    def seconds(self) -> float:
        """Seconds since the epoch began, or was continued."""
        return time.time() - self.began

    def update(self, loss: Tensor, grad_norm: Tensor, skipped: Tensor, parts: dict[str, Tensor]) -> None:
        """Take in an update's loss, gradient norm, whether it was skipped, and the loss's parts: device scalars."""
        self.parts = parts
        self.last = torch.stack((loss, grad_norm))
        counted = torch.stack((loss, grad_norm, torch.ones_like(loss)))
        self.state.sums += torch.where(skipped, 0, counted)

    def log(self, lr: float) -> None:
        """Say how the last update, at this learning rate, and the epoch so far went."""
        state, now = self.state, time.time()
        loss, norm = self.last.tolist()
        mean_loss, mean_norm = (state.sums[:2] / state.sums[2]).tolist()
        mean_time = (now - self.began) / (state.step - self.first_step)
        last_time = (now - self.logged_time) / (state.step - self.logged_step)
        images_per_s = state.images_per_update / last_time
        memory = peak_memory_mb(state.device)
        eta = timedelta(seconds=int(mean_time * (state.steps_per_epoch - state.step)))
        self.logger.info(
            f'Train: [{state.epoch}/{self.epochs}][{state.step - 1}/{state.steps_per_epoch}]\t'
            f'eta {eta} lr {lr:.6f}\ttime {last_time:.4f} ({mean_time:.4f})\tloss {loss:.4f} ({mean_loss:.4f})\t'
            f'grad_norm {norm:.4f} ({mean_norm:.4f})\tmem {memory:.0f}MB\t{images_per_s:.0f} images/s'
        )
        self.metrics.write(
            'train', state.updates, epoch=state.epoch, step=state.step - 1, lr=lr, loss=loss, grad_norm=norm,
            images_per_s=images_per_s, memory_mb=memory, **{name: part.item() for name, part in self.parts.items()},
        )  # fmt: skip
        self.logged_step, self.logged_time = state.step, now


def peak_memory_mb(device: torch.device) -> float:
    """Most memory this process has held, in MB: of the GPU (on Apple's, what it holds now), or of the machine."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2**20
    if device.type == 'mps':
        return torch.mps.driver_allocated_memory() / 2**20
    unit = 1 if sys.platform == 'darwin' else 2**10  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
