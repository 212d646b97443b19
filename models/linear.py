"""Linear layers through oneDNN, on processors where it is faster than PyTorch's choice of library.

On CPUs, PyTorch computes fp32 linear layers with MKL. On AMD processors, MKL does not use AVX-512 instructions; oneDNN,
which is also part of PyTorch, does. On AMD processors with AVX-512, `apply_linear` therefore computes fp32 layers with
oneDNN, forward and backward. On every other device, in every other precision and in compiled networks, it calls the
layer and does nothing else.

The layers stay plain `nn.Linear`, so state dicts, hooks, pickling and quantization work as usual: `OneDNNLinear`
replaces the call of `F.linear` inside the layer.
"""

import contextlib
import ctypes
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

SWITCH = 'MSG_CPU_LINEAR'  # environment variable
CHOICES = ('auto', 'pytorch', 'onednn')
MIN_MULTIPLY_ADDS = 2**23  # of a layer: below, calling oneDNN takes longer than it saves
HAS_OPERATOR = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, '_linear_pointwise')


def choose_library(choice: str) -> str:
    """Choose the library for fp32 linear layers on CPUs: 'onednn', or 'pytorch' for whatever PyTorch uses.

    Args:
        choice: value of the environment variable `MSG_CPU_LINEAR`: 'onednn' for oneDNN on every processor, 'pytorch' on
            none, 'auto' or '' where MKL leaves AVX-512 unused.

    Raises:
        ValueError: an unknown choice.
    """
    if choice not in ('', *CHOICES):
        raise ValueError(f'{SWITCH} is {choice!r}: write one of {", ".join(CHOICES)}')
    wants_onednn = choice == 'onednn' or (choice in ('', 'auto') and mkl_leaves_avx512_unused())
    return 'onednn' if wants_onednn and HAS_OPERATOR else 'pytorch'


def mkl_leaves_avx512_unused() -> bool:
    """Whether the processor has AVX-512 instructions that MKL does not use: AMD processors."""
    if not hasattr(torch.cpu, 'get_capabilities'):  # PyTorch before 2.11
        return False
    cpu = torch.cpu.get_capabilities()
    return 'AMD' in cpu.get('cpu_name', '') and cpu.get('avx512_f', False) and not _mkl_assumes_intel()


def _mkl_assumes_intel() -> bool:
    """Whether a library loaded before PyTorch tells MKL that the processor is Intel's; see `startup.before_imports`."""
    try:
        return bool(ctypes.CDLL(None).mkl_serv_intel_cpu_true())
    except (AttributeError, OSError, TypeError):  # there is no such library; TypeError: Windows
        return False


LIBRARY = choose_library(os.environ.get(SWITCH, ''))


def apply_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """Call a linear layer, with the fastest library for the processor.

    Args:
        layer: an `nn.Linear`, or whatever has replaced it.
        x: (..., in_features).

    Returns:
        (..., out_features).
    """
    if LIBRARY == 'pytorch' or not x.is_cpu or torch.compiler.is_compiling():
        return layer(x)
    with OneDNNLinear():
        return layer(x)


class OneDNNLinear(TorchFunctionMode):
    """Context in which oneDNN computes `F.linear` of fp32 tensors on the CPU, whatever network calls it.

    Outputs, gradients, second derivatives and the transforms of `torch.func` are those of `F.linear`, up to rounding.
    PyTorch still computes it in compiled networks, in exports, under autocast, in calls of fewer than
    `MIN_MULTIPLY_ADDS`, and for tensors that are not plain matrices of weights with a contiguous bias.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Compute `F.linear`; pass other functions on."""
        if func is F.linear:
            return _linear(*args, **kwargs or {})
        return func(*args, **kwargs or {})


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not _fits(input, weight, bias):
        return F.linear(input, weight, bias)
    # As a matrix, since the operator's output for other shapes is a view, which cannot be changed in place.
    return _OneDNN.apply(input.reshape(-1, input.shape[-1]), weight, bias).view(*input.shape[:-1], weight.shape[0])


def _fits(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN is to compute this call: the operator ignores strides of the bias, and checks no shapes."""
    tensors = [input, weight] if bias is None else [input, weight, bias]
    return (
        not (torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.jit.is_tracing())
        and all(type(x) in (Tensor, nn.Parameter) and x.is_cpu and x.dtype == torch.float32 for x in tensors)
        and all(x.layout == torch.strided for x in tensors)
        and input.dim() >= 2
        and weight.dim() == 2
        and input.shape[-1] == weight.shape[1]
        and (bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous()))
        and input.numel() * weight.shape[0] >= MIN_MULTIPLY_ADDS
        and not torch.is_autocast_enabled('cpu')
    )


class _OneDNN(torch.autograd.Function):
    """x W^T + b of a matrix x, by the operator that `torch.compile` uses for frozen networks; it has no gradient."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _OneDNN.apply(grad, weight.t(), None) if needs_x else None,
            _WeightGradient.apply(grad, x) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
        )

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None) -> Tensor:
        x, weight = ctx.saved_tensors
        return _sum(None if dx is None else dx @ weight.t(), None if dweight is None else x @ dweight.t(), dbias)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor | None) -> tuple[Tensor, int]:
        return torch.vmap(F.linear, in_dims)(*tensors), 0


class _WeightGradient(torch.autograd.Function):
    """grad^T x of matrices, by oneDNN's kernel for it, which needs no transposed copy; it has no gradient."""

    @staticmethod
    def forward(grad: Tensor, x: Tensor) -> Tensor:
        weight = x.new_empty(grad.shape[1], x.shape[1])  # only its shape is read
        kernel = torch.ops.aten.mkldnn_linear_backward_weights
        try:
            return kernel(grad.to_mkldnn(), x.to_mkldnn(), weight, False)[0].to_dense()
        except RuntimeError:  # with `is_grads_batched`: oneDNN's tensors cannot be batched
            return grad.t() @ x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, dweight: Tensor) -> tuple[Tensor, Tensor]:
        grad, x = ctx.saved_tensors
        return x @ dweight.t(), grad @ dweight

    @staticmethod
    def jvp(ctx: Any, dgrad: Tensor | None, dx: Tensor | None) -> Tensor:
        grad, x = ctx.saved_tensors
        return _sum(None if dgrad is None else dgrad.t() @ x, None if dx is None else grad.t() @ dx)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], grad: Tensor, x: Tensor) -> tuple[Tensor, int]:
        return torch.vmap(lambda grad, x: grad.t() @ x, in_dims)(grad, x), 0


def _sum(*terms: Tensor | None) -> Tensor:
    return sum(term for term in terms if term is not None)


def register_flop_formulas() -> None:
    """Make PyTorch's `FlopCounterMode` count these layers, as it counts others: two operations per multiply-add."""
    from torch.utils.flop_counter import register_flop_formula  # slow to import

    def linear_flops(x: torch.Size, weight: torch.Size, *args: Any, **kwargs: Any) -> int:
        return 2 * x.numel() * weight[0]

    def weight_gradient_flops(grad: torch.Size, x: torch.Size, *args: Any, **kwargs: Any) -> int:
        return 2 * x.numel() * grad[1]

    with contextlib.suppress(RuntimeError):  # registered already
        register_flop_formula(torch.ops.mkldnn._linear_pointwise)(linear_flops)
        register_flop_formula(torch.ops.aten.mkldnn_linear_backward_weights)(weight_gradient_flops)


if LIBRARY == 'onednn':
    register_flop_formulas()
