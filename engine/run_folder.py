"""A run's folder: its checkpoints, the newest and the best of them, those that go, and what is set aside."""

import itertools
import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.checkpoint import CheckpointError, load_checkpoint, peek_checkpoint, save_checkpoint, saved_progress
from utils import report_write_errors

_NAME = re.compile(r'ckpt_epoch_(\d+)(?:_step_(\d+))?\.pth')

# Epoch, and update within it or infinity for its end: checkpoints in the order of training.
Progress = tuple[int, float]


class RunFolder:
    """A run's checkpoints: `ckpt_epoch_<n>.pth`, within an epoch `ckpt_epoch_<n>_step_<m>.pth`, and `ckpt_best.pth`.

    What a run that starts over, or from an earlier checkpoint, leaves behind is moved to `old_<n>/`.

    Args:
        path: the folder.
        keep: newest ends of epochs to keep, and newest checkpoints within the current epoch; 0 keeps all.
        logger: for what is saved, set aside and damaged.
    """

    def __init__(self, path: Path, keep: int, logger: logging.Logger):
        self.path, self.keep, self.logger = path, keep, logger
        self._unremovable: set[Path] = set()  # of runs that kept all

    @property
    def best(self) -> Path:
        """The checkpoint with the best metric."""
        return self.path / 'ckpt_best.pth'

    def checkpoints(self) -> list[Path]:
        """The run's checkpoints but for the best, newest first, by epoch and by update within it."""
        paths = (path for path in self.path.glob('ckpt_epoch_*.pth') if _NAME.fullmatch(path.name))
        return sorted(paths, key=_progress_of_name, reverse=True)

    def newest_complete(self) -> Path | None:
        """The newest intact checkpoint; None if there are no checkpoints. Damaged ones are skipped with a warning.

        Where that is the best one, it is copied under the name of its epoch: the next best will replace it.

        Raises:
            CheckpointError: all are damaged; starting over would overwrite them.
        """
        candidates = [(_progress_of_name(path), path) for path in self.checkpoints()]
        best = _peek_or_empty(self.best)
        if 'optimizer' in best:  # not weights alone
            candidates.append((progress_of(best), self.best))
        elif self.best.exists() and not best:
            self.logger.warning(f'skipping a damaged checkpoint: {self.best}')
        candidates.sort(key=lambda candidate: candidate[0], reverse=True)  # the best after an equally new one
        for _, path in candidates:
            try:
                checkpoint = load_checkpoint(path)
            except CheckpointError as error:
                self.logger.warning(f'skipping a damaged checkpoint: {error}')
            else:
                return self.copy(checkpoint) if path == self.best else path
        damaged = [path for _, path in candidates] or [path for path in [self.best] if path.exists() and not best]
        if damaged:
            raise CheckpointError(
                f'none of the {len(damaged)} checkpoints in {self.path} can be read (the newest is {damaged[0].name}): '
                f'to start over, write another --tag or --opts TRAIN.AUTO_RESUME False'
            )
        return None

    def copy(self, checkpoint: dict[str, Any]) -> Path:
        """Save a checkpoint from elsewhere under the name of its epoch.

        Raises:
            CheckpointError: it cannot be written.
        """
        path = self.path_of(checkpoint)
        save_checkpoint(path, checkpoint)
        self.logger.info(f'{path} copied')
        return path

    def copy_best(self, checkpoint: dict[str, Any]) -> None:
        """Save a checkpoint from elsewhere as the best too, where there is none and its own metric is its best."""
        scores = checkpoint.get('scores') or {}
        is_best = bool(scores) and progress_of(checkpoint)[1] == float('inf')
        if is_best and self.best_score() is None and _score_of(checkpoint) == checkpoint['max_accuracy']:
            save_checkpoint(self.best, checkpoint)

    def path_of(self, checkpoint: dict[str, Any]) -> Path:
        """Where a checkpoint belongs, by its epoch and update."""
        epoch, step = progress_of(checkpoint)
        return self._path(epoch, None if step == float('inf') else step)

    def _path(self, epoch: int, step: int | None) -> Path:
        return self.path / (f'ckpt_epoch_{epoch}.pth' if step is None else f'ckpt_epoch_{epoch}_step_{step}.pth')

    def best_score(self) -> float | None:
        """The metric of the best checkpoint on disk; None if there is none that can be read."""
        return _score_of(_peek_or_empty(self.best))

    def save(self, state: dict[str, Any], epoch: int, step: int | None = None) -> Path:
        """Save a checkpoint of the end of an epoch, or of an update within it, then remove old ones.

        Checkpoints within an epoch go when it is complete. Those whose run kept all are never removed. Checkpoints that
        look newer, left by a run with another batch size, are set aside.

        Raises:
            CheckpointError: it cannot be written; then none is removed.
        """
        path = self._path(epoch, step)
        save_checkpoint(path, state)
        self.logger.info(f'{path} saved')
        paths = self.checkpoints()
        index = paths.index(path)
        try:
            self.set_aside(paths[:index], f'they look newer than {path.name}')
            for old in self._surplus(paths[index:]):
                old.unlink()
        except OSError as error:
            raise CheckpointError(f'{path} is saved, but an older one cannot be removed: {error.strerror}') from error
        return path

    def _surplus(self, paths: list[Path]) -> list[Path]:
        """Those of the checkpoints, newest first, that are not kept any more."""
        if not self.keep:
            return []
        epoch, step = _progress_of_name(paths[0])
        ends = [path for path in paths if _progress_of_name(path)[1] == float('inf')]
        steps = [path for path in paths if path not in ends]
        current = [path for path in steps if _progress_of_name(path)[0] == epoch and step != float('inf')]
        surplus = ends[self.keep :] + current[self.keep :] + [path for path in steps if path not in current]
        for path in set(surplus) - self._unremovable:
            if not _peek_or_empty(path).get('config', {}).get('SAVE_KEEP', 0):  # as before there was a default
                self._unremovable.add(path)
        return [path for path in surplus if path not in self._unremovable]

    def save_best(self, state: dict[str, Any]) -> None:
        """Save the best checkpoint, unless the one on disk has a higher metric.

        Raises:
            CheckpointError: it cannot be written; the old one is intact.
        """
        on_disk = self.best_score()
        if on_disk is not None and on_disk > _score_of(state):
            self.logger.warning(f'{self.best} has the higher metric, {on_disk:.2f}: it is kept')
        else:
            save_checkpoint(self.best, state)

    def set_aside(self, paths: list[Path], reason: str) -> Path | None:
        """Move files or folders of the run to a new folder `old_<n>/`, which is returned; None if there are none."""
        paths = [path for path in paths if path.exists()]
        if not paths:
            return None
        with report_write_errors(self.path):
            folder = self._new_old_folder()
            for path in paths:
                path.rename(folder / path.name)
        names = ', '.join(path.name for path in paths[:3]) + (f' and {len(paths) - 3} more' if len(paths) > 3 else '')
        self.logger.warning(f'{names} moved to {folder}: {reason}')
        return folder

    def set_newer_aside(self, progress: Progress, others: Sequence[Path] = ()) -> None:
        """Set aside the checkpoints after some progress, the best one too, and others, with a copy of the metrics."""
        newer = [path for path in self.checkpoints() if _progress_of_name(path) > progress]
        if self.best.exists() and progress_of(_peek_or_empty(self.best)) > progress:
            newer.append(self.best)
        newer += [path for path in others if path not in newer]
        old = self.set_aside(newer, 'the run resumes from an earlier checkpoint, or with other data or another network')
        metrics = self.path / 'metrics.jsonl'
        if old is not None and metrics.exists():
            shutil.copy(metrics, old)

    def set_run_aside(self, reason: str) -> None:
        """Set aside all that an earlier run with checkpoints has left, except its logs."""
        names = ('config.yaml', 'metrics.jsonl', 'tensorboard')
        left = sorted(self.path.glob('ckpt_*.pth'))
        if left:
            self.set_aside([*left, *(self.path / name for name in names)], reason)

    def _new_old_folder(self) -> Path:
        numbers = (self.path / f'old_{number}' for number in itertools.count(1))
        folder = next(path for path in numbers if not path.exists())
        folder.mkdir()
        return folder


def progress_of(checkpoint: dict[str, Any]) -> Progress:
    """Where training stood in a checkpoint: the end of an epoch, or an update within it."""
    progress = saved_progress(checkpoint)
    return (progress['epoch'], progress['step']) if progress['step'] else (progress['epoch'] - 1, float('inf'))


def _progress_of_name(path: Path) -> Progress:
    epoch, step = _NAME.fullmatch(path.name).groups()
    return int(epoch), float('inf') if step is None else int(step)


def _score_of(checkpoint: dict[str, Any]) -> float | None:
    """The metric of a checkpoint's weights, or in older ones the best metric so far; None if it has neither."""
    scores = checkpoint.get('scores') or {}
    return scores.get('ema', scores.get('raw', checkpoint.get('max_accuracy')))


def _peek_or_empty(path: Path) -> dict[str, Any]:
    """Entries of a checkpoint; none if it cannot be read."""
    try:
        return peek_checkpoint(path)
    except CheckpointError:
        return {}
