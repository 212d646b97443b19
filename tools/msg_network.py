"""MSG-Transformers from the config tree, for tools that look inside the network."""

from yacs.config import CfgNode

from engine.config_tree import ConfigError
from models import MSGTransformer, build_model


def build_msg_network(config: CfgNode) -> MSGTransformer:
    """Build the network described by `config`.

    Raises:
        ConfigError: it is not an MSG-Transformer.
    """
    if config.MODEL.TYPE != 'msg':
        raise ConfigError(f'MODEL.TYPE is {config.MODEL.TYPE}, and this tool is for MSG-Transformers')
    return build_model(config)


def build_with_msg_tokens(config: CfgNode) -> MSGTransformer:
    """Build the network described by `config`.

    Raises:
        ConfigError: it has no MSG tokens.
    """
    if not config.MODEL.MSG.MSG_TOKENS:
        raise ConfigError('this tool draws what MSG tokens do, and MODEL.MSG.MSG_TOKENS is False')
    return build_msg_network(config)
