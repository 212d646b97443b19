"""Weights and inputs that depend on names and shapes alone, so that recorded figures need no weight file.

Two networks with the same state-dict names and shapes hold the same weights after `fill_`.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

FIXTURES = Path(__file__).parent / 'fixtures'


def golden(name: str) -> dict:
    """Figures recorded from the published network."""
    return json.loads((FIXTURES / f'golden_{name}.json').read_text())


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
        elif '.norm' in name or name.startswith('norm'):
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
