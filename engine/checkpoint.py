"""Checkpoints that survive: written atomically, verified when read, and read without running any code in them."""

import collections
import json
import logging
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor, nn

from utils import UserError, atomic_write


class CheckpointError(UserError):
    """A checkpoint that cannot be read or written, or that does not fit the network."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically: whatever happens, `path` holds the old file or the whole new one.

    Every record carries a checksum (the CRC-32 of PyTorch's zip format), which `load_checkpoint` verifies.

    Raises:
        CheckpointError: it cannot be written; the old file is intact.
    """
    _save(path, lambda file: torch.save(state, file))


def save_safetensors(path: Path, weights: dict[str, Tensor], **metadata: Any) -> None:
    """Write weights as `.safetensors`, with JSON-compatible metadata such as `config` and `classes`.

    Raises:
        CheckpointError: see `save_checkpoint`.
    """
    weights = {name: value.contiguous() for name, value in weights.items()}
    text = {key: json.dumps(value) for key, value in metadata.items()}
    _save(path, lambda file: file.write(safetensors.torch.save(weights, text)))


def _save(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    try:
        atomic_write(path, write)
    except (OSError, RuntimeError) as error:  # PyTorch's writer turns a full disk into a RuntimeError
        raise CheckpointError(
            f'{path} cannot be written: {_system_message(error)}. Earlier checkpoints are intact: '
            f'make room or write another --output, and start again to resume from the newest'
        ) from error


def _system_message(error: BaseException) -> str:
    """The system's message behind an error that may hide it."""
    cause = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return (str(error).splitlines() or [type(error).__name__])[0]


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, verifying its checksums, without running any code in it.

    Published checkpoints hold a pickled yacs node as `config`; it is read as a plain mapping. `.safetensors` files, as
    written by `tools.convert_checkpoint`, hold the weights, `config` and `classes`.

    Raises:
        CheckpointError: there is no such file, it is not a checkpoint, it is damaged, or it holds more than data.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f'checkpoint {path} {"is a folder: name a file in it" if path.is_dir() else "does not exist"}'
        )
    try:
        checkpoint = _load_safetensors(path) if path.suffix == '.safetensors' else _load_pth(path)
    except CheckpointError:
        raise
    except Exception as error:  # the loaders document no exceptions of their own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, pickle.UnpicklingError):  # PyTorch's message says how to run the file's code
            reason = 'it is not a PyTorch file, or holds more than data'
        raise CheckpointError(f'{path} is not a checkpoint that can be read safely: {reason}') from error
    weights = checkpoint.get('model') if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(f'{path} is not a checkpoint of this project: it has no entry "model" with weights')
    return checkpoint


def _load_pth(path: Path) -> Any:
    if zipfile.is_zipfile(path):  # PyTorch's format before 1.6 is not a zip file, and has no checksums
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f'{path} is damaged: the checksum of {damaged} is wrong')
    with torch.serialization.safe_globals([(collections.OrderedDict, 'yacs.config.CfgNode')]):
        return torch.load(path, map_location='cpu', weights_only=True)


def _load_safetensors(path: Path) -> dict[str, Any]:
    with safetensors.safe_open(path, 'pt') as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        return {'model': weights} | {key: json.loads(value) for key, value in (file.metadata() or {}).items()}


_NAME = re.compile(r'ckpt_epoch_(\d+)(?:_step_(\d+))?\.pth')


def _progress(path: Path) -> tuple[int, float]:
    """Epoch and update of a checkpoint, by its name; the end of an epoch comes after its updates."""
    epoch, step = _NAME.fullmatch(path.name).groups()
    return int(epoch), float('inf') if step is None else int(step)


