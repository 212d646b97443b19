"""Checkpoints that survive: written atomically, verified when read, and read without running any code in them."""

import argparse
import collections
import contextlib
import json
import os
import pickle
import re
import shlex
import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from engine.config_keys import ChangedKey
from engine.config_tree import TASKS, ConfigTree, get, leaves, stated_task
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

    As other libraries expect, the metadata say `format: pt` too. Weights that share memory are written twice.

    Raises:
        CheckpointError: see `save_checkpoint`.
    """
    storages, unshared = set(), {}
    for name, value in weights.items():
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
        if cause is None:  # such as the death of a loader process, which PyTorch raises wherever the program is
            raise
        raise CheckpointError(
            f'{path} cannot be written: {cause.strerror}. Earlier checkpoints are intact: '
            f'make room or write another --output, and start again to resume from the newest'
        ) from error


def _system_error(error: BaseException | None) -> OSError | None:
    """The system's error behind one that hides it; None if there is none."""
    while error is not None and not (isinstance(error, OSError) and error.strerror):
        error = error.__cause__ or error.__context__
    return error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, verifying its checksums, without running any code in it.

    Plain state dicts and timm's checkpoints are read too, `.pth` or `.safetensors`; names are freed from the prefixes
    of DDP and torch.compile. Published checkpoints hold a pickled yacs node as `config`; it is read as a plain mapping,
    NumPy's scalars as Python's numbers, and paths as text.

    Returns:
        The file's entries: the weights as `model`, EMA weights, if any, as `model_ema`, the name of their task as
        `task`, and whatever else there is. Entries that have a name of ours and another form, such as a `config` that
        is no mapping, are left out; `ignored`, if any, lists them with their types.

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
    entries = _without_other_forms(entries)
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
            f'besides tensors and plain data, it holds {name}, whose code would run: in the program that wrote the '
            f"file, save the weights alone, torch.save({{'model': model.state_dict()}}, FILE)"
        )
    reason = first_line(error)
    if isinstance(error, pickle.UnpicklingError) or reason.isdigit() or 'weights_only' in reason:
        return 'it is not a PyTorch file, or holds more than data'
    return reason


def _task_of(entries: Mapping[str, Any]) -> str:
    """The task of a checkpoint: what its config states.

    Checkpoints of other programs have no such config. Their weights tell: those of a detector have a backbone.
    """
    stated = stated_task(entries.get('config', {}))
    is_detector = any(name.startswith('backbone.') for name in entries['model'])
    return stated if stated in TASKS else 'detection' if is_detector else 'classification'


# What a TorchScript file, which is recognised later, may hold beyond its size: its code is compressed.
_CODE_BYTES = 10 << 20


def _load_pth(path: Path, mmap: bool = False) -> Any:
    is_zip = zipfile.is_zipfile(path)  # PyTorch's format before 1.6 is not a zip file, and has no checksums
    if is_zip and not mmap:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > 2 * path.stat().st_size + _CODE_BYTES:
                raise CheckpointError(f'{path} is no checkpoint: PyTorch compresses no weights, and this file is packed')
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


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_plain(value: Any, depth: int = 10) -> bool:
    """Whether a value is data as YAML has them, in mappings with text as keys."""
    if isinstance(value, Mapping):
        return depth > 0 and all(isinstance(key, str) and _is_plain(x, depth - 1) for key, x in value.items())
    if isinstance(value, list | tuple):
        return depth > 0 and all(_is_plain(x, depth - 1) for x in value)
    return value is None or isinstance(value, bool | int | float | str)


def _is_mapping(value: Any, is_valid: Callable[[Any], bool], required: Collection[str] = ()) -> bool:
    """Whether a value is a mapping of valid values, with some keys."""
    return isinstance(value, Mapping) and all(key in value for key in required) and all(map(is_valid, value.values()))


def _is_progress(value: Any) -> bool:
    return _is_mapping(value, lambda x: isinstance(x, int) and x >= 0, ('epoch', 'step', 'images', 'skipped'))


def _is_data(value: Any) -> bool:
    return _is_mapping(value, lambda split: _is_mapping(split, _is_plain, ('images', 'sha256')))


def _is_file(value: Any) -> bool:
    return isinstance(value.get('path'), str) and isinstance(value.get('sha256'), str)


