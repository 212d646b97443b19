"""A network from the config tree."""

from typing import Any

from torch import nn
from yacs.config import CfgNode

from models.msg_transformer import MSGTransformer


def build_model(config: CfgNode) -> nn.Module:
    """Build the network that `config.MODEL`, `DATA.IMG_SIZE` and `TRAIN.USE_CHECKPOINT` describe.

    Raises:
        ValueError: the sizes do not tile, the channels do not divide, or a type is unknown.
    """
    if config.MODEL.TYPE != 'msg':
        raise ValueError(f'MODEL.TYPE is {config.MODEL.TYPE!r}: write msg')
    msg = config.MODEL.MSG
    return MSGTransformer(
        img_size=config.DATA.IMG_SIZE,
        in_chans=msg.IN_CHANS,
        num_classes=config.MODEL.NUM_CLASSES,
        ape=msg.APE,
        **network_options(config),
    )


def network_options(config: CfgNode) -> dict[str, Any]:
    """The arguments of a network of any task, from `config.MODEL` and `TRAIN.USE_CHECKPOINT`; see `MSGTransformer`."""
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
        'use_checkpoint': config.TRAIN.USE_CHECKPOINT,
    }
