"""How fast a device multiplies and adds: plain matmuls, by each library that could compute them."""

import math
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.linear import HAS_OPERATOR, OneDNNLinear, mkl_leaves_avx512_unused
from tools.benchmark.cases import PRECISIONS, tf32
from tools.benchmark.timing import time_interleaved

PYTORCH, ONEDNN = 'PyTorch', 'oneDNN'
ROUNDS = 5  # to choose the library
MAX_ROWS = 2**16  # of the left matrix; without a limit, the reference for large images would take gigabytes of memory


class MatmulReference:
    """A plain matmul, or several smaller matmuls where the left matrix would have more than `MAX_ROWS` rows.

    Args:
        precision: precision of the matrices.
        device: device to run on.
        multiply_adds: approximate number of multiply-adds; the attribute of this name has the exact number.
        library: library that computes the matmul: `PYTORCH` for PyTorch's own choice, or `ONEDNN`.
    """

    def __init__(self, precision: str, device: torch.device, multiply_adds: int, library: str = PYTORCH):
        size = min(4096 if device.type == 'cuda' else 1024, max(1, round(multiply_adds ** (1 / 3))))
        rows = multiply_adds / size**2
        self.repeats = math.ceil(rows / MAX_ROWS)
        rows = max(1, round(rows / self.repeats))
        self.precision, self.multiply_adds, self.library = precision, self.repeats * rows * size**2, library
        self.left = torch.randn(rows, size, device=device, dtype=PRECISIONS[precision])
        self.right = torch.randn(size, size, device=device, dtype=PRECISIONS[precision])

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        """Multiply: left right^T."""
        with tf32(self.precision == 'tf32'), OneDNNLinear() if self.library == ONEDNN else nullcontext():
            for _ in range(self.repeats):
                product = F.linear(self.left, self.right)
        return product


class Peak(NamedTuple):
    """Rates of plain matmuls, in multiply-adds a second, by library; the fastest is the peak."""

    rates: dict[str, float]

    @property
    def library(self) -> str:
        """The fastest library."""
        return max(self.rates, key=self.rates.get)

    def __str__(self) -> str:
        rates = ', '.join(f'{library} {rate / 1e9:.1f}' for library, rate in self.rates.items())
        text = f'Matmul peak, billion multiply-adds a second: {rates}.'
        if len(self.rates) > 1 and mkl_leaves_avx512_unused():
            text += " PyTorch's library, MKL, does not use the AVX-512 instructions of this processor."
        return text


def measure_peak(precision: str, device: torch.device, multiply_adds: int) -> Peak:
    """Measure plain matmuls by all libraries: by oneDNN too, in fp32 on CPUs, where PyTorch uses another one.

    Args:
        precision: precision of the matrices.
        device: device to run on.
        multiply_adds: approximate number of multiply-adds of a matmul.
    """
    libraries = [PYTORCH, ONEDNN] if precision == 'fp32' and device.type == 'cpu' and HAS_OPERATOR else [PYTORCH]
    matmuls = {library: MatmulReference(precision, device, multiply_adds, library) for library in libraries}
    for matmul in matmuls.values():
        matmul()
    times = time_interleaved(matmuls, ROUNDS, device)
    return Peak({library: matmuls[library].multiply_adds / np.median(times[library]) for library in libraries})
