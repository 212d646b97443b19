"""The network rewritten for inference runtimes: the same outputs, in operators that onnxruntime and OpenVINO fuse.

Both runtimes recognise layers by patterns of operators, and PyTorch's exporter makes others of much of the network.

- Tokens stay windows (windows, N, C) from block to block. OpenVINO computes the layer norm of three dimensions with one
  operator, and that of five dimensions with three.
- Queries, keys and values have a linear layer each, so that nothing is split, and one transpose each. OpenVINO runs the
  two matmuls, the softmax between them and most transposes as one operator.
- The factor on q.k is part of the query's weights, and the position bias is a constant.
- For onnxruntime, linear layers take a matrix: each is then one Gemm with its bias, instead of a MatMul and an Add.
  OpenVINO adds the bias in either form, and its int8 kernels for the inputs of such layers are slower on a matrix.

Letters: B images, nH x nW the window grid, N tokens in a window (the MSG token first), C channels, h heads, d = C/h
channels per head.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from models.attention import WindowAttention
from models.msg_block import MSGBlock
from models.symbolic import SymbolicPadding, contiguous_copy
from models.windows import WindowPadding

Padding = WindowPadding | SymbolicPadding


def rewrite_for_runtimes(network: nn.Module, for_onnxruntime: bool) -> nn.Module:
    """Copy a network in evaluation mode with its blocks, linear layers and norms rewritten.

    Args:
        network: a classifier, or the backbone of a detector.
        for_onnxruntime: give linear layers a matrix.

    Returns:
        A network of the same inputs and outputs, up to rounding, made to be traced.
    """
    network = copy.deepcopy(network)
    _replace(network, MSGBlock, RuntimeBlock)
    _replace(network, nn.LayerNorm, lambda norm: Flattened(norm, dims=3))
    if for_onnxruntime:
        _replace(network, nn.Linear, lambda linear: Flattened(linear, dims=2))
    return network


def _replace(network: nn.Module, kind: type[nn.Module], make: Callable[[Any], nn.Module]) -> None:
    """Replace all layers of a kind."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child) is kind:  # a subclass may read its input differently
                setattr(module, name, make(child))


class Flattened(nn.Module):
    """A linear layer or norm whose input has at most 2 dimensions, (rows, C), or 3, (B, tokens, C).

    Args:
        layer: the layer.
        dims: 2 or 3.
    """

    def __init__(self, layer: nn.Module, dims: int):
        super().__init__()
        self.layer = layer
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to tokens (..., C)."""
        if x.dim() <= self.dims:
            return self.layer(x)
        return self.layer(x.flatten(self.dims - 2, -2)).view(*x.shape[:-1], -1)


class RuntimeAttention(nn.Module):
    """`WindowAttention` for inference runtimes."""

    def __init__(self, attention: WindowAttention):
        super().__init__()
        self.num_heads = attention.num_heads
        self.register_buffer('bias', attention.position_bias().detach().clone())  # (1, h, N, N)
        self.query, self.key, self.value = split_qkv(attention.qkv, attention.scale)
        self.proj = attention.proj

    def forward(self, x: Tensor, msg_only: bool) -> Tensor:
        """Attend within windows.

        Args:
            x: windows (windows, N, C).
            msg_only: compute only the MSG tokens' outputs.

        Returns:
            (windows, N, C), or (windows, 1, C) with `msg_only`.
        """
        queries, bias = (msg_tokens(x), self.bias[:, :, :1]) if msg_only else (x, self.bias)
        q, k, v = self.query(queries), self.key(x), self.value(x)
        attn = self._heads(q).transpose(1, 2) @ self._heads(k).permute(0, 2, 3, 1)  # (windows, h, queries, N)
        x = (attn + bias).softmax(dim=-1) @ self._heads(v).transpose(1, 2)  # (windows, h, queries, d)
        return self.proj(contiguous_copy(x.transpose(1, 2)).view(q.shape))

    def _heads(self, x: Tensor) -> Tensor:
        """View (windows, tokens, C) as (windows, tokens, h, d)."""
        return x.view(*x.shape[:2], self.num_heads, -1)


class RuntimeBlock(nn.Module):
    """`MSGBlock` for inference runtimes."""

    def __init__(self, block: MSGBlock):
        super().__init__()
        self.norm1, self.attn = block.norm1, RuntimeAttention(block.attn)
        self.exchange = block.exchange
        self.norm2, self.mlp = block.norm2, block.mlp

    def forward(self, windows: Tensor, padding: Padding | None = None, msg_only: bool = False) -> Tensor:
        """Run attention, exchange and MLP: see `MSGBlock.forward`."""
        B, nH, nW, N, C = windows.shape
        x = windows.view(-1, N, C)
        normed = self.norm1(x)
        if padding is not None:
            normed = padding.zero(normed.view(windows.shape)).view(x.shape)
        attended = self.attn(normed, msg_only)
        if msg_only:
            x, N, padding = msg_tokens(x), 1, None
        x = x + attended
        msg, patches = x.split((1, N - 1), dim=1)
        msg = contiguous_copy(msg).view(B, nH, nW, C)  # `Flattened` would add a guard on symbolic strides
        exchanged = self.exchange(msg)
        if exchanged is not msg:
            x = torch.cat((exchanged.reshape(-1, 1, C), patches), dim=1)
        if padding is None:
            x = x + self.mlp(self.norm2(x))
            return x.view(B, nH, nW, N, C)
        x = x.view(windows.shape)
        return x + padding.restore(self.mlp(self.norm2(padding.remove(x))))


def msg_tokens(x: Tensor) -> Tensor:
    """The MSG tokens of windows (windows, N, C), (windows, 1, C)."""
    return contiguous_copy(x[:, :1])


def split_qkv(qkv: nn.Linear, scale: float) -> list[nn.Linear]:
    """Split a linear layer into layers for queries, which include the factor on q.k, for keys and for values."""
    C, with_bias = qkv.in_features, qkv.bias is not None
    layers = []
    for number, factor in enumerate((scale, 1.0, 1.0)):
        rows = slice(number * C, (number + 1) * C)
        layer = nn.Linear(C, C, bias=with_bias).requires_grad_(False)
        layer.weight.copy_(qkv.weight.detach()[rows] * factor)
        if with_bias:
            layer.bias.copy_(qkv.bias.detach()[rows] * factor)
        layers.append(layer)
    return layers
