"""Multiply-adds of real operators, counted by PyTorch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count


def count_multiply_adds(function: Callable[[], object]) -> int:
    """Multiply-adds of all matmuls and convolutions of a call; norms, biases and activations do not count."""
    formulas = {torch.ops.aten.convolution_backward: _convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        function()
    return counter.get_total_flops() // 2  # it counts multiplications and additions separately


def _convolution_backward(
    grad: Sequence[int], x: Sequence[int], weight: Sequence[int], *arguments: Any, **_: Any
) -> int:
    """FLOPs of a convolution's gradients, from shapes; PyTorch's own formula ignores groups."""
    transposed, output_mask = arguments[4], arguments[7]  # gradients of the input, of the weight
    return conv_flop_count(x, weight, grad, transposed) * (output_mask[0] + output_mask[1])
