"""Build the optimizer: AdamW, SGD or an optimizer of timm, with the published weight-decay groups."""

import difflib
import textwrap
from typing import Any

import torch
from timm.models import group_parameters
from timm.optim import get_optimizer_class, get_optimizer_info, list_optimizers
from timm.optim.kron import Kron
from timm.optim.muon import Muon
from torch import nn
from torch.optim import Optimizer
from yacs.config import CfgNode

from models.timm_networks import parse_timm_args

# Defaults of TRAIN.OPTIMIZER.EPS and BETAS, for AdamW; at these, other optimizers have their own defaults.
ADAMW_EPS, ADAMW_BETAS = 1e-8, (0.9, 0.999)

# Arguments that TRAIN.OPTIMIZER.ARGS must not set
RESERVED = {
    'params': 'leave it out: the network has them',
    'lr': 'write TRAIN.BASE_LR',
    'weight_decay': 'write TRAIN.WEIGHT_DECAY',
    'momentum': 'write TRAIN.OPTIMIZER.MOMENTUM',
} | dict.fromkeys(('fused', 'capturable', 'differentiable', 'maximize'), 'leave it out: the program sets it')


def build_optimizer(
    config: CfgNode,
    model: nn.Module,
    lr: float | None = None,
    decay_biases: bool = False,
    layer_decay: float = 1.0,
) -> Optimizer:
    """Build the optimizer, with a parameter group that has weight decay and one that has none.

    Args:
        config: the config tree; `TRAIN` is read.
        model: the network, not wrapped in DDP: parameter names decide about weight decay.
        lr: peak learning rate; None for `TRAIN.BASE_LR`, unscaled.
        decay_biases: see `weight_decay_groups`.
        layer_decay: below 1, learning rates decay layer by layer: see `layer_decay_groups`.

    Raises:
        ValueError: `TRAIN.OPTIMIZER` names an optimizer that does not exist or cannot be used.
    """
    options = config.TRAIN.OPTIMIZER
    lr = config.TRAIN.BASE_LR if lr is None else lr
    groups = weight_decay_groups(model, config.TRAIN.WEIGHT_DECAY, decay_biases)
    if options.NAME in list_optimizers() and get_optimizer_info(options.NAME).opt_class is Muon:
        groups[1]['use_fallback'] = True  # AdamW: position-bias tables are 2-D, but not matrices in Muon's sense
    if layer_decay < 1:
        groups = layer_decay_groups(model, groups, layer_decay)
    arguments = parse_timm_args(options.ARGS, 'TRAIN.OPTIMIZER.ARGS', RESERVED, 'amsgrad=True betas=(0.9,0.95)')
    fused = next(model.parameters()).device.type in (
        'cuda',
        'cpu',
    )  # one kernel, which can skip on the device
    if options.NAME == 'adamw':
        arguments = {'eps': options.EPS, 'betas': tuple(options.BETAS), 'fused': fused} | arguments
        return torch.optim.AdamW(groups, lr=lr, **arguments)
    if options.NAME == 'sgd':
        arguments = {'nesterov': options.MOMENTUM > 0, 'fused': fused} | arguments
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=options.MOMENTUM, **arguments)
        if fused and options.MOMENTUM > 0:  # or a first update that is skipped would leave the buffers uninitialized
            for parameter in (p for group in groups for p in group['params']):
                optimizer.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)
        return optimizer
    reason = unsupported_reason(options.NAME)
    if reason:
        raise ValueError(f'TRAIN.OPTIMIZER.NAME is {options.NAME!r}: {reason}')
    return get_optimizer_class(options.NAME)(groups, lr=lr, **timm_options(config) | arguments)