def _is_origin(value: Any) -> bool:
    if not (_is_plain(value) and isinstance(value, Mapping) and isinstance(value.get('kind'), str)):
        return False
    nested = value.get('origin')
    return (value['kind'] == 'scratch' or _is_file(value)) and (nested is None or _is_origin(nested))


# Forms of the entries that are read, except for the training state's, which `TrainingState` checks
_FORMS: dict[str, Callable[[Any], bool]] = {
    'config': lambda value: isinstance(value, Mapping) and _is_plain(value),
    'classes': lambda value: isinstance(value, list | tuple) and all(isinstance(name, str) for name in value),
    'scores': lambda value: _is_mapping(value, _is_number),
    'max_accuracy': _is_number,
    'epoch': lambda value: isinstance(value, int) and value >= -1,
    'progress': _is_progress,
    'place': _is_progress,
    'data': _is_data,
    'environment': lambda value: _is_mapping(value, lambda x: isinstance(x, str)),
    'origin': _is_origin,
    'pretrained': lambda value: isinstance(value, Mapping) and _is_plain(value) and _is_file(value),
}


def _without_other_forms(entries: dict[str, Any]) -> dict[str, Any]:
    """Entries, without those in `_FORMS` that have another form; see `load_checkpoint`."""
    kept, ignored = {}, []
    for name, value in entries.items():
        is_valid = _FORMS.get(name) if isinstance(name, str) else None
        if is_valid and isinstance(value, Tensor) and value.ndim == 0 and value.device.type == 'cpu':
            value = value.item()
        if is_valid is None or is_valid(value) or (value is None and name in ('origin', 'pretrained')):
            kept[name] = value
        elif value is not None:
            ignored.append(f'{name} ({type(value).__name__})')
    kept.pop('ignored', None)
    return kept | ({'ignored': ignored} if ignored else {})


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
        checkpoint = _load_pth(path, mmap=True)
    except Exception as error:  # the loaders document no exceptions of their own
        raise CheckpointError(f'{path} is not a checkpoint that can be read safely') from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f'{path} is not a checkpoint of this project')
    return _without_other_forms(checkpoint)


# Keys of the network that may differ between a checkpoint and the network that takes its weights: the network takes
# images of any size, and `fit_weights` fits the weights to its windows, which the log says.
_FITTED_KEYS = ('DATA.IMG_SIZE', 'MODEL.MSG.WINDOW_SIZE')


def changed_network(
    config: CfgNode, checkpoint: Mapping[str, Any], tree: ConfigTree, inputs: Sequence[str] = ()
) -> list[ChangedKey]:
    """Keys of the network that differ from a checkpoint's config, so that its weights would mean something else.

    Such weights may load: those of a network with another `MANIP_TYPE` or `SHUF_SIZE` have the same names and shapes.
    Left out are the image size and the window size, to which weights are fitted; keys of `MODEL.MSG` where both
    networks are of timm; and keys of masks where the config's detector has none.

    Args:
        config: the config of the network that takes the weights.
        checkpoint: from `load_checkpoint`. One without a config counts as equal. Of one of another task, the keys of
            `MODEL.MSG` are compared, if both networks are MSG-Transformers.
        tree: the keys of `config`.
        inputs: further keys, of what the network sees, where `tree` and the checkpoint's config have them.
    """
    saved = checkpoint.get('config')
    if not saved:
        return []
    theirs = dict(leaves(saved))
    names = [name for name, key in tree.keys.items() if key.affects == 'network' and name not in _FITTED_KEYS]
    names += [name for name in inputs if name in tree.keys and name in theirs]
    network = 'MODEL.BACKBONE' if 'MODEL.BACKBONE' in tree.keys else 'MODEL.TYPE'
    if checkpoint['task'] != tree.task:
        theirs_network = theirs.get('MODEL.BACKBONE', theirs.get('MODEL.TYPE', 'msg'))
        is_msg = theirs_network == 'msg' == get(config, network, 'config')
        names = [name for name in names if name.startswith('MODEL.MSG.') and is_msg]
    changed = tree.changed_keys(config, saved, names)
    if get(config, network, 'config') != 'msg' and not any(key.name == network for key in changed):
        changed = [key for key in changed if not key.name.startswith('MODEL.MSG.') or key.name.endswith('IN_CHANS')]
    if 'MODEL.MASK.ENABLED' in tree.keys and not config.MODEL.MASK.ENABLED:
        changed = [key for key in changed if not key.name.startswith('MODEL.MASK.')]
    return changed


