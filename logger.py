"""What a run says: a coloured console on rank 0, a log file per rank, metrics.jsonl, and the lines of training."""

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

from config import ConfigError


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
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(output_dir / f'log_rank{rank}.txt')
    except OSError as error:
        raise ConfigError(f'output folder {output_dir}: {error.strerror}: write another --output') from error
    file.setFormatter(logging.Formatter(f'{prefix}: %(levelname)s %(message)s', date_format))
    logger.addHandler(file)
    if rank == 0:
        console = logging.StreamHandler(sys.stdout)
        console.setFormatter(logging.Formatter(f'{colored(prefix, "green")}: %(levelname)s %(message)s', date_format))
        logger.addHandler(console)
    return logger


class MetricsLog:
    """One JSON object a line, for programs to read.

    Args:
        path: file to append to; None writes nothing, on ranks that do not log.
    """

    def __init__(self, path: Path | None):
        self.path = path

    def write(self, **record: Any) -> None:
        """Append a record; a number that is not finite, which JSON does not know, becomes null."""
        record = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        if self.path is not None:
            with self.path.open('a') as file:
                file.write(json.dumps(record) + '\n')


class TrainMeter:
    """Losses and gradient norms of an epoch, which are read from the device only where they are logged.

    Args:
        logger: gets the line.
        metrics: gets the record.
        epoch, epochs: this one, and how many there are in all.
        steps: updates in an epoch.
        device: of the losses.
    """

    def __init__(
        self, logger: logging.Logger, metrics: MetricsLog, epoch: int, epochs: int, steps: int, device: torch.device
    ):
        self.logger, self.metrics = logger, metrics
        self.epoch, self.epochs, self.steps = epoch, epochs, steps
        self.device = device
        self.step = 0  # updates so far
        self.last = self.total = torch.zeros(2, device=device)  # loss, gradient norm
        self.began = time.time()
        self.logged_step, self.logged_time = 0, self.began

    @property
    def seconds(self) -> float:
        """Seconds since the epoch began."""
        return time.time() - self.began

    def update(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Take in an update's loss and gradient norm, scalars on the device."""
        self.last = torch.stack((loss, grad_norm))
        self.total = self.total + self.last
        self.step += 1

    def log(self, lr: float) -> None:
        """Say how the last update, at this learning rate, and the epoch so far went.

        Raises:
            FloatingPointError: a loss of this epoch was not finite: before a checkpoint can hold what comes of it.
        """
        index, now = self.step - 1, time.time()
        (loss, norm), (mean_loss, mean_norm) = self.last.tolist(), (self.total / self.step).tolist()
        if not math.isfinite(mean_loss):
            raise FloatingPointError(
                f'the loss is no longer finite at epoch {self.epoch}, update {index}, learning rate {lr:.3g}: '
                f'write a smaller TRAIN.BASE_LR or TRAIN.CLIP_GRAD, and continue from an earlier checkpoint'
            )
        mean_time = (now - self.began) / self.step
        last_time = (now - self.logged_time) / (self.step - self.logged_step)
        eta = timedelta(seconds=int(mean_time * (self.steps - self.step)))
        self.logger.info(
            f'Train: [{self.epoch}/{self.epochs}][{index}/{self.steps}]\teta {eta} lr {lr:.6f}\t'
            f'time {last_time:.4f} ({mean_time:.4f})\tloss {loss:.4f} ({mean_loss:.4f})\t'
            f'grad_norm {norm:.4f} ({mean_norm:.4f})\tmem {peak_memory_mb(self.device):.0f}MB'
        )
        self.metrics.write(kind='train', epoch=self.epoch, step=index, lr=lr, loss=loss, grad_norm=norm)
        self.logged_step, self.logged_time = self.step, now


def peak_memory_mb(device: torch.device) -> float:
    """Most memory this process has held, in MB: of the GPU, or of the machine on a CPU."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == 'darwin' else 2**10  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
