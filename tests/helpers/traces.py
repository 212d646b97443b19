"""Small networks for the tools that explain networks, and traces of random images."""

import torch
from torch import nn

from models import MSGTransformer
from tools.visualize.explain import trace_blocks

OPTIONS = {
    'img_size': 32,
    'patch_size': 2,
    'embed_dim': 16,
    'num_classes': 3,
    'window_size': 2,
    'depths': (3, 2),
    'num_heads': (1, 2),
    'shuffle_size': (2, 2),
}


def build(**options):
    """A network of two stages with weights large enough that everything depends visibly on all that it can reach."""
    model = MSGTransformer(**(OPTIONS | options)).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.2)
    return model


def trace(model, height=32, width=32):
    """The trace of a random image."""
    return trace_blocks(model, torch.randn(1, model.in_chans, height, width))
