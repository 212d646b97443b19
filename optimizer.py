"""The optimizer, with the published weight-decay groups."""

import torch
from timm.models import group_parameters
from torch import nn
from torch.optim import Optimizer
from yacs.config import CfgNode


def build_optimizer(
    config: CfgNode,
    model: nn.Module,
    lr: float | None = None,
    decay_biases: bool = False,
    layer_decay: float = 1.0,
) -> Optimizer:
    """Build AdamW or SGD over two groups, parameters with weight decay and without, each in the network's order.

    Args:
        config: the config tree; `TRAIN` is read.
        model: the network, not wrapped, since parameter names decide.
        lr: peak learning rate; None for `TRAIN.BASE_LR`, unscaled.
        decay_biases: see `weight_decay_groups`.
        layer_decay: below 1, learning rates decay layer by layer: see `layer_decay_groups`.

    Raises:
        ValueError: an unknown `TRAIN.OPTIMIZER.NAME`.
    """
    options = config.TRAIN.OPTIMIZER
    lr = config.TRAIN.BASE_LR if lr is None else lr
    groups = weight_decay_groups(model, config.TRAIN.WEIGHT_DECAY, decay_biases)
    if layer_decay < 1:
        groups = layer_decay_groups(model, groups, layer_decay)
    fused = next(model.parameters()).device.type in ('cuda', 'cpu')  # one kernel, which can skip on the device
    if options.NAME == 'adamw':
        return torch.optim.AdamW(groups, lr=lr, eps=options.EPS, betas=tuple(options.BETAS), fused=fused)
    if options.NAME == 'sgd':
        nesterov = options.MOMENTUM > 0
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=options.MOMENTUM, nesterov=nesterov, fused=fused)
        if fused and nesterov:  # or a first update that is skipped would leave the buffers uninitialized
            for parameter in (p for group in groups for p in group['params']):
                optimizer.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)
        return optimizer
    raise ValueError(f'TRAIN.OPTIMIZER.NAME is {options.NAME!r}: write adamw or sgd')


def weight_decay_groups(model: nn.Module, weight_decay: float, decay_biases: bool = False) -> list[dict]:
    """Two parameter groups: with weight decay, and without.

    Vectors and biases are not decayed, nor what the network names in `no_weight_decay` (whole names) and
    `no_weight_decay_keywords` (parts of names).

    Args:
        model: the network, not wrapped.
        weight_decay: weight decay of the first group.
        decay_biases: decay the biases of linears and convolutions too, but not the vectors of norms.
    """
    names = model.no_weight_decay() if hasattr(model, 'no_weight_decay') else set()
    keywords = model.no_weight_decay_keywords() if hasattr(model, 'no_weight_decay_keywords') else set()
    matmuls = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    biases = {id(module.bias) for module in model.modules() if decay_biases and isinstance(module, matmuls)}
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_exempt = (parameter.ndim <= 1 or name.endswith('.bias')) and id(parameter) not in biases
        is_exempt = is_exempt or name in names or any(keyword in name for keyword in keywords)
        (no_decay if is_exempt else decay).append(parameter)
    return [{'params': decay, 'weight_decay': weight_decay}, {'params': no_decay, 'weight_decay': 0.0}]


def layer_decay_groups(model: nn.Module, groups: list[dict], layer_decay: float) -> list[dict]:
    """Split parameter groups by layer: the embedding, each block, and the head.

    Args:
        model: the network, not wrapped. Its `group_matcher` tells the layers.
        groups: from `weight_decay_groups`.
        layer_decay: ratio of a layer's learning rate to the next one's, that of the head being 1.

    Returns:
        Groups with an `lr_scale`, which timm's schedulers multiply the learning rate by.
    """
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    names = {parameter: name for name, parameter in model.named_parameters()}
    last = max(layers.values())
    by_layer = {}
    for i, group in enumerate(groups):
        for parameter in group['params']:
            layer = layers[names[parameter]]
            new = {**group, 'lr_scale': layer_decay ** (last - layer), 'params': []}
            by_layer.setdefault((layer, i), new)['params'].append(parameter)
    return [by_layer[key] for key in sorted(by_layer)]
