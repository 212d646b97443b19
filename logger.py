"""Logs of a run: a console on rank 0, a file per rank, metrics.jsonl and TensorBoard."""

import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

from termcolor import colored

from utils import atomic_write, report_write_errors

_PREFIX, _DATE_FORMAT = '[%(asctime)s %(filename)s:%(lineno)d]', '%Y-%m-%d %H:%M:%S'


def create_logger(rank: int) -> logging.Logger:
    """Create the run's logger, which writes to the console on rank 0; see also `add_log_file`."""
    logger = logging.getLogger(f'msg_transformer.rank{rank}')
    for handler in logger.handlers[:]:  # of an earlier run in this process
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if rank == 0:
        console = logging.StreamHandler(sys.stdout)
        console.setFormatter(logging.Formatter(f'{colored(_PREFIX, "green")}: %(levelname)s %(message)s', _DATE_FORMAT))
        logger.addHandler(console)
    return logger


def add_log_file(logger: logging.Logger, path: Path) -> None:
    """Write the log to a file too.

    Raises:
        OutputError: it cannot be written to.
    """
    with report_write_errors(path.parent):
        file = logging.FileHandler(path)
    file.setFormatter(logging.Formatter(f'{_PREFIX}: %(levelname)s %(message)s', _DATE_FORMAT))
    logger.addHandler(file)


class MetricsLog:
    """A run's metrics for programs: `metrics.jsonl`, one JSON object per line, and TensorBoard's event files.

    Records from `epoch` and `step` on are removed first: a run resumed from there writes them again.

    Args:
        folder: the run's folder; None writes nothing, on ranks that do not log.
        epoch: epoch in which the run starts or resumes.
        step: update within the epoch.
        updates: updates of the whole run before that.
        tensorboard: write event files too.
    """

    def __init__(self, folder: Path | None, epoch: int = 0, step: int = 0, updates: int = 0, tensorboard: bool = False):
        self.folder = folder
        if folder is None:
            return
        self.path = folder / 'metrics.jsonl'
        self._remove_from(epoch, step)
        self.writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # a second to import

            self.writer = SummaryWriter(folder / 'tensorboard', purge_step=updates + 1)

    def write(self, kind: str, updates: int, **record: Any) -> None:
        """Append a record; a number that is not finite, which JSON does not have, becomes null.

        Args:
            kind: 'train' or 'epoch'.
            updates: updates of the whole run so far.
            record: the metrics.

        Raises:
            OutputError: the folder cannot be written to.
        """
        if self.folder is None:
            return
        record = {'kind': kind, 'updates': updates} | record
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        with report_write_errors(self.folder):
            with self.path.open('a') as file:
                file.write(json.dumps(finite) + '\n')
            if self.writer is not None:
                for key in record.keys() - {'kind', 'updates'}:
                    self.writer.add_scalar(f'{kind}/{key}', record[key], updates)
                self.writer.flush()

    def _remove_from(self, epoch: int, step: int) -> None:
        """Keep the records of earlier epochs and of this epoch's first updates, but no truncated last line."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines(keepends=True):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            is_earlier = record['epoch'] < epoch or (record['epoch'] == epoch and record.get('step', step) < step)
            if line.endswith('\n') and is_earlier:
                kept.append(line)
        atomic_write(self.path, lambda file: file.write(''.join(kept).encode()))
