"""Checkpoints in a run's folder: saving them, finding the newest and the best, removing old ones."""

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.checkpoint import CheckpointError, load_checkpoint, peek_checkpoint, save_checkpoint, saved_progress

_NAME = re.compile(r'ckpt_epoch_(\d+)(?:_step_(\d+))?\.pth')

# Progress of a checkpoint: the epoch, and the number of its images that the network has seen, infinity at its end. It
# orders checkpoints. It counts images instead of updates, since a run may resume with another batch size.
Progress = tuple[int, float]


class RunFolder:
    """A run's checkpoints: `ckpt_epoch_<n>.pth`, within an epoch `ckpt_epoch_<n>_step_<m>.pth`, and `ckpt_best.pth`.

    Args:
        path: the folder.
        keep: how many end-of-epoch checkpoints to keep, and how many within the current epoch; 0 keeps all.
        logger: logs saved and damaged checkpoints.
    """

    def __init__(self, path: Path, keep: int, logger: logging.Logger):
        self.path, self.keep, self.logger = path, keep, logger
        self._kept_forever: set[Path] = set()  # saved with SAVE_KEEP 0
        self._has_damaged_best = False
        self._images: dict[Path, float] = {}  # progress of checkpoints within an epoch; each is read once

    @property
    def best(self) -> Path:
        """The checkpoint with the best metric."""
        return self.path / 'ckpt_best.pth'

    def checkpoints(self) -> list[Path]:
        """The run's checkpoints, newest first, except the best one."""
        paths = (path for path in self.path.glob('ckpt_epoch_*.pth') if _NAME.fullmatch(path.name))
        return sorted(paths, key=self._progress_of_file, reverse=True)

    def newest_intact(self) -> Path | None:
        """Find the newest checkpoint that can be read, `ckpt_best.pth` included; None if there are no checkpoints.

        Damaged ones are skipped with a warning.

        Raises:
            CheckpointError: all are damaged; starting over would overwrite them.
        """
        best = self._read_or_warn(self.best) if self.best.exists() else None
        self._has_damaged_best = self.best.exists() and best is None
        candidates = [(self._progress_of_file(path), path) for path in self.checkpoints()]
        if best is not None and 'optimizer' in best:  # not only weights
            candidates.append((_progress_of(best), self.best))
        candidates.sort(key=lambda candidate: candidate[0], reverse=True)  # stable: the best after an equally new one
        for _, path in candidates:
            if path == self.best or self._read_or_warn(path) is not None:
                return path
        damaged = [path for _, path in candidates] + [self.best] * self._has_damaged_best
        if damaged:
            raise CheckpointError(
                f'none of the {len(damaged)} checkpoints in {self.path} can be read (the newest is '
                f'{damaged[0].name}): to start over, write another --tag'
            )
        return None

    def _read_or_warn(self, path: Path) -> dict[str, Any] | None:
        """A checkpoint's content; None and a warning if it is damaged."""
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            self.logger.warning(f'skipping a damaged checkpoint: {error}')
            return None

    def copy_best(self, best: Mapping[str, Any]) -> Path:
        """Save the content of `ckpt_best.pth`, the newest checkpoint, under the name of its epoch too.

        The next best checkpoint will replace `ckpt_best.pth`.

        Raises:
            CheckpointError: it cannot be written.
        """
        path = self.path / f'ckpt_epoch_{_progress_of(best)[0]}.pth'
        save_checkpoint(path, dict(best))
        return path

    def is_best(self, scores: dict[str, float]) -> bool:
        """Whether a checkpoint with these `scores` is better than the best one on disk.

        Of two with the same metric, the one with the lower loss is better. A metric that is NaN is never the best.
        """
        on_disk = {} if self._has_damaged_best else _peek_or_empty(self.best)
        ours, theirs = _sort_key({'scores': scores}), _sort_key(on_disk)
        return ours is not None and (theirs is None or ours > theirs)

    def save(self, state: dict[str, Any], epoch: int, step: int | None = None) -> Path:
        """Save a checkpoint at the end of an epoch, or after an update within it, then remove old ones.

        Saving the end of an epoch removes the checkpoints within it. Checkpoints saved with SAVE_KEEP 0 are never
        removed.

        Raises:
            CheckpointError: the checkpoint cannot be written, and no other one was removed; or an old one cannot be
                removed.
        """
        path = self.path / (f'ckpt_epoch_{epoch}.pth' if step is None else f'ckpt_epoch_{epoch}_step_{step}.pth')
        save_checkpoint(path, state)
        self.logger.info(f'{path} saved')
        self._images[path] = saved_progress(state)['images']
        try:
            for old in self._surplus(path):
                old.unlink()
        except OSError as error:
            raise CheckpointError(f'{path} is saved, but an older one cannot be removed: {error.strerror}') from error
        return path

    def _surplus(self, newest: Path) -> list[Path]:
        """The checkpoints that are no longer kept after `newest` was saved."""
        if not self.keep:
            return []
        epoch, is_end = _epoch_of(newest), not _is_step(newest)
        paths = self.checkpoints()
        ends = [path for path in paths if not _is_step(path)]
        current = [path for path in paths if _is_step(path) and _epoch_of(path) == epoch and not is_end]
        surplus = {*paths} - {newest, *ends[: self.keep], *current[: self.keep]}
        for path in surplus - self._kept_forever:
            if not _peek_or_empty(path).get('config', {}).get('SAVE_KEEP'):  # older versions did not have the key
                self._kept_forever.add(path)
        return sorted(surplus - self._kept_forever)

    def _progress_of_file(self, path: Path) -> Progress:
        """Progress of a checkpoint: at the end of an epoch from the file's name, within one from its content.

        A damaged checkpoint within an epoch sorts as the newest of its epoch, so that it is tried and reported.
        """
        if not _is_step(path):
            return _epoch_of(path), math.inf
        if path not in self._images:
            checkpoint = _peek_or_empty(path)
            self._images[path] = saved_progress(checkpoint)['images'] if checkpoint else math.inf
        return _epoch_of(path), self._images[path]

    def save_best(self, state: dict[str, Any]) -> None:
        """Save the best checkpoint.

        Raises:
            CheckpointError: it cannot be written; the old one is intact.
        """
        save_checkpoint(self.best, state)
        self._has_damaged_best = False


def _epoch_of(path: Path) -> int:
    return int(_NAME.fullmatch(path.name)[1])


def _is_step(path: Path) -> bool:
    """Whether a checkpoint is one within an epoch, by its name."""
    return _NAME.fullmatch(path.name)[2] is not None


def _progress_of(checkpoint: Mapping[str, Any]) -> Progress:
    progress = saved_progress(checkpoint)
    return (progress['epoch'], progress['images']) if progress['step'] else (progress['epoch'] - 1, math.inf)


def _sort_key(checkpoint: dict[str, Any]) -> tuple[float, float] | None:
    """A checkpoint's metric and negative loss, by which checkpoints are compared; None if its metric is unknown.

    Older checkpoints only have the best metric so far. One without a loss is better than one with a loss and the same
    metric, so the older one stays.
    """
    scores = checkpoint.get('scores') or {}
    metric = scores.get('ema', scores.get('raw', checkpoint.get('max_accuracy', math.nan)))
    return None if math.isnan(metric) else (metric, -scores.get('loss', -math.inf))


def _peek_or_empty(path: Path) -> dict[str, Any]:
    """Entries of a checkpoint; none if it cannot be read."""
    try:
        return peek_checkpoint(path)
    except CheckpointError:
        return {}
