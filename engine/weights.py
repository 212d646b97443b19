"""Load a checkpoint's weights: choose raw or EMA weights, compare the networks, fit the weights to other shapes."""

import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor, nn
from yacs.config import CfgNode

from engine.checkpoint import CheckpointError
from engine.config_keys import ChangedKey
from engine.config_tree import ConfigTree, get
from utils import first_line, leaves


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
        return checkpoint['model'], 'no EMA weights'
    scores = checkpoint.get('scores') or {}
    raw, ema = scores.get('raw'), scores.get('ema')
    is_scored = raw is not None and ema is not None
    if choice == 'raw' or (choice == 'auto' and is_scored and raw > ema):
        return checkpoint['model'], 'raw weights' + (f' ({raw:.1f} against {ema:.1f} %)' if is_scored else '')
    return checkpoint['model_ema'], 'EMA weights' + (f' ({ema:.1f} against {raw:.1f} %)' if is_scored else '')


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
    """Format the former values of changed keys as arguments of `--opts`."""
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
        is_replaced: whether the network keeps its class-dependent weights even if the shapes agree.
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
    """Fit a checkpoint's weights to a network of another window or image size.

    Args:
        model: the network, not wrapped. Its method `fit_state_dict`, if any, does the work.
        weights: weights of a checkpoint.
        path: the checkpoint's path, for messages.
        fit: does the work instead.

    Returns:
        The weights in the network's shapes, and a note on each kind of change, for the log.

    Raises:
        CheckpointError: they cannot be fitted.
    """
    fit = fit or getattr(model, 'fit_state_dict', None)
    try:
        return fit(weights) if fit else (weights, [])
    except (ValueError, RuntimeError) as error:  # PyTorch cannot interpolate integers, or nothing
        raise CheckpointError(f'{path} holds a different model from the config: {first_line(error)}') from error


def hash_weights(weights: Mapping[str, Any], digest: Any = None) -> str:
    """Hash the names, types, shapes and bits of weights; the same on every device.

    Args:
        weights: a state dict.
        digest: a new hash object with the interface of `hashlib`; by default, XXH3 of 64 bits, which is made for speed.

    Returns:
        The hash in hexadecimal digits: 16 by default.
    """
    digest = xxhash.xxh3_64() if digest is None else digest
    for name, value in sorted(weights.items()):
        if isinstance(value, Tensor):
            digest.update(f'{name} {value.dtype} {tuple(value.shape)}\0'.encode())
            digest.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _shape(value: Tensor | None) -> tuple[int, ...] | None:
    return None if value is None else tuple(value.shape)


def _abridged(names: list[str], limit: int = 3) -> str:
    more = f' and {len(names) - limit} more' if len(names) > limit else ''
    return ', '.join(names[:limit]) + more
