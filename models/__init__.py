"""The network: `build_model(config)` and `MSGTransformer`."""

from .build import build_model
from .msg_transformer import MSGTransformer

__all__ = ['MSGTransformer', 'build_model']
