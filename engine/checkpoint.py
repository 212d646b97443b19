"""Checkpoints that survive: written atomically, verified when read, and read without running any code in them."""

import argparse
import collections
import contextlib
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor, nn

from engine.config_tree import TASKS, stated_task
from utils import UserError, atomic_write, first_line


class CheckpointError(UserError):
    """A checkpoint that cannot be read or written, or that does not fit the network."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically: whatever happens, `path` holds the old file or the whole new one.

    Every entry of the file carries a checksum (the CRC-32 of PyTorch's zip format), which `load_checkpoint` verifies.

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
    return first_line(error)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, verifying its checksums, without running any code in it.

    Plain state dicts and timm's checkpoints are read too, `.pth` or `.safetensors`; names are freed from the prefixes
    of DDP and torch.compile. Published checkpoints hold a pickled yacs node as `config`; it is read as a plain mapping.

    Returns:
        The file's entries: the weights as `model`, EMA weights, if any, as `model_ema`, the name of their task as
        `task`, and whatever else there is.

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
        reason = first_line(error)
        # PyTorch's message says how to run the file's code; of a text it is a number.
        if isinstance(error, pickle.UnpicklingError) or reason.isdigit():
            reason = 'it is not a PyTorch file, or holds more than data'
        raise CheckpointError(f'{path} is not a checkpoint that can be read safely: {reason}') from error
    weights, ema_weights, entries = _split_weights(checkpoint)
    if weights is None:
        raise CheckpointError(
            f'{path} is not a checkpoint of this project: it has no entry "model" with weights, and is no state dict'
        )
    entries['model'] = _clean_names(weights)
    if ema_weights is not None:
        entries['model_ema'] = _clean_names(ema_weights)
    entries['task'] = _task_of(entries)
    return entries


def _task_of(entries: Mapping[str, Any]) -> str:
    """The task of a checkpoint: what its config states.

    Checkpoints of other programs have no such config. Their weights tell: those of a detector have a backbone.
    """
    config = entries.get('config')
    stated = stated_task(config) if isinstance(config, Mapping) else None
    is_detector = any(name.startswith('backbone.') for name in entries['model'])
    return stated if stated in TASKS else 'detection' if is_detector else 'classification'


def _load_pth(path: Path, mmap: bool = False) -> Any:
    is_zip = zipfile.is_zipfile(path)  # PyTorch's format before 1.6 is not a zip file, and has no checksums
    if is_zip and not mmap:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f'{path} is damaged: the checksum of {damaged} is wrong')
    # timm saves its command line
    allowed = [(collections.OrderedDict, 'yacs.config.CfgNode'), argparse.Namespace]
    with torch.serialization.safe_globals(allowed):
        return torch.load(path, map_location='cpu', weights_only=True, mmap=mmap and is_zip)


def _load_safetensors(path: Path) -> dict[str, Any]:
    with safetensors.safe_open(path, 'pt') as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        entries = {}
        for key, text in (file.metadata() or {}).items():
            with contextlib.suppress(ValueError):  # other programs write plain text, such as `format: pt`
                entries[key] = json.loads(text)
    return entries | ({'model': weights} if weights else {})


# Entries with weights and with EMA weights: ours and Swin's, then timm's.
_WEIGHTS, _EMA_WEIGHTS = ('model', 'state_dict'), ('model_ema', 'state_dict_ema')


def _split_weights(checkpoint: Any) -> tuple[dict[str, Tensor] | None, dict[str, Tensor] | None, dict[str, Any]]:
    """Weights, EMA weights and the other entries of a file; EMA weights stand in for weights that are missing."""
    if not isinstance(checkpoint, dict):
        return None, None, {}
    if checkpoint and _is_state_dict(checkpoint):
        return checkpoint, None, {}
    weights, ema_weights = (
        next((checkpoint[key] for key in keys if _is_state_dict(checkpoint.get(key))), None)
        for keys in (_WEIGHTS, _EMA_WEIGHTS)
    )
    entries = {key: value for key, value in checkpoint.items() if key not in _WEIGHTS + _EMA_WEIGHTS}
    return ema_weights if weights is None else weights, ema_weights, entries


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(x, Tensor) for x in value.values())


def _clean_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights without the prefixes that DDP and torch.compile give to all names."""
    for prefix in ('module.', '_orig_mod.', 'module.'):  # either may wrap the other
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def choose_weights(checkpoint: dict[str, Any], path: str | Path, choice: str = 'auto') -> tuple[dict[str, Tensor], str]:
    """Choose between a checkpoint's raw and EMA weights, for programs that only read them.

    EMA weights are taken where there are some, unless the raw ones have a higher score: after few updates, the average
    is mostly initial weights.

    Args:
        checkpoint: from `load_checkpoint`; its `scores`, if any, are the metrics in percent of `raw` and `ema` weights.
        path: the checkpoint's path, for messages.
        choice: `auto`, `raw` or `ema`.

    Returns:
        The weights, and what they are, for the log.

    Raises:
        CheckpointError: EMA weights are asked for, but there are none.
    """
    if 'model_ema' not in checkpoint:
        if choice == 'ema':
            raise CheckpointError(f'{path} holds no EMA weights: write --pretrained-weights raw')
        return checkpoint['model'], 'the only weights'
    scores = checkpoint.get('scores') or {}
    raw, ema = scores.get('raw'), scores.get('ema')
    is_scored = raw is not None and ema is not None
    if choice == 'raw' or (choice == 'auto' and is_scored and raw > ema):
        return checkpoint['model'], 'raw weights' + (f' ({raw:.1f} against {ema:.1f} %)' if is_scored else '')
    return checkpoint['model_ema'], 'EMA weights' + (f' ({ema:.1f} against {raw:.1f} %)' if is_scored else '')