class CheckpointFolder:
    """A run's checkpoints: `ckpt_epoch_<n>.pth`, within an epoch `ckpt_epoch_<n>_step_<m>.pth`, and the best one.

    Args:
        path: the run's folder.
        keep: newest checkpoints to keep, in addition to the best one; 0 keeps all.
        logger: for what is saved and what is damaged.
    """

    def __init__(self, path: Path, keep: int, logger: logging.Logger):
        self.path, self.keep, self.logger = path, keep, logger

    @property
    def best(self) -> Path:
        """The checkpoint with the best metric."""
        return self.path / 'ckpt_best.pth'

    def all(self) -> list[Path]:
        """The run's checkpoints, newest first, by epoch and by update within it."""
        paths = (path for path in self.path.glob('ckpt_epoch_*.pth') if _NAME.fullmatch(path.name))
        return sorted(paths, key=_progress, reverse=True)

    def newest_complete(self) -> Path | None:
        """The newest intact checkpoint, skipping damaged ones with a warning; None if there are no checkpoints.

        Raises:
            CheckpointError: all are damaged; starting over would overwrite them.
        """
        paths = self.all()
        for path in paths:
            try:
                load_checkpoint(path)
            except CheckpointError as error:
                self.logger.warning(f'skipping a damaged checkpoint: {error}')
            else:
                return path
        if paths:
            raise CheckpointError(
                f'none of the {len(paths)} checkpoints in {self.path} can be read (the newest is {paths[0].name}): '
                f'to start over, write another --tag or --opts TRAIN.AUTO_RESUME False'
            )
        return None

    def save(self, state: dict[str, Any], epoch: int, step: int | None = None) -> Path:
        """Save a checkpoint of the end of an epoch, or of an update within it, then remove old ones.

        Checkpoints that look newer, left by a run that was resumed from an earlier one or with another batch size, are
        renamed to `.old`.

        Raises:
            CheckpointError: it cannot be written; then none is removed.
        """
        path = self.path / (f'ckpt_epoch_{epoch}.pth' if step is None else f'ckpt_epoch_{epoch}_step_{step}.pth')
        save_checkpoint(path, state)
        self.logger.info(f'{path} saved')
        paths = self.all()
        index = paths.index(path)
        try:
            for other in paths[:index]:
                other.rename(f'{other}.old')
                self.logger.warning(f'{other} is not part of this run any more: renamed to .old')
            for old in paths[index:][self.keep :] if self.keep else []:
                old.unlink()
        except OSError as error:
            raise CheckpointError(f'{path} is saved, but an older one cannot be removed: {error.strerror}') from error
        return path

    def remove_temporary(self) -> None:
        """Remove unfinished files of a run that was killed while saving."""
        for path in self.path.glob('ckpt_*.pth.tmp'):
            path.unlink()


def load_weights(
    model: nn.Module, checkpoint: dict[str, Any], path: str | Path, replaceable: str | None = None
) -> bool:
    """Load all of a checkpoint's weights into a network.

    Args:
        model: the network, not wrapped. Its method `upgrade_state_dict`, if any, renames weights of older checkpoints.
        checkpoint: from `load_checkpoint`.
        path: the checkpoint's path, for messages.
        replaceable: regular expression that matches the start of the names of class-dependent weights: the network
            keeps its own where the checkpoint's have another shape.

    Returns:
        Whether the network kept weights of its own.

    Raises:
        CheckpointError: names the missing and unexpected weights, and those of another shape.
    """
    upgrade = getattr(model, 'upgrade_state_dict', dict)
    theirs, ours = upgrade(checkpoint['model']), model.state_dict()
    heads = {name for name in theirs.keys() | ours.keys() if replaceable and re.match(replaceable, name)}
    is_replaced = any(_shape(theirs.get(name)) != _shape(ours.get(name)) for name in heads)
    if is_replaced:
        theirs = {name: value for name, value in theirs.items() if name not in heads}
        theirs |= {name: value for name, value in ours.items() if name in heads}
    problems = {
        'missing': sorted(ours.keys() - theirs.keys()),
        'unexpected': sorted(theirs.keys() - ours.keys()),
        'shape mismatch': [
            f'{name} {_shape(theirs[name])} for {_shape(ours[name])}'
            for name in ours
            if name in theirs and _shape(theirs[name]) != _shape(ours[name])
        ],
    }
    if any(problems.values()):
        details = '; '.join(f'{problem}: {_abridged(names)}' for problem, names in problems.items() if names)
        raise CheckpointError(f'{path} holds a different model from the config: {details}')
    model.load_state_dict(theirs)
    return is_replaced


def _shape(value: Tensor | None) -> tuple[int, ...] | None:
    return None if value is None else tuple(value.shape)


def _abridged(names: list[str], limit: int = 3) -> str:
    more = f' and {len(names) - limit} more' if len(names) > limit else ''
    return ', '.join(names[:limit]) + more
