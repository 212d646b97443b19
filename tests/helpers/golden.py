"""Golden records of the published network, and weights and inputs that depend on names and shapes alone.

Two networks with the same state-dict names and shapes hold the same weights after `fill_`.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from models import MSGTransformer

FIXTURES = Path(__file__).parent.parent / 'fixtures'
V2 = {'embed_type': 'overlap', 'merge_type': 'overlap'}
VERSIONS = {'v1': {}, 'v2': V2}


def golden(name: str) -> dict:
    """Values recorded from the published network."""
    return json.loads((FIXTURES / f'golden_{name}.json').read_text())


GOLDEN = {(version, size): record for version in VERSIONS for size, record in golden(version).items()}


def normal(name: str, shape) -> Tensor:
    """Standard-normal float32 values seeded by the name."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    return torch.from_numpy(rng.standard_normal(tuple(shape)).astype(np.float32))


@torch.no_grad()
def fill_(model: nn.Module) -> nn.Module:
    """Overwrite every floating-point entry of the state dict."""
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        value = normal(name, tensor.shape)
        if name.endswith(('relative_position_bias_table', 'rel_pos_msg')):
            value *= 0.5  # large enough that a wrong bias shows
        elif 'msg_tokens' in name or 'absolute_pos_embed' in name:
            pass
        elif name.endswith('running_var'):
            value = 1 + value**2
        elif '.norm' in name or '.bn.' in name or name.startswith('norm'):
            value = 0.1 * value + (1.0 if name.endswith('weight') else 0.0)
        elif name.endswith('bias'):
            value *= 0.1
        else:
            value /= np.sqrt(np.prod(tensor.shape[1:]) if tensor.ndim > 1 else 1)
        tensor.copy_(value)
    return model


def images(n: int, size: int, channels: int = 3) -> Tensor:
    """Images (n, channels, size, size)."""
    return normal(f'images-{n}-{channels}-{size}', (n, channels, size, size))


def labels(n: int, classes: int) -> Tensor:
    """Class indices (n,)."""
    return torch.arange(n) * 7 % classes


def golden_network(version: str, size: str) -> MSGTransformer:
    """The network behind a golden record, with its weights."""
    return fill_(MSGTransformer(drop_path_rate=0.0, **GOLDEN[version, size]['kwargs'], **VERSIONS[version]))


def micro(**options) -> MSGTransformer:
    """A network of three stages on 56-pixel images, with the narrow widths of the smallest record."""
    arguments = {
        'img_size': 56,
        'patch_size': 2,
        'num_classes': 10,
        'embed_dim': 16,
        'depths': (1, 2, 1),
        'num_heads': (1, 2, 4),
        'shuffle_size': (4, 2, 1),
        'drop_path_rate': 0.0,
    }
    return MSGTransformer(**arguments | options)


def assert_close(measured, recorded, relative=5e-6):
    """Assert equality within a fraction of the largest recorded value."""
    recorded = torch.as_tensor(recorded, dtype=torch.float64)
    difference = (torch.as_tensor(measured, dtype=torch.float64) - recorded).abs().max()
    assert difference <= relative * recorded.abs().max(), f'difference {difference:.3g}'
