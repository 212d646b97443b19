"""The network: `build_model(config)`, `MSGTransformer`, and by name: `timm.create_model('msg_transformer_tiny')`."""

from .build import build_model
from .exchange import Exchange, register_exchange
from .hub import save_for_hf
from .msg_transformer import MSGTransformer
from .registry import (
    msg_transformer_base,
    msg_transformer_nano,
    msg_transformer_small,
    msg_transformer_tiny,
    msg_transformer_v2_base,
    msg_transformer_v2_small,
    msg_transformer_v2_tiny,
)

__all__ = [
    'Exchange',
    'MSGTransformer',
    'build_model',
    'msg_transformer_base',
    'msg_transformer_nano',
    'msg_transformer_small',
    'msg_transformer_tiny',
    'msg_transformer_v2_base',
    'msg_transformer_v2_small',
    'msg_transformer_v2_tiny',
    'register_exchange',
    'save_for_hf',
]