def timm_options(config: CfgNode) -> dict[str, Any]:
    """Keyword arguments for an optimizer of timm, from `TRAIN.OPTIMIZER`.

    EPS and BETAS are passed only if they differ from AdamW's defaults.
    """
    options = config.TRAIN.OPTIMIZER
    info = get_optimizer_info(options.NAME)
    arguments = {}
    if info.has_momentum:
        arguments['momentum'] = options.MOMENTUM
    if info.has_eps and options.EPS != ADAMW_EPS:
        arguments['eps'] = options.EPS
    if info.has_betas and tuple(options.BETAS) != ADAMW_BETAS:
        arguments['betas'] = tuple(options.BETAS)
    return arguments


def unsupported_reason(name: str) -> str:
    """Reason why an optimizer is not supported, with a suggestion; empty if it is supported."""
    if name not in list_optimizers():
        near = difflib.get_close_matches(name.lower(), usable_optimizers(), n=1)
        return f'timm has no optimizer of that name: {f"did you mean {near[0]}?" if near else f"write {_EXAMPLES}"}'
    info = get_optimizer_info(name)
    if isinstance(info.opt_class, str):
        return f'it needs a GPU and {info.opt_class.partition(".")[0]}, which is not supported: write {_EXAMPLES}'
    if info.second_order:
        return f'it needs second-order gradients, which training does not compute: write {_EXAMPLES}'
    if info.opt_class is Kron:  # it draws from its own generators, which its state dict does not contain
        return f'its random numbers are not in its state, so no run could resume exactly: write {_EXAMPLES}'
    return ''


_EXAMPLES = 'adamw, sgd, or another one of timm.optim.list_optimizers(), such as lamb, lion, adan or muon'


def usable_optimizers() -> list[str]:
    """Names of the optimizers that can be used, as timm spells them."""
    return [name for name in list_optimizers() if not unsupported_reason(name)]


def optimizers_with(option: str) -> list[str]:
    """Names of the optimizers that can be used and take an option: `eps`, `betas` or `momentum`; AdamW or SGD first."""
    names = [name for name in usable_optimizers() if getattr(get_optimizer_info(name), f'has_{option}')]
    return sorted(names, key=lambda name: (name not in ('adamw', 'sgd'), name))


def check_optimizer(config: CfgNode) -> None:
    """Check that the optimizer of a config can be built and makes an update, on a small parameter.

    Raises:
        ValueError: the optimizer cannot be built, does not make an update, or is not supported.
    """
    options = config.TRAIN.OPTIMIZER
    if options.NAME in ('adamw', 'sgd') and not options.ARGS:  # always works; PyTorch imports much at the first update
        return
    model = nn.ParameterDict({'weight': nn.Parameter(torch.ones(64, 64)), 'bias': nn.Parameter(torch.ones(64))})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    try:
        build_optimizer(config, model).step()
    except Exception as error:  # arguments may have any value, so errors have any type
        if isinstance(error, ValueError) and str(error).startswith('TRAIN.OPTIMIZER.'):
            raise
        given = ({} if options.NAME in ('adamw', 'sgd') else timm_options(config)) | {'ARGS': options.ARGS}
        given = ', '.join(f'{name} {value}' for name, value in given.items() if value != '')
        reason = textwrap.shorten(str(error), 200) or type(error).__name__
        raise ValueError(
            f'TRAIN.OPTIMIZER.NAME {options.NAME} does not work with {given or "its defaults"}: {reason}'
        ) from error


def weight_decay_groups(model: nn.Module, weight_decay: float, decay_biases: bool = False) -> list[dict]:
    """Split the parameters into two groups, with weight decay and without; each keeps the network's order.

    Vectors and biases are not decayed, nor are the parameters that the network's methods `no_weight_decay` (whole
    names) and `no_weight_decay_keywords` (parts of names) list.

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
    """Split parameter groups by layer, for layer-wise learning-rate decay: the embedding, each block, and the head.

    Args:
        model: the network, not wrapped in DDP. Its `group_matcher` assigns parameters to layers.
        groups: from `weight_decay_groups`.
        layer_decay: ratio of a layer's learning rate to the next layer's; the head has the full learning rate.

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
