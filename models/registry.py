"""The networks by name, for `timm.create_model`: `msg_transformer_{tiny,small,base}`, `msg_transformer_v2_...`.

Their arguments are those of `MSGTransformer`, and `timm.create_model`'s own. There are no pretrained weights.
"""

from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, register_notrace_module
from torch import nn

from .layers import OverlapPatchMerging, PatchEmbed, PatchMerging
from .msg_block import MSGStage
from .msg_transformer import MSGTransformer

NAMES = tuple(f'msg_transformer_{variant}{size}' for variant in ('', 'v2_') for size in ('tiny', 'small', 'base'))
V2 = {'embed_type': 'overlap', 'merge_type': 'overlap'}

default_cfgs = generate_default_cfgs(
    {
        name: {
            'num_classes': 1000,
            'input_size': (3, 224, 224),
            'fixed_input_size': False,
            'pool_size': (1, 1),
            'crop_pct': 0.875,
            'interpolation': 'bicubic',
            'mean': IMAGENET_DEFAULT_MEAN,
            'std': IMAGENET_DEFAULT_STD,
            'first_conv': 'patch_embed.proj',
            'classifier': 'head',
            'license': 'apache-2.0',
            'paper_ids': 'arXiv:2105.15168',
            'paper_name': 'MSG-Transformer: Exchanging Local Spatial Information by Manipulating Messenger Tokens',
        }
        for name in NAMES
    }
)

# Modules that branch on the size of their input: one node each where torch.fx traces the network.
for module in (PatchEmbed, MSGStage, PatchMerging, OverlapPatchMerging):
    register_notrace_module(module)


@register_model
def msg_transformer_tiny(pretrained: bool = False, **options: Any) -> nn.Module:
    """MSG-T, version 1."""
    architecture = {'embed_dim': 96, 'depths': (2, 2, 6, 2), 'num_heads': (3, 6, 12, 24)}
    return _create('msg_transformer_tiny', pretrained, architecture | options)


@register_model
def msg_transformer_small(pretrained: bool = False, **options: Any) -> nn.Module:
    """MSG-S, version 1."""
    architecture = {'embed_dim': 96, 'depths': (2, 2, 18, 2), 'num_heads': (3, 6, 12, 24)}
    return _create('msg_transformer_small', pretrained, architecture | options)


@register_model
def msg_transformer_base(pretrained: bool = False, **options: Any) -> nn.Module:
    """MSG-B, version 1."""
    architecture = {'embed_dim': 128, 'depths': (2, 2, 18, 2), 'num_heads': (4, 8, 16, 32)}
    return _create('msg_transformer_base', pretrained, architecture | options)


@register_model
def msg_transformer_v2_tiny(pretrained: bool = False, **options: Any) -> nn.Module:
    """MSG-T, version 2: overlapping patch embedding and merging."""
    architecture = {'embed_dim': 64, 'depths': (2, 4, 12, 4), 'num_heads': (2, 4, 8, 16)}
    return _create('msg_transformer_v2_tiny', pretrained, architecture | V2 | options)


@register_model
def msg_transformer_v2_small(pretrained: bool = False, **options: Any) -> nn.Module:
    """MSG-S, version 2."""
    architecture = {'embed_dim': 96, 'depths': (2, 4, 12, 4), 'num_heads': (3, 6, 12, 24)}
    return _create('msg_transformer_v2_small', pretrained, architecture | V2 | options)


@register_model
def msg_transformer_v2_base(pretrained: bool = False, **options: Any) -> nn.Module:
    """MSG-B, version 2."""
    architecture = {'embed_dim': 96, 'depths': (2, 4, 28, 4), 'num_heads': (3, 6, 12, 24)}
    return _create('msg_transformer_v2_base', pretrained, architecture | V2 | options)


def _create(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    """Build a network as timm does: with its `default_cfg`, and as a feature extractor with `features_only`."""
    return build_model_with_cfg(
        _build,
        name,
        pretrained,
        pretrained_filter_fn=lambda weights, model: model.fit_state_dict(weights)[0],
        feature_cfg={'feature_cls': 'getter', 'out_indices': tuple(range(len(options['depths'])))},
        **options,
    )


def _build(
    device: torch.device | str | None = None, dtype: torch.dtype | None = None, **options: Any
) -> MSGTransformer:
    return MSGTransformer(**options).to(device=device, dtype=dtype)
