"""The network: `build_model(config)` and `MSGTransformer`."""

from models.build import build_model
from models.msg_transformer import MSGTransformer

__all__ = ['MSGTransformer', 'build_model']
