"""The networks for `torch.hub.load(<repository or folder>, 'msg_transformer_tiny', num_classes=...)`."""

import importlib.util
import pathlib
import sys

dependencies = ['torch', 'timm']


def _load_package():
    """Import `models/` as `msg_transformer`, since the caller may have its own module `models`."""
    path = pathlib.Path(__file__).with_name('models') / '__init__.py'
    loaded = sys.modules.get('msg_transformer')
    if loaded is not None and loaded.__file__ == str(path):
        return loaded
    spec = importlib.util.spec_from_file_location('msg_transformer', path)
    package = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = package
    try:
        spec.loader.exec_module(package)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return package


_package = _load_package()

msg_transformer_nano = _package.msg_transformer_nano
msg_transformer_tiny = _package.msg_transformer_tiny
msg_transformer_small = _package.msg_transformer_small
msg_transformer_base = _package.msg_transformer_base
msg_transformer_v2_tiny = _package.msg_transformer_v2_tiny
msg_transformer_v2_small = _package.msg_transformer_v2_small
msg_transformer_v2_base = _package.msg_transformer_v2_base
