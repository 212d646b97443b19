"""Networks by name, for `timm.create_model`: `msg_transformer_{tiny,small,base}`, `..._v2_...` and `..._nano`.

They take the arguments of `MSGTransformer` and of `timm.create_model`. Only `msg_transformer_nano` has pretrained
weights; the file is part of the package.
"""

from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, register_notrace_module
from torch import nn

from .layers import ConvStem, OverlapPatchMerging, PatchEmbed, PatchMerging
from .msg_block import MSGStage
from .msg_transformer import MSGTransformer

PUBLISHED = tuple(f'msg_transformer_{variant}{size}' for variant in ('', 'v2_') for size in ('tiny', 'small', 'base'))
NAMES = (*PUBLISHED, 'msg_transformer_nano')
V2 = {'embed_type': 'overlap', 'merge_type': 'overlap'}

# Classes of Imagenette, the dataset that msg_transformer_nano was trained on: WordNet ids and names
IMAGENETTE = {
    'n01440764': 'tench',
    'n02102040': 'English springer',
    'n02979186': 'cassette player',
    'n03000684': 'chain saw',
    'n03028079': 'church',
    'n03394916': 'French horn',
    'n03417042': 'garbage truck',
    'n03425413': 'gas pump',
    'n03445777': 'golf ball',
    'n03888257': 'parachute',
}


def _cfg(**options: Any) -> dict[str, Any]:
    """Create timm's pretrained config of a network."""
    return {
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
    } | options


default_cfgs = generate_default_cfgs(
    {name: _cfg() for name in PUBLISHED}
    | {
        'msg_transformer_nano.imagenette': _cfg(
            file=str(Path(__file__).parent / 'weights' / 'msg_transformer_nano.safetensors'),
            num_classes=len(IMAGENETTE),
            input_size=(3, 112, 112),
            label_names=tuple(IMAGENETTE),
            label_descriptions=IMAGENETTE,
            license='other',  # ImageNet's terms: research and education only
        )
    }
)

# torch.fx does not trace into these modules, which branch on the size of their input.
for module in (PatchEmbed, ConvStem, MSGStage, PatchMerging, OverlapPatchMerging):
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


@register_model
def msg_transformer_nano(pretrained: bool = False, **options: Any) -> nn.Module:
    """MSG-nano, which is not in the paper: three stages, convolutional stem, images of 112 px, 10 classes.

    The pretrained weights were trained on Imagenette: see models/weights/README.md.
    """
    architecture = {'embed_dim': 48, 'depths': (2, 3, 3), 'num_heads': (2, 4, 8), 'shuffle_size': (4, 2, 1)}
    layers = {'embed_type': 'conv', 'merge_type': 'overlap'}
    data = {'img_size': 112, 'num_classes': 10, 'drop_path_rate': 0.0}
    return _create('msg_transformer_nano', pretrained, architecture | layers | data | options)


def stored_weights() -> dict[str, Path]:
    """Find the files of the pretrained weights in the package, by network name."""
    files = {name: default_cfgs[name].default.file for name in default_cfgs}
    return {name: Path(file) for name, file in files.items() if file}


def _create(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    """Build a network through timm: sets `default_cfg`, loads weights, and handles `features_only`."""
    if options.get('embed_type') == 'conv':
        overlay = {'first_conv': 'patch_embed.convs.0.conv'} | (options.get('pretrained_cfg_overlay') or {})
        options = options | {'pretrained_cfg_overlay': overlay}
    return build_model_with_cfg(
        _build,
        name,
        pretrained,
        pretrained_filter_fn=_fit,
        feature_cfg={'feature_cls': 'getter', 'out_indices': tuple(range(len(options['depths'])))},
        **options,
    )


def _fit(weights: dict[str, torch.Tensor], model: MSGTransformer) -> dict[str, torch.Tensor]:
    """Fit the weights of a file to a network's shapes.

    timm loads the head only if `pretrained_cfg` and the network have the same number of classes. So the number of
    classes in the file is written to `pretrained_cfg`.
    """
    if 'head.weight' in weights:
        model.pretrained_cfg['num_classes'] = len(weights['head.weight'])
    return model.fit_state_dict(weights)[0]


def _build(
    device: torch.device | str | None = None, dtype: torch.dtype | None = None, **options: Any
) -> MSGTransformer:
    return MSGTransformer(**options).to(device=device, dtype=dtype)
