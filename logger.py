"""Logging of a run: console on rank 0, a log file per rank, and metrics.jsonl, which also feeds trackers."""

import contextlib
import copy
import json
import logging
import math
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from termcolor import colored

from trackers import Tracker
from utils import atomic_write, discard_output, first_line, report_write_errors

_PREFIX, _DATE_FORMAT = '[%(asctime)s %(filename)s:%(lineno)d]', '%Y-%m-%d %H:%M:%S'


def get_logger(rank: int) -> logging.Logger:
    """Get the run's logger on a rank; `create_logger` sets it up."""
    return logging.getLogger(f'msg_transformer.rank{rank}')


def create_logger(rank: int) -> logging.Logger:
    """Create the run's logger, which writes to the console on rank 0; see also `add_log_file`."""
    logger = get_logger(rank)
    for handler in logger.handlers[:]:  # of an earlier run in this process
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if rank == 0:
        console = _Console(sys.stdout)
        console.setFormatter(logging.Formatter(f'{colored(_PREFIX, "green")}: %(levelname)s %(message)s', _DATE_FORMAT))
        logger.addHandler(console)
    return logger


class _Console(logging.StreamHandler):
    """Console handler for output that may be closed, as by `| head`; the log file goes on."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - of logging
        """Discard further output if standard output is closed; report other errors as usual."""
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            discard_output()
        else:
            super().handleError(record)


def add_log_file(logger: logging.Logger, path: Path) -> None:
    """Write the log to a file too.

    Raises:
        OutputError: the file cannot be written.
    """
    with report_write_errors(path.parent):
        file = logging.FileHandler(path, encoding='utf-8', errors='backslashreplace')
    file.setFormatter(logging.Formatter(f'{_PREFIX}: %(levelname)s %(message)s', _DATE_FORMAT))
    logger.addHandler(file)


# Kinds of records in metrics.jsonl: a logged update, an epoch, a hash of the weights after an update
KINDS = ('train', 'epoch', 'hash')


class MetricsLog:
    """Writer of a run's `metrics.jsonl`, with one JSON object per line.

    Existing records from `epoch` and `step` on are removed first, since a run that resumes there writes them again.

    Args:
        folder: the run's folder; None writes nothing, on ranks that do not log.
        epoch: epoch in which the run starts or resumes.
        step: update within the epoch.
        updates: updates of the whole run before that.
        trackers: get the records of the kinds `train` and `epoch` too.
        warn: called with a message if a tracker fails.
    """

    def __init__(
        self,
        folder: Path | None,
        epoch: int = 0,
        step: int = 0,
        updates: int = 0,
        trackers: Sequence[Tracker] = (),
        warn: Callable[[str], None] = warnings.warn,
    ):
        self.folder, self.trackers, self.warn = folder, list(trackers), warn
        if folder is None:
            return
        self.path = folder / 'metrics.jsonl'
        self._remove_from(epoch, step)
        self._call_trackers('begin', updates)

    def write(self, kind: str, updates: int, **record: Any) -> None:
        """Append a record; a number that is not finite, which JSON does not have, becomes null.

        Args:
            kind: one of `KINDS`.
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
        with report_write_errors(self.folder), self.path.open('a', encoding='utf-8') as file:
            file.write(json.dumps(finite) + '\n')
        if kind != 'hash':
            self._call_trackers('write', finite)

    def close(self) -> None:
        """Close the trackers."""
        self._call_trackers('close')

    def _call_trackers(self, method: str, *arguments: Any) -> None:
        """Call a method of each tracker; if a tracker fails, warn, and go on without it."""
        for tracker in tuple(self.trackers):
            try:
                getattr(tracker, method)(*copy.deepcopy(arguments))
            except Exception as error:  # a user's code, or a lost connection, may raise anything
                self.trackers.remove(tracker)
                self.warn(
                    f'tracker {type(tracker).__name__} failed, and gets no more records: '
                    f'{type(error).__name__}: {first_line(error)}'
                )

    def _remove_from(self, epoch: int, step: int) -> None:
        """Remove the records from an epoch and update on, and lines that are not valid records."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_bytes().splitlines(keepends=True):
            with contextlib.suppress(ValueError):
                record = parse_record(line)
                is_earlier = record['epoch'] < epoch or (record['epoch'] == epoch and record.get('step', step) < step)
                if line.endswith(b'\n') and is_earlier:
                    kept.append(line)
        atomic_write(self.path, lambda file: file.write(b''.join(kept)))


def parse_record(line: str | bytes) -> dict[str, Any]:
    """Read a line of `metrics.jsonl`.

    Raises:
        ValueError: the line is not a valid record, such as the truncated last line of a killed run.
    """
    try:
        record = json.loads(line)
    except RecursionError as error:
        raise ValueError('it is nested too deeply') from error
    if not isinstance(record, dict) or record.get('kind') not in KINDS or 'epoch' not in record:
        raise ValueError('it has no kind or no epoch')
    counts = {'epoch', 'step', 'updates'} & record.keys()
    numbers = record.keys() - counts - {'kind'}
    if record['kind'] == 'hash':
        numbers -= {'weights_hash'}
        if not re.fullmatch('[0-9a-f]{16}', str(record.get('weights_hash'))):
            raise ValueError('its hash does not have 16 hexadecimal digits')
    if not all(type(record[name]) is int and 0 <= record[name] < 2**53 for name in counts):
        raise ValueError(f'{" or ".join(sorted(counts))} is not a count')
    # Null stands for a non-finite number; other metrics were computed in 32 bits.
    if not all(
        record[name] is None or (type(record[name]) in (int, float) and abs(record[name]) < 2.0**128)
        for name in numbers
    ):
        raise ValueError('a metric is not a number')
    return record