def check_same_network(
    config: CfgNode,
    checkpoint: Mapping[str, Any],
    path: str | Path,
    tree: ConfigTree,
    inputs: Sequence[str] = (),
    otherwise: str = '',
) -> None:
    """Refuse weights that were trained in a network that computes something else; see `changed_network`.

    Args:
        config: the config of the network that takes the weights.
        checkpoint: from `load_checkpoint`.
        path: the checkpoint's path, for messages.
        tree: the keys of `config`.
        inputs: see `changed_network`.
        otherwise: what to do if the other network is wanted, for the message.

    Raises:
        CheckpointError: the networks differ; the message names the keys, both values and how to undo the difference.
    """
    changed = changed_network(config, checkpoint, tree, inputs)
    if changed:
        raise CheckpointError(
            f'the config differs from that of {path} in what the network computes ({"; ".join(map(str, changed))}): '
            f'write --opts {options_before(changed)}, or give the --cfg of its run{otherwise}'
        )


def options_before(changed: Iterable[ChangedKey]) -> str:
    """Values of `--opts` with which keys are what they were before."""
    return ' '.join(f'{key.name} {shlex.quote(str(key.before))}' for key in changed)


class Loaded(NamedTuple):
    """What `load_weights` did.

    Attributes:
        is_head_new: whether the network kept its own class-dependent weights.
        missing: names of the network's weights that the checkpoint does not have, so they kept their initial values.
        unexpected: names of the checkpoint's weights that the network does not have.
    """

    is_head_new: bool = False
    missing: Sequence[str] = ()
    unexpected: Sequence[str] = ()

    @property
    def notes(self) -> list[str]:
        """What was not loaded, for the log."""
        kinds = {'not in the file, kept as initialized': self.missing, 'not in the network, left out': self.unexpected}
        return [f'{len(names)} weights {kind}: {", ".join(names)}' for kind, names in kinds.items() if names]


def load_weights(
    model: nn.Module,
    checkpoint: dict[str, Any],
    path: str | Path,
    replaceable: str | None = None,
    is_replaced: bool = False,
    missing: str = 'error',
) -> Loaded:
    """Load a checkpoint's weights into a network: all of them, unless `missing` is `allow`.

    Args:
        model: the network, not wrapped. Its method `upgrade_state_dict`, if any, renames weights of older checkpoints.
        checkpoint: from `load_checkpoint`.
        path: the checkpoint's path, for messages.
        replaceable: regular expression that matches the start of the names of class-dependent weights: the network
            keeps its own where the checkpoint's have another shape.
        is_replaced: the network keeps its own even where the shapes agree.
        missing: `allow` loads the weights whose names both have, and leaves out the others; `error` refuses them, and
            `report` also names the flag that allows them.

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
    loaded = Loaded(is_replaced)
    if missing == 'allow' and (ours.keys() & theirs.keys()) - (heads if is_replaced else set()):
        loaded = Loaded(is_replaced, problems.pop('missing'), problems.pop('unexpected'))
    if any(problems.values()):
        details = '; '.join(f'{problem}: {_abridged(names)}' for problem, names in problems.items() if names)
        is_other_only = missing == 'report' and not problems['shape mismatch'] and ours.keys() & theirs.keys()
        remedy = '; --pretrained-missing allow loads the weights that both have' if is_other_only else ''
        raise CheckpointError(f'{path} holds a different model from the config: {details}{remedy}')
    try:
        model.load_state_dict(theirs, strict=missing != 'allow')
    except RuntimeError as error:  # a type of numbers that cannot be converted
        raise CheckpointError(f'{path} cannot be loaded: {" ".join(str(error).split())[:300]}') from error
    return loaded


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
    except (ValueError, RuntimeError) as error:  # PyTorch cannot interpolate integers, or nothing
        raise CheckpointError(f'{path} holds a different model from the config: {first_line(error)}') from error


def _shape(value: Tensor | None) -> tuple[int, ...] | None:
    return None if value is None else tuple(value.shape)


def _abridged(names: list[str], limit: int = 3) -> str:
    more = f' and {len(names) - limit} more' if len(names) > limit else ''
    return ', '.join(names[:limit]) + more
