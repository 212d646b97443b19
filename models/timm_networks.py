"""Networks of timm from the config tree: `MODEL.TYPE: timm:<name>`, `MODEL.TIMM_ARGS`."""

import ast
import difflib
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import nn

if TYPE_CHECKING:  # the installed package does without yacs
    from yacs.config import CfgNode

PREFIX = 'timm:'

# Arguments of timm that the config tree has, or that change what a classifier is
RESERVED = {
    'num_classes': 'MODEL.NUM_CLASSES',
    'in_chans': 'MODEL.MSG.IN_CHANS',
    'img_size': 'DATA.IMG_SIZE',
    'drop_path_rate': 'MODEL.DROP_PATH_RATE',
    'features_only': 'nothing: main.py trains classifiers',
    'checkpoint_path': '--pretrained with a state-dict file',
}


def build_timm_network(config: 'CfgNode', **overrides: Any) -> nn.Module:
    """Build the network that `MODEL.TYPE` names, with `MODEL.TIMM_ARGS`, for `DATA.IMG_SIZE` and `MODEL.NUM_CLASSES`.

    Args:
        config: the config tree.
        overrides: arguments that go before `MODEL.TIMM_ARGS`.

    Raises:
        ValueError: timm has no such network, or it does not take these arguments.
    """
    name, model = config.MODEL.TYPE.removeprefix(PREFIX), config.MODEL
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f': did you mean {PREFIX}{near[0]}?' if near else ', see timm.list_models()'
        raise ValueError(f'MODEL.TYPE is {model.TYPE}: timm has no network of that name{hint}')
    options: dict[str, Any] = {
        'in_chans': model.MSG.IN_CHANS,
        'num_classes': model.NUM_CLASSES,
        'drop_rate': model.DROP_RATE or None,  # None is timm's default
        'attn_drop_rate': model.ATTN_DROP_RATE or None,
        'drop_path_rate': model.DROP_PATH_RATE,
    }
    if timm.get_pretrained_cfg_value(name, 'fixed_input_size'):
        options['img_size'] = config.DATA.IMG_SIZE
    options |= parse_timm_args(model.TIMM_ARGS) | overrides
    try:
        network = _create(name, options)
        if config.TRAIN.USE_CHECKPOINT:
            network.set_grad_checkpointing()
    except (TypeError, ValueError, AssertionError, LookupError, AttributeError) as error:
        given = ', '.join(f'{key}={value!r}' for key, value in options.items() if value is not None)
        raise ValueError(f'MODEL.TYPE {model.TYPE} cannot be built with {given}: {error}') from error
    return network


def _create(name: str, options: dict[str, Any]) -> nn.Module:
    """Create a network; a drop-path rate of 0 is not passed to one that does not know any."""
    try:
        return timm.create_model(name, **options)
    except TypeError:
        if options['drop_path_rate']:
            raise
        return timm.create_model(name, **options | {'drop_path_rate': None})


def check_timm_network(config: 'CfgNode') -> None:
    """Refuse a network of timm that cannot be built, without its weights.

    Raises:
        ValueError: see `build_timm_network`.
    """
    for group, key, default in (('TRAIN', 'RECOMPUTE_MLP', False), ('TRAIN', 'FROZEN_STAGES', -1)):
        if config[group][key] != default:
            raise ValueError(f'{group}.{key} is for MODEL.TYPE msg: write {default}')
    try:
        with torch.device('meta'):
            build_timm_network(config, pretrained=False)
    except (RuntimeError, NotImplementedError):  # it computes while it is built, which it cannot on this device
        try:
            build_timm_network(config, pretrained=False)
        except RuntimeError as error:
            raise ValueError(f'MODEL.TYPE {config.MODEL.TYPE} cannot be built: {error}') from error


def parse_timm_args(text: str) -> dict[str, Any]:
    """Arguments from `name=value` pairs separated by spaces, as in timm's `--model-kwargs`.

    Values are Python's (`depths=(2,2,6,2)`, without spaces), else text.

    Raises:
        ValueError: the text is something else.
    """
    arguments = {}
    for pair in text.split():
        name, equals, value = pair.partition('=')
        if not (name.isidentifier() and equals):
            raise ValueError(f'MODEL.TIMM_ARGS has {pair!r}: write name=value pairs: embed_dim=96 depths=(2,2,6,2)')
        if name in RESERVED:
            raise ValueError(f'MODEL.TIMM_ARGS has {name}: write {RESERVED[name]}')
        try:
            arguments[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[name] = value
    return arguments
