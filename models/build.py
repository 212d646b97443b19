"""Build the network from the config tree."""

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .exchange import stage_exchanges
from .layers import conv_stem_channels
from .msg_transformer import MSGTransformer
from .pyramid import Size, plan_pyramid
from .timm_networks import PREFIX, build_timm_network, check_timm_network

if TYPE_CHECKING:  # the installed package does not need yacs
    from yacs.config import CfgNode


def build_model(config: 'CfgNode') -> nn.Module:
    """Build the network described by `config.MODEL`, `DATA.IMG_SIZE` and `TRAIN`.

    Raises:
        ValueError: see `MSGTransformer` and `build_timm_network`.
    """
    if config.MODEL.TYPE.startswith(PREFIX):
        return build_timm_network(config)
    return MSGTransformer(**classifier_options(config))


def classifier_options(config: 'CfgNode') -> dict[str, Any]:
    """Get the arguments of `MSGTransformer` for classification, from `config.MODEL`, `DATA.IMG_SIZE` and `TRAIN`."""
    msg = config.MODEL.MSG
    return {
        'img_size': config.DATA.IMG_SIZE,
        'in_chans': msg.IN_CHANS,
        'num_classes': config.MODEL.NUM_CLASSES,
        'ape': msg.APE,
        'head_tokens': msg.HEAD_TOKENS,
        **network_options(config),
    }


def maybe_compile(network: nn.Module, config: 'CfgNode', enabled: bool) -> nn.Module:
    """Compile a network if `enabled`, in `config.COMPILE_MODE`; compilation runs at the first batch of each shape."""
    return torch.compile(network, mode=config.COMPILE_MODE, dynamic=False) if enabled else network


def network_options(config: 'CfgNode') -> dict[str, Any]:
    """Get the arguments of `MSGTransformer` that all tasks share, from `config.MODEL` and `TRAIN`."""
    msg = config.MODEL.MSG
    return {
        'patch_size': msg.PATCH_SIZE,
        'embed_dim': msg.EMBED_DIM,
        'depths': msg.DEPTHS,
        'num_heads': msg.NUM_HEADS,
        'window_size': msg.WINDOW_SIZE,
        'mlp_ratio': msg.MLP_RATIO,
        'qkv_bias': msg.QKV_BIAS,
        'qk_scale': msg.QK_SCALE,
        'drop_rate': config.MODEL.DROP_RATE,
        'attn_drop_rate': config.MODEL.ATTN_DROP_RATE,
        'drop_path_rate': config.MODEL.DROP_PATH_RATE,
        'patch_norm': msg.PATCH_NORM,
        'shuffle_size': msg.SHUF_SIZE,
        'manip_type': msg.MANIP_TYPE,
        'embed_type': msg.EMBED_TYPE,
        'merge_type': msg.MERGE_TYPE,
        'use_msg_tokens': msg.MSG_TOKENS,
        'use_checkpoint': config.TRAIN.USE_CHECKPOINT,
        'recompute_mlp': config.TRAIN.RECOMPUTE_MLP,
    }


def check_network(config: 'CfgNode', img_size: int) -> None:
    """Check that the network described by `config.MODEL` can be built, without allocating its weights.

    Args:
        config: the config tree.
        img_size: image size in pixels.

    Raises:
        ValueError: see `check_msg_network` and `build_timm_network`.
    """
    if config.MODEL.TYPE.startswith(PREFIX):
        check_timm_network(config)
        return
    check_msg_network(config, img_size)


def check_msg_network(config: 'CfgNode', img_size: int | None, key: str = 'MODEL.TYPE') -> None:
    """Check that the MSG-Transformer described by `config.MODEL.MSG` can be built, without building it.

    Args:
        config: the config tree.
        img_size: image size in pixels; None for images of any size.
        key: the config key that names the network, for messages.

    Raises:
        ValueError: the network cannot be built (see `plan_pyramid`), or `MODEL.TIMM_ARGS` is not empty.
    """
    if config.MODEL.TIMM_ARGS:
        raise ValueError(f'MODEL.TIMM_ARGS is for networks of timm: write {key} timm:<name>, or no arguments')
    msg = config.MODEL.MSG
    try:
        if msg.EMBED_TYPE == 'conv':
            conv_stem_channels(msg.PATCH_SIZE, msg.EMBED_DIM)
        exchanges = stage_exchanges(msg.MANIP_TYPE, len(msg.DEPTHS))
        plan_pyramid(
            None if img_size is None else Size(img_size, img_size),
            msg.PATCH_SIZE,
            msg.WINDOW_SIZE,
            msg.EMBED_DIM,
            msg.DEPTHS,
            msg.NUM_HEADS,
            msg.SHUF_SIZE,
            [exchange.channel_multiple for exchange in exchanges] if msg.MSG_TOKENS else None,
        )
    except ValueError as error:
        raise ValueError(f'MODEL.MSG: {error}') from error


def head_pattern(model: nn.Module) -> str:
    """Regular expression for the prefix of the classifier's weights, whose shapes depend on the number of classes."""
    names = getattr(model, 'pretrained_cfg', {}).get('classifier', 'head')
    return '|'.join(rf'{re.escape(name)}\.' for name in ([names] if isinstance(names, str) else names))
