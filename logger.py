"""What a run says: a coloured console on rank 0, a log file per rank, metrics.jsonl."""

import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

from termcolor import colored

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
