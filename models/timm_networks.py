"""Networks of timm from the config tree: `MODEL.TYPE: timm:<name>`, `MODEL.TIMM_ARGS`."""

import ast
import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import nn

if TYPE_CHECKING:  # the installed package does not need yacs
    from yacs.config import CfgNode

PREFIX = 'timm:'

# Arguments that MODEL.TIMM_ARGS must not set, since they say where weights come from or how a network is wrapped, not
# what it computes: those that timm's factory and builder take themselves, instead of handing them to the network.
_FACTORY_ARGS = {
    name
    for function in (timm.create_model, timm.models.build_model_with_cfg)
    for name, parameter in inspect.signature(function).parameters.items()
    if parameter.kind is not parameter.VAR_KEYWORD
}
_BY_PROGRAM = 'leave it out: it does not shape the network'
RESERVED = dict.fromkeys(sorted(_FACTORY_ARGS), _BY_PROGRAM) | {
    'num_classes': 'write MODEL.NUM_CLASSES',
    'in_chans': 'write MODEL.MSG.IN_CHANS',
    'features_only': 'write nothing: the program sets it',
    'feature_cls': 'write nothing: the program sets it',
    'out_indices': 'write nothing: the program sets it',
    'device': 'write DEVICE',
    'dtype': 'write AMP_OPT_LEVEL',
    'checkpoint_path': 'write --pretrained with a state-dict file',
    'pretrained': "write --pretrained with a file of timm's weights (docs/training.md)",
}


def build_timm_network(config: 'CfgNode') -> nn.Module:
    """Build the classifier that `MODEL.TYPE` names, for `DATA.IMG_SIZE` and `MODEL.NUM_CLASSES`.

    Args:
        config: the config tree.

    Raises:
        ValueError: see `create_timm_network`.
    """
    options = {'in_chans': config.MODEL.MSG.IN_CHANS, 'num_classes': config.MODEL.NUM_CLASSES}
    name = config.MODEL.TYPE.removeprefix(PREFIX)
    if _is_registered(name) and _has_fixed_size(name):
        options['img_size'] = config.DATA.IMG_SIZE
    return create_timm_network('MODEL.TYPE', config.MODEL.TYPE, config, options)


def create_timm_network(key: str, value: str, config: 'CfgNode', options: dict[str, Any]) -> nn.Module:
    """Create a network of timm with the config's drop rates, `MODEL.TIMM_ARGS` and `TRAIN.USE_CHECKPOINT`.

    Its weights are random. Nothing is downloaded and no file is read, whatever the config says: the config may come
    from an untrusted checkpoint.

    Args:
        key: the config key that names the network, for messages.
        value: the value of the key, `timm:<name>`.
        config: the config tree.
        options: arguments of `timm.create_model`; `MODEL.TIMM_ARGS` takes precedence over them.

    Raises:
        ValueError: timm has no such network, or the network does not take these arguments.
    """
    name, model = check_timm_name(key, value), config.MODEL
    rates = {
        'drop_rate': model.DROP_RATE or None,  # None is timm's default
        'attn_drop_rate': model.ATTN_DROP_RATE or None,
        'drop_path_rate': model.DROP_PATH_RATE,
    }
    options = rates | options | parse_timm_args(model.TIMM_ARGS)
    try:
        network = _create(name, options)
        if config.TRAIN.USE_CHECKPOINT:
            network.set_grad_checkpointing()
        return network
    except (TypeError, ValueError, AssertionError, LookupError, AttributeError, OSError) as error:
        given = ', '.join(f'{key}={value!r}' for key, value in options.items() if value is not None)
        raise ValueError(
            f'{key} {value} cannot be built with {given}: {error} (MODEL.TIMM_ARGS name=None leaves one out)'
        ) from error