def saved_progress(checkpoint: dict[str, Any]) -> dict[str, int]:
    """Where a checkpoint resumes: `epoch`, `step` in it, `images` of it, and `skipped` updates of the whole run.

    Published checkpoints end an epoch; older ones of this project call it `place`.
    """
    published = {'epoch': checkpoint.get('epoch', -1) + 1, 'step': 0, 'images': 0, 'skipped': 0}
    return checkpoint.get('progress', checkpoint.get('place', published))


def peek_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's entries, for those that are not tensors: tensors stay on disk, and are not verified.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return _load_pth(path, mmap=True)
    except Exception as error:  # the loaders document no exceptions of their own
        raise CheckpointError(f'{path} is not a checkpoint that can be read safely') from error


def load_weights(
    model: nn.Module,
    checkpoint: dict[str, Any],
    path: str | Path,
    replaceable: str | None = None,
    is_replaced: bool = False,
) -> bool:
    """Load all of a checkpoint's weights into a network.

    Args:
        model: the network, not wrapped. Its method `upgrade_state_dict`, if any, renames weights of older checkpoints.
        checkpoint: from `load_checkpoint`.
        path: the checkpoint's path, for messages.
        replaceable: regular expression that matches the start of the names of class-dependent weights: the network
            keeps its own where the checkpoint's have another shape.
        is_replaced: the network keeps its own even where the shapes agree.

    Returns:
        Whether the network kept weights of its own.

    Raises:
        CheckpointError: names the missing and unexpected weights, and those of another shape.
    """
    upgrade = getattr(model, 'upgrade_state_dict', dict)
    theirs, ours = upgrade(checkpoint['model']), model.state_dict()
    heads = {name for name in theirs.keys() | ours.keys() if replaceable and re.match(replaceable, name)}
    has_other_shapes = any(_shape(theirs.get(name)) != _shape(ours.get(name)) for name in heads)
    is_replaced = bool(heads) and (is_replaced or has_other_shapes)
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


def fit_weights(
    model: nn.Module,
    weights: dict[str, Tensor],
    path: str | Path,
    fit: Callable[[dict[str, Tensor]], tuple[dict[str, Tensor], list[str]]] | None = None,
) -> tuple[dict[str, Tensor], list[str]]:
    """Weights in a network's shapes, for a network of another window or image size, and what was done, for the log.

    Args:
        model: the network, not wrapped. Its method `fit_state_dict`, if any, does the work.
        weights: of a checkpoint.
        path: the checkpoint's path, for messages.
        fit: does the work instead.

    Raises:
        CheckpointError: they cannot be fitted.
    """
    fit = fit or getattr(model, 'fit_state_dict', None)
    try:
        return fit(weights) if fit else (weights, [])
    except ValueError as error:
        raise CheckpointError(f'{path} holds a different model from the config: {error}') from error


def _shape(value: Tensor | None) -> tuple[int, ...] | None:
    return None if value is None else tuple(value.shape)


def _abridged(names: list[str], limit: int = 3) -> str:
    more = f' and {len(names) - limit} more' if len(names) > limit else ''
    return ', '.join(names[:limit]) + more
