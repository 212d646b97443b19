"""Save and load checkpoints: written atomically, verified when read, and read without running code in them."""

import argparse
import collections
import contextlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from engine.checkpoint_entries import without_other_forms
from engine.config_tree import TASKS, stated_task
from utils import UserError, atomic_write, first_line, printable


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

    As other libraries expect, the metadata say `format: pt` too. Weights that share memory are written twice. Indices
    of relative positions are written in 32 bits, which makes small files smaller; loading converts them.

    Raises:
        CheckpointError: see `save_checkpoint`.
    """
    storages, unshared = set(), {}
    for name, value in weights.items():
        if value.dtype == torch.int64 and name.endswith('relative_position_index'):
            value = value.to(torch.int32)
        storage = value.untyped_storage().data_ptr()
        unshared[name] = value.clone().contiguous() if storage in storages else value.contiguous()
        storages.add(storage)
    text = {'format': 'pt'} | {key: json.dumps(value) for key, value in metadata.items()}  # transformers asks for `pt`
    _save(path, lambda file: file.write(safetensors.torch.save(unshared, text)))


def _save(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    try:
        atomic_write(path, write)
    except (OSError, RuntimeError) as error:  # PyTorch's writer turns a full disk into a RuntimeError
        cause = _system_error(error)
        if cause is None:  # such as the death of a DataLoader worker, which PyTorch raises wherever the program is
            raise
        raise CheckpointError(
            f'{path} cannot be written: {cause.strerror}. Earlier checkpoints are intact: '
            f'make room or write another --output, and start again to resume from the newest'
        ) from error


def _system_error(error: BaseException | None) -> OSError | None:
    """Find the `OSError` that caused an error; None if there is none."""
    while error is not None and not (isinstance(error, OSError) and error.strerror):
        error = error.__cause__ or error.__context__
    return error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, verifying its checksums, without running any code in it.

    Plain state dicts and checkpoints of timm and torchvision are read too, `.pth` or `.safetensors`. The prefixes of
    DDP and torch.compile are removed from names. Published checkpoints hold a pickled yacs node as `config`, which is
    read as a plain mapping; NumPy's scalars are read as Python's numbers, and paths as text.

    Returns:
        The file's entries: the weights as `model`, EMA weights, if any, as `model_ema`, the name of their task as
        `task`, and whatever else there is. Entries of an unexpected form, such as a `config` that is no mapping, are
        left out; `ignored`, if any, lists them with their types.

    Raises:
        CheckpointError: there is no such file, it is not a checkpoint, it is damaged, or it holds more than data.
    """
    path = Path(path)
    if not os.path.isfile(path):  # unlike Path.is_file, it knows names that the system does not allow
        raise CheckpointError(
            f'checkpoint {path} {"is a folder: name a file in it" if os.path.isdir(path) else "does not exist"}'
        )
    try:
        checkpoint = _load_safetensors(path) if path.suffix == '.safetensors' else _load_pth(path)
    except CheckpointError:
        raise
    except Exception as error:  # the loaders document no exceptions of their own
        raise CheckpointError(f'{path} is not a checkpoint that can be read safely: {_reason(error)}') from error
    weights, ema_weights, entries = _split_weights(checkpoint)
    if weights is None:
        raise CheckpointError(
            f'{path} is not a checkpoint of this project: it has no entry "model" with weights, and is no state dict'
        )
    entries = without_other_forms(entries)
    for name, values in (('model', weights), ('model_ema', ema_weights)):
        if values is not None:
            entries[name] = _clean_names(_check_dense(values, path))
    entries['task'] = _task_of(entries)
    return entries


def _reason(error: Exception) -> str:
    """Why a file cannot be read, without PyTorch's advice on how to run the code in it."""
    unknown_type = re.search(r'[Uu]nsupported (?:global: )?GLOBAL (\S{1,100})', str(error))
    if unknown_type:
        name = 'numpy.ndarray' if unknown_type[1].endswith('multiarray._reconstruct') else unknown_type[1]
        return (
            f'in addition to tensors and plain data, it holds {name}, whose code would run: in the program that wrote '
            f"the file, save only the weights, torch.save({{'model': model.state_dict()}}, FILE)"
        )
    reason = first_line(error)
    if isinstance(error, pickle.UnpicklingError) or reason.isdigit() or 'weights_only' in reason:
        return 'it is not a PyTorch file, or holds more than data'
    return reason


def _task_of(entries: Mapping[str, Any]) -> str:
    """Find the task of a checkpoint, from its config or its weights.

    Checkpoints of other programs have no config of this project; they are of a detector if the weights have a backbone.
    """
    stated = stated_task(entries.get('config', {}))
    is_detector = any(name.startswith('backbone.') for name in entries['model'])
    return stated if stated in TASKS else 'detection' if is_detector else 'classification'