def check_timm_name(key: str, value: str) -> str:
    """Return timm's name of a network.

    Args:
        key: the config key that names the network, for messages.
        value: the value of the key, `timm:<name>`.

    Raises:
        ValueError: timm has no such network.
    """
    name = value.removeprefix(PREFIX)
    if not _is_registered(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f': did you mean {PREFIX}{near[0]}?' if near else ', see timm.list_models()'
        raise ValueError(f'{key} is {value}: timm has no network of that name{hint}')
    return name


def _is_registered(name: str) -> bool:
    """Whether timm has a network of this name, with or without a tag; names with a source (`hf-hub:`) are refused."""
    return bool(timm.is_model(name) and re.fullmatch(r'[\w.]+', name))


def _has_fixed_size(name: str) -> bool:
    """Whether a network is built for one image size. Networks that a user has registered may have no timm config."""
    config = timm.get_pretrained_cfg(name)
    return config is not None and config.fixed_input_size


def _create(name: str, options: dict[str, Any]) -> nn.Module:
    """Create a network; leave out a drop-path rate of 0 if the network has no such argument."""
    options = options | {'pretrained': False}
    try:
        return timm.create_model(name, **options)
    except TypeError:
        if options['drop_path_rate']:
            raise
        return timm.create_model(name, **options | {'drop_path_rate': None})


def check_timm_network(config: 'CfgNode') -> None:
    """Check that timm can build the classifier of a config, without allocating its weights.

    Raises:
        ValueError: timm cannot build it, or `TRAIN.FROZEN_STAGES` or `TRAIN.RECOMPUTE_MLP` is set.
    """
    if config.TRAIN.FROZEN_STAGES != -1:
        raise ValueError('TRAIN.FROZEN_STAGES is for MODEL.TYPE msg: write -1')
    check_on_meta(config, build_timm_network)


def check_sizes(config: 'CfgNode') -> None:
    """Check that the network of a config can be trained on images of several sizes.

    Raises:
        ValueError: its weights, or its windows, are for one size.
    """
    name = config.MODEL.TYPE.removeprefix(PREFIX)
    if name == config.MODEL.TYPE:
        if config.MODEL.MSG.APE:
            raise ValueError('DATA.IMG_SIZES needs a network of any size: write MODEL.MSG.APE False')
        return
    arguments = parse_timm_args(config.MODEL.TIMM_ARGS)
    takes_any_size = arguments.get('dynamic_img_size') or not arguments.get('strict_img_size', True)
    if _has_fixed_size(name) and not takes_any_size:
        raise ValueError(
            f'DATA.IMG_SIZES needs a network of any size, and {name} has a fixed one: leave out DATA.IMG_SIZES, or, '
            f'for a network that has one of these arguments, write MODEL.TIMM_ARGS dynamic_img_size=True (vit_*) or '
            f'strict_img_size=False (swin_*)'
        )


def check_on_meta(config: 'CfgNode', build: Callable[..., nn.Module]) -> None:
    """Check that a network of timm can be built, on the meta device if the network supports it.

    Args:
        config: the config tree.
        build: called with the config tree.

    Raises:
        ValueError: the network cannot be built, or `TRAIN.RECOMPUTE_MLP` is set.
    """
    if config.TRAIN.RECOMPUTE_MLP:
        raise ValueError('TRAIN.RECOMPUTE_MLP is for MSG-Transformers: write False')
    try:
        with torch.device('meta'):
            build(config)
    except (RuntimeError, NotImplementedError):  # its constructor computes values, which the meta device does not have
        try:
            build(config)
        except RuntimeError as error:
            raise ValueError(f'the network of timm cannot be built: {error}') from error


def parse_timm_args(
    text: str,
    key: str = 'MODEL.TIMM_ARGS',
    reserved: Mapping[str, str] | None = None,
    example: str = 'embed_dim=96 depths=(2,2,6,2)',
) -> dict[str, Any]:
    """Parse `name=value` pairs separated by spaces, as in timm's `--model-kwargs`.

    Values are Python literals (`depths=(2,2,6,2)`, without spaces), or else strings.

    Args:
        text: the pairs.
        key: the config key whose value they are, for messages.
        reserved: names that must not be set, and what to write instead; None for `RESERVED`.
        example: pairs, for messages.

    Raises:
        ValueError: the text has another form, or sets a reserved name.
    """
    arguments, reserved = {}, RESERVED if reserved is None else reserved
    for pair in text.split():
        name, equals, value = pair.partition('=')
        if not (name.isidentifier() and equals):
            raise ValueError(f'{key} has {pair!r}: write name=value pairs: {example}')
        if name in reserved:
            raise ValueError(f'{key} has {name}: {reserved[name]}')
        try:
            arguments[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):  # the last two: thousands of open brackets
            arguments[name] = value
    return arguments


def shaping_args(text: str) -> str:
    """Keep the pairs of a checkpoint's `MODEL.TIMM_ARGS` that shape the network, and drop `RESERVED` ones.

    Checkpoints of older versions may have `pretrained=True`, which has no use here, and an untrusted checkpoint may
    have anything.
    """
    return ' '.join(pair for pair in text.split() if pair.partition('=')[0] not in RESERVED)
