"""Backbones: images of any size in, one feature map per level out, at strides 4, 8, 16, 32 or the like."""

import contextlib
import re
import sys
from collections import OrderedDict
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from models import MSGTransformer
from models.build import check_msg_network, head_pattern, network_options
from models.symbolic import contiguous_copy
from models.timm_networks import PREFIX, check_on_meta, create_timm_network

# Strides of the feature maps that are taken from timm's networks, in pixels
STRIDES = (4, 8, 16, 32)


class Backbone(Protocol):
    """Interface of a detector's backbone, which is a module.

    Attributes:
        out_channels: channels of each feature map, finest first.
        strides: stride of each feature map, in pixels.
    """

    out_channels: list[int]
    strides: list[int]

    def __call__(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Images (B, 3, height, width) to feature maps (B, C, H, W), finest first, named '0', '1', ..."""

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay."""

    def no_weight_decay_keywords(self) -> set[str]:
        """Parts of names of parameters without weight decay."""

    def fit_state_dict(self, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Fit weights of the same backbone with other window sizes; returns them and notes on what was done."""

    def fit_classifier(self, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Convert a classifier's weights to this backbone's names, with its own norms; returns them and notes."""

    def freeze_stages(self, count: int) -> None:
        """Freeze the embedding and the first `count` stages; -1 freezes nothing."""


class MSGBackbone(MSGTransformer):
    """The network without its head, and a norm for each stage's feature map.

    `norm`, for the last feature map, is the classifier's; `out_norms`, for the others, are new.

    Args:
        **options: of `MSGTransformer`, but for the image size, the classes and `ape`.
    """

    def __init__(self, **options: Any):
        super().__init__(img_size=None, num_classes=0, **options)
        self.out_channels = [info['num_chs'] for info in self.feature_info]
        self.strides = [info['reduction'] for info in self.feature_info]
        self.out_norms = nn.ModuleList(type(self.norm)(channels) for channels in self.out_channels[:-1])

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Images (B, 3, height, width) to feature maps (B, C, H, W), finest first, named '0', '1', ..."""
        feature_maps = self.forward_intermediates(images, output_fmt='NHWC', intermediates_only=True)
        normed = [norm(x) for norm, x in zip((*self.out_norms, self.norm), feature_maps, strict=True)]
        return OrderedDict((str(i), contiguous_copy(x.permute(0, 3, 1, 2))) for i, x in enumerate(normed))

    def fit_classifier(self, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """A classifier's weights without its head, fitted to the windows, and this backbone's own `out_norms`."""
        fitted, notes = self.fit_state_dict({k: x for k, x in weights.items() if not k.startswith('head.')})
        return fitted | _out_norms(self), notes


class TimmBackbone(nn.Module):
    """A network of timm, without its head and what else comes after the last feature map.

    Networks with layer norms get a norm for each feature map, as Swin has for detection; those with batch norms do not.

    Args:
        config: the config tree; `MODEL.BACKBONE`, `MODEL.TIMM_ARGS`, drop rates and `TRAIN.USE_CHECKPOINT` are read.

    Raises:
        ValueError: timm has no such network, or not with these options, or not with these strides.
    """

    def __init__(self, config: CfgNode):
        super().__init__()
        features = _create_features(config)
        self.model, info = features.model, features.feature_info
        reductions = info.reduction()
        if set(STRIDES) - set(reductions):
            raise ValueError(
                f'MODEL.BACKBONE {config.MODEL.BACKBONE} has feature maps of strides {reductions}: '
                f'choose a network that has {list(STRIDES)}'
            )
        last = [len(reductions) - 1 - reductions[::-1].index(stride) for stride in STRIDES]
        self.indices = [features.out_indices[i] for i in last]
        self.strides, self.out_channels = list(STRIDES), [info.channels()[i] for i in last]
        self.stages = [info.module_name()[i] for i in last]
        self.has_batch_norm = any(isinstance(module, nn.BatchNorm2d) for module in self.model.modules())
        self.out_norms = nn.ModuleList(() if self.has_batch_norm else map(nn.LayerNorm, self.out_channels))
        self.frozen: tuple[nn.Module, ...] = ()

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Images (B, 3, height, width) to feature maps (B, C, H, W), finest first, named '0', '1', ..."""
        maps = self.model.forward_intermediates(images, indices=self.indices, intermediates_only=True)
        for i, norm in enumerate(self.out_norms):
            maps[i] = norm(maps[i].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return OrderedDict((str(i), x.contiguous()) for i, x in enumerate(maps))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay: those that timm's network names."""
        names = self.model.no_weight_decay() if hasattr(self.model, 'no_weight_decay') else ()
        return {f'model.{name}' for name in names}

    def no_weight_decay_keywords(self) -> set[str]:
        """Parts of names of parameters without weight decay: none."""
        return set()

    def fit_state_dict(self, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """The weights as they are."""
        return weights, []

    def fit_classifier(self, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """A classifier's weights under the names of this backbone, and its own `out_norms`.

        timm's own function for the architecture converts the names of other programs, where it has one.
        """
        own, notes = self.model.state_dict(), []
        if not own.keys() <= weights.keys():
            convert = getattr(sys.modules[type(self.model).__module__], 'checkpoint_filter_fn', None)
            with contextlib.suppress(LookupError, AttributeError):  # unknown names, which loading will report
                weights = convert(weights, self.model) if convert else weights
        head = re.compile(head_pattern(self.model))
        theirs = {name: x for name, x in weights.items() if not head.match(name)}
        unused = [name for name in theirs if name not in own]
        if unused:
            notes.append(f'{len(unused)} weights after the last feature map are not used: {", ".join(unused[:3])}')
        fitted = {f'model.{name}': x for name, x in theirs.items() if name in own}
        return fitted | _out_norms(self), notes

    def freeze_stages(self, count: int) -> None:
        """Freeze the stem and the first stages. Build optimizers and DDP afterwards.

        Args:
            count: 0 for the stem; n for the first n stages too; -1 for nothing.

        Raises:
            ValueError: there are fewer stages.
        """
        if count > len(self.stages):
            raise ValueError(f'{count} stages cannot be frozen: the network has {len(self.stages)}')
        if count < 0:
            return
        names = [name for name, _ in self.model.named_parameters()]  # in the order of the forward pass
        prefix = f'{self.stages[max(count - 1, 0)]}.'
        inside = [i for i, name in enumerate(names) if name.startswith(prefix)]
        if not inside:
            raise ValueError(f'stages of {type(self.model).__name__} cannot be frozen: {prefix[:-1]} has no parameters')
        end = inside[-1] + 1 if count else inside[0]
        frozen = {parameter for _, parameter in list(self.model.named_parameters())[:end]}
        for parameter in frozen:
            parameter.requires_grad_(False)
        parents = ((module, set(module.parameters())) for module in self.model.modules())
        _keep_in_eval_mode(self, [module for module, parameters in parents if parameters and parameters <= frozen])

    def train(self, mode: bool = True) -> 'TimmBackbone':
        """Switch to training mode, except for frozen modules, or to evaluation mode."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self


def build_backbone(config: CfgNode) -> Backbone:
    """Build the backbone that `MODEL.BACKBONE` names.

    Args:
        config: the config tree.

    Raises:
        ValueError: see `MSGTransformer` and `TimmBackbone`.
    """
    if config.MODEL.BACKBONE.startswith(PREFIX):
        return TimmBackbone(config)
    return MSGBackbone(**network_options(config))


def check_backbone(config: CfgNode) -> None:
    """Check, without allocating weights, that a backbone can be built and takes images of any size.

    Raises:
        ValueError: see `build_backbone`.
    """
    if config.MODEL.BACKBONE.startswith(PREFIX):

        def build_and_run(config: CfgNode) -> None:
            backbone = TimmBackbone(config)
            _check_frozen_stages(backbone, config)
            try:
                backbone(torch.empty(2, 3, 7 * STRIDES[-1], 9 * STRIDES[-1]))  # batch norms refuse one, if pooled
            except NotImplementedError:  # on this device
                pass
            except (AssertionError, RuntimeError) as error:
                raise ValueError(
                    f'MODEL.BACKBONE {config.MODEL.BACKBONE} does not take images of any size: {error}'
                ) from error

        check_on_meta(config, build_and_run)
        return
    if len(config.MODEL.MSG.DEPTHS) != 4:
        raise ValueError(f'MODEL.MSG.DEPTHS is {config.MODEL.MSG.DEPTHS}: write four, one per level of the pyramid')
    check_msg_network(config, img_size=None, key='MODEL.BACKBONE')
    patch = config.MODEL.MSG.PATCH_SIZE
    if patch & (patch - 1):
        raise ValueError(f'MODEL.MSG.PATCH_SIZE is {patch}: write a power of 2, like the strides of the pyramid')
    if config.TRAIN.FROZEN_STAGES >= 0:
        with torch.device('meta'):
            _check_frozen_stages(build_backbone(config), config)


def _check_frozen_stages(backbone: Backbone, config: CfgNode) -> None:
    try:
        backbone.freeze_stages(config.TRAIN.FROZEN_STAGES)
    except ValueError as error:
        raise ValueError(f'TRAIN.FROZEN_STAGES is {config.TRAIN.FROZEN_STAGES}: {error}') from error


def freeze_batch_norms(backbone: Backbone) -> int:
    """Freeze the batch norms of a backbone, and return their number."""
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm)]
    for norm in norms:
        norm.requires_grad_(False)
    _keep_in_eval_mode(backbone, norms)
    return len(norms)


def _keep_in_eval_mode(backbone: Backbone, modules: list[nn.Module]) -> None:
    for module in modules:
        module.eval()
    backbone.frozen = (*backbone.frozen, *modules)


def _create_features(config: CfgNode) -> nn.Module:
    """Timm's feature extractor; networks of fixed image sizes, such as Swin, with the options that lift the limit."""
    any_size = [{'strict_img_size': False, 'always_partition': True}, {'strict_img_size': False}]
    for options in any_size:
        try:
            return _features(config, options)
        except ValueError:  # it does not know the option
            continue
    return _features(config, {})


def _features(config: CfgNode, options: dict[str, Any]) -> nn.Module:
    options = {'features_only': True, 'feature_cls': 'getter'} | options
    return create_timm_network('MODEL.BACKBONE', config.MODEL.BACKBONE, config, options)


def _out_norms(backbone: Backbone) -> dict[str, Tensor]:
    """The backbone's weights of the norms that a classifier does not have."""
    return {name: x for name, x in backbone.state_dict().items() if name.startswith('out_norms.')}
