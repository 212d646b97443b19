"""Checkpoints that survive: written durably, checked when read, and read without running any code in them."""

import collections
import errno
import json
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor, nn


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written, or belongs to another network."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that, whatever happens, `path` holds the old file or the whole new one.

    Every record carries a checksum (the CRC-32 of PyTorch's zip format), which `load_checkpoint` checks.

    Raises:
        CheckpointError: it cannot be written; what was there before still is.
    """
    _save(path, lambda file: torch.save(state, file))


def save_safetensors(path: Path, weights: dict[str, Tensor], **entries: Any) -> None:
    """Write weights as `.safetensors`, with entries that JSON can hold (`config`, `classes`) as its metadata.

    Raises:
        CheckpointError: as of `save_checkpoint`.
    """
    weights = {name: value.contiguous() for name, value in weights.items()}
    metadata = {key: json.dumps(value) for key, value in entries.items()}
    _save(path, lambda file: file.write(safetensors.torch.save(weights, metadata)))


def _save(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Replace a checkpoint, or say why not."""
    try:
        replace_file(path, write)
    except (OSError, RuntimeError) as error:  # PyTorch's writer turns a full disk into a RuntimeError
        raise CheckpointError(
            f'{path} cannot be written: {_system_error(error)}. Earlier checkpoints are as they were: '
            f'make room or write another --output, and start again to continue from the newest'
        ) from error


def replace_file(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file under a temporary name, flush it to the disk, rename it, and flush the folder too.

    Args:
        path: holds the old file or the whole new one, whatever happens.
        write: writes the new one; what it raises is raised, and leaves no temporary file.
    """
    temporary = path.with_name(path.name + '.tmp')
    try:
        with temporary.open('wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except (OSError, RuntimeError):
        temporary.unlink(missing_ok=True)
        raise


def _system_error(error: BaseException) -> str:
    """What the system said, of an error that may hide it."""
    seen = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror
        seen = seen.__cause__ or seen.__context__
    return (str(error).splitlines() or [type(error).__name__])[0]


def _flush_folder(folder: Path) -> None:
    """Make a rename in a folder durable, on file systems that can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, checking its checksums, without running any code in it.

    Published checkpoints hold a pickled yacs node as `config`; it is read as a plain mapping. `.safetensors` files, as
    `tools.convert_checkpoint` writes them, hold the weights, `config` and `classes`.

    Raises:
        CheckpointError: no file, not a checkpoint, a damaged one, or one that holds more than data.
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
    except Exception as error:  # the loaders raise many kinds, none of which they promise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, pickle.UnpicklingError):  # where PyTorch tells how to run what a file holds
            reason = "it is none of PyTorch's files, or holds more than data"
        raise CheckpointError(f'{path} is not a checkpoint that can be read safely: {reason}') from error
    weights = checkpoint.get('model') if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(f'{path} is not a checkpoint of this project: it has no entry "model" of weights')
    return checkpoint


def _load_pth(path: Path) -> Any:
    if zipfile.is_zipfile(path):  # all but PyTorch's format before 1.6, which has no checksums
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


def _place(path: Path) -> tuple[int, float]:
    """Epoch and update of a checkpoint; the end of an epoch comes after its updates."""
    epoch, step = _NAME.fullmatch(path.name).groups()
    return int(epoch), float('inf') if step is None else int(step)


class CheckpointFolder:
    """A run's checkpoints, `ckpt_epoch_<n>.pth` and, inside an epoch, `ckpt_epoch_<n>_step_<m>.pth`, and the best.

    Args:
        path: the run's folder.
        keep: newest checkpoints to keep; 0 keeps all. The best one is kept besides.
        logger: is told what is saved, and what is damaged.
    """

    def __init__(self, path: Path, keep: int, logger: logging.Logger):
        self.path, self.keep, self.logger = path, keep, logger

    @property
    def best(self) -> Path:
        """The checkpoint of the highest accuracy."""
        return self.path / 'ckpt_best.pth'

    def all(self) -> list[Path]:
        """The run's checkpoints from the newest, by epoch and by update inside it, to the oldest."""
        paths = (path for path in self.path.glob('ckpt_epoch_*.pth') if _NAME.fullmatch(path.name))
        return sorted(paths, key=_place, reverse=True)

    def newest_complete(self) -> Path | None:
        """The newest checkpoint that is whole, passing over damaged ones, each with a warning; None if there is none.

        Raises:
            CheckpointError: there are some, and all are damaged: better than to start afresh over them.
        """
        paths = self.all()
        for path in paths:
            try:
                load_checkpoint(path)
            except CheckpointError as error:
                self.logger.warning(f'passing over a damaged checkpoint: {error}')
            else:
                return path
        if paths:
            raise CheckpointError(
                f'none of the {len(paths)} checkpoints in {self.path} can be read (the newest, {paths[0].name}): '
                f'to start afresh, write another --tag or --opts TRAIN.AUTO_RESUME False'
            )
        return None

    def save(self, state: dict[str, Any], epoch: int, step: int | None = None) -> Path:
        """Save a checkpoint of the end of an epoch, or of an update inside it, then remove old ones.

        It is the newest then: others that seem newer, of a run that was taken up again at an earlier one or with
        another size of batch, are set aside as `.old`.

        Raises:
            CheckpointError: it cannot be written; then none is removed.
        """
        path = self.path / (f'ckpt_epoch_{epoch}.pth' if step is None else f'ckpt_epoch_{epoch}_step_{step}.pth')
        save_checkpoint(path, state)
        self.logger.info(f'{path} saved')
        paths = self.all()
        here = paths.index(path)
        try:
            for other in paths[:here]:
                other.rename(f'{other}.old')
                self.logger.warning(f'{other}, which the run did not go on from, set aside as .old')
            for old in paths[here:][self.keep :] if self.keep else []:
                old.unlink()
        except OSError as error:
            raise CheckpointError(f'{path} is saved, but an older one cannot be removed: {error.strerror}') from error
        return path

    def remove_temporary(self) -> None:
        """Remove what a run left that was killed while it was saving."""
        for path in self.path.glob('ckpt_*.pth.tmp'):
            path.unlink()


def load_weights(
    model: nn.Module, checkpoint: dict[str, Any], path: str | Path, replaceable: str | None = None
) -> bool:
    """Load a checkpoint's weights, every one of them.

    Args:
        model: the network, not wrapped.
        checkpoint: from `load_checkpoint`.
        path: where it came from, for messages.
        replaceable: what the names of weights begin with (a regular expression) that are for the classes: the network
            keeps its own if the checkpoint's are for others.

    Returns:
        Whether the network kept weights of its own.

    Raises:
        CheckpointError: names the missing, unexpected and misshapen weights.
    """
    theirs, ours = dict(checkpoint['model']), model.state_dict()
    heads = {name for name in theirs.keys() | ours.keys() if replaceable and re.match(replaceable, name)}
    replaced = any(_shape(theirs.get(name)) != _shape(ours.get(name)) for name in heads)
    if replaced:
        theirs = {name: value for name, value in theirs.items() if name not in heads}
        theirs |= {name: value for name, value in ours.items() if name in heads}
    faults = {
        'missing': sorted(ours.keys() - theirs.keys()),
        'unexpected': sorted(theirs.keys() - ours.keys()),
        'misshapen': [
            f'{name} {_shape(theirs[name])} for {_shape(ours[name])}'
            for name in ours
            if name in theirs and _shape(theirs[name]) != _shape(ours[name])
        ],
    }
    if any(faults.values()):
        told = '; '.join(f'{fault} {_some(names)}' for fault, names in faults.items() if names)
        raise CheckpointError(f'{path} is a checkpoint of another model than the config: {told}')
    model.load_state_dict(theirs)
    return replaced


def _shape(value: Tensor | None) -> tuple[int, ...] | None:
    return None if value is None else tuple(value.shape)


def _some(names: list[str], most: int = 3) -> str:
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(names[:most]) + more