# A TorchScript file, which is recognised later, has compressed code: it may unpack to this many bytes more.
_CODE_BYTES = 10 << 20


def _load_pth(path: Path, mmap: bool = False) -> Any:
    is_zip = zipfile.is_zipfile(path)  # PyTorch's format before 1.6 is not a zip file, and has no checksums
    if is_zip and not mmap:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > 2 * path.stat().st_size + _CODE_BYTES:
                raise CheckpointError(
                    f'{path} is no checkpoint: PyTorch compresses no weights, and this file is packed'
                )
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f'{path} is damaged: the checksum of {damaged} is wrong')
    with torch.serialization.safe_globals(_HARMLESS):
        return torch.load(path, map_location='cpu', weights_only=True, mmap=mmap and is_zip)


class _NumpyType:
    """Stands for a pickled `numpy.dtype`, of which it takes the name and the byte order.

    Args:
        code: kind and size in bytes, such as `f8`.
        *options: whether it is aligned, and whether it is a copy.
    """

    def __init__(self, code: str, *options: bool):
        self.code, self.order = code, '='

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]


def _numpy_scalar(kind: _NumpyType, data: bytes) -> bool | int | float | str:
    """Python's number or text for a pickled scalar of NumPy."""
    dtype = np.dtype(kind.code).newbyteorder(kind.order)
    if dtype.kind not in 'biufU':
        raise pickle.UnpicklingError(f'a scalar of type {dtype}')
    return np.frombuffer(data, dtype, count=1)[0].item()


def _path_text(*parts: str) -> str:
    """Text for a pickled path."""
    return os.path.join(*parts)


# What pickled objects of other libraries become; their own code does not run
_PATHS = ('PosixPath', 'WindowsPath', 'PurePosixPath', 'PureWindowsPath')
_HARMLESS = [
    argparse.Namespace,  # timm saves its command line
    (collections.OrderedDict, 'yacs.config.CfgNode'),
    (_NumpyType, 'numpy.dtype'),
    *((_numpy_scalar, f'numpy.{core}.multiarray.scalar') for core in ('core', '_core')),
    *((_path_text, f'{module}.{name}') for module in ('pathlib', 'pathlib._local') for name in _PATHS),
]


def _load_safetensors(path: Path) -> dict[str, Any]:
    with safetensors.safe_open(path, 'pt') as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        entries = {}
        for key, text in (file.metadata() or {}).items():
            with contextlib.suppress(ValueError):  # other programs write plain text, such as `format: pt`
                entries[key] = json.loads(text)
    return entries | ({'model': weights} if weights else {})


def _check_dense(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The weights, if all of them are ordinary tensors.

    Raises:
        CheckpointError: one is sparse, quantized, nested, or without data (on the device `meta`).
    """
    for name, x in weights.items():
        if x.layout != torch.strided or x.is_quantized or x.is_nested or x.device.type != 'cpu':
            raise CheckpointError(
                f'{path}: {printable(name)[:100]} is not a dense tensor with data: save it again as an ordinary tensor'
            )
    return weights


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
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(x, Tensor) for k, x in value.items())


def _clean_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights without the prefixes that DDP, torch.compile and PyTorch's `AveragedModel` give to all names.

    `AveragedModel`, which holds torchvision's EMA weights, also has the number of its updates.
    """
    others = {name: value for name, value in weights.items() if name != 'n_averaged'}
    if all(name.startswith('module.') for name in others):
        weights = others
    for prefix in ('module.', '_orig_mod.', 'module.'):  # either may wrap the other
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def other_task(checkpoint: Mapping[str, Any], path: str | Path, task: str) -> CheckpointError:
    """The error where a program for a task gets a checkpoint, from `load_checkpoint`, of another one."""
    return CheckpointError(
        f'{path} is a checkpoint of {checkpoint["task"]}, and this program is for {task}: give a checkpoint of {task}'
    )


def saved_progress(checkpoint: dict[str, Any]) -> dict[str, int]:
    """Where a checkpoint resumes: `epoch`, `step` in it, `images` of it, and `skipped` updates of the whole run.

    Published checkpoints end an epoch; older ones of this project call it `place`.
    """
    published = {'epoch': checkpoint.get('epoch', -1) + 1, 'step': 0, 'images': 0, 'skipped': 0}
    return checkpoint.get('progress', checkpoint.get('place', published))


def peek_checkpoint(path: Path) -> dict[str, Any]:
    """Read the entries of a checkpoint that are not tensors; tensors stay on disk, and are not verified.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        checkpoint = _load_pth(path, mmap=True)
    except Exception as error:  # the loaders document no exceptions of their own
        raise CheckpointError(f'{path} is not a checkpoint that can be read safely') from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f'{path} is not a checkpoint of this project')
    return without_other_forms(checkpoint)
