"""Folders that Hugging Face's `transformers` and timm load a classifier from, with its weights and its class names."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
from torch import nn

from .build import build_model, classifier_options
from .timm_networks import PREFIX, parse_timm_args

if TYPE_CHECKING:  # the installed package does not need yacs
    from yacs.config import CfgNode

# Arguments of a network that matter in training only
_TRAINING_ARGS = ('drop_rate', 'attn_drop_rate', 'drop_path_rate', 'use_checkpoint', 'recompute_mlp')


def save_for_hf(
    model: nn.Module,
    folder: str | Path,
    label_names: Sequence[str] = (),
    model_args: Mapping[str, Any] | None = None,
    data_config: Mapping[str, Any] | None = None,
    multi_label: bool = False,
) -> None:
    """Save a classifier as a folder for the Hugging Face hub: `config.json` and `model.safetensors`.

    `timm.create_model('local-dir:<folder>', pretrained=True)` and, after `import models`, transformers'
    `AutoModelForImageClassification.from_pretrained(<folder>)` load it.

    Args:
        model: a network from `timm.create_model`.
        folder: the folder to write.
        label_names: names of the classes, in order; those of the network's pretrained weights unless given.
        model_args: arguments that the network was created with, in addition to those that timm records.
        data_config: preprocessing in timm's terms, such as `input_size` and `crop_pct`, if it is not the default.
        multi_label: whether an image may have several classes, so that `transformers` gives a probability for each.

    Raises:
        ValueError: there are not as many names as classes.
    """
    names = list(label_names) or _own_label_names(model)
    if names and len(names) != model.num_classes:
        raise ValueError(f'label_names has {len(names)} names for {model.num_classes} classes: give a name for each')
    timm.models.save_for_hf(
        model,
        folder,
        model_config=({'label_names': names} if names else {})
        | ({'problem_type': 'multi_label_classification'} if multi_label else {}),
        model_args=dict(model_args or {}),
        safe_serialization=True,
        **({'data_config': dict(data_config)} if data_config else {}),
    )
    path = Path(folder) / 'config.json'
    config = json.loads(path.read_text(encoding='utf-8'))
    # Since timm 1.0.31, model_args repeats the number of classes, and transformers passes it a second time.
    config.get('model_args', {}).pop('num_classes', None)
    path.write_text(json.dumps(config, indent=2), encoding='utf-8')


def named_network(config: 'CfgNode') -> nn.Module:
    """Build the network that `build_model` builds, through `timm.create_model`, as `save_for_hf` needs it."""
    if config.MODEL.TYPE.startswith(PREFIX):
        return build_model(config)
    return timm.create_model('msg_transformer_tiny', **named_network_args(config))


def named_network_args(config: 'CfgNode') -> dict[str, Any]:
    """Get the arguments of `named_network` that shape the network."""
    if config.MODEL.TYPE.startswith(PREFIX):
        return parse_timm_args(config.MODEL.TIMM_ARGS)
    return {name: value for name, value in classifier_options(config).items() if name not in _TRAINING_ARGS}


def _own_label_names(model: nn.Module) -> list[str]:
    """Names of the classes of a network's pretrained weights, in words where they have some."""
    cfg = model.pretrained_cfg
    if model.num_classes != cfg.get('num_classes'):
        return []
    words = cfg.get('label_descriptions') or {}
    return [words.get(name, name) for name in cfg.get('label_names') or ()]
