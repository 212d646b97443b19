"""Paths of window attention: each gives the same values and gradients."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from models import MSGTransformer, attention
from tests.helpers.attention import relative_errors
from tests.helpers.golden import fill_, images
from tests.helpers.paths import ROOT

SHAPES = [(5, 50, 3, 32), (3, 49, 2, 24), (2, 10, 2, 16), (11, 5, 2, 8)]  # windows, N, heads, channels per head

# Triton's interpreter, which cannot multiply bfloat16, must be chosen before Triton is imported.
INTERPRETED = f"""
import importlib.util, sys
import torch
from models import attention_kernel
from models.attention_kernel import window_attention
from tests.helpers.attention import relative_errors

# The same folder as another package, as torch.hub imports it: of two operators with one name, the first may crash
spec = importlib.util.spec_from_file_location('copy_of_models', 'models/__init__.py')
sys.modules['copy_of_models'] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
from copy_of_models.attention_kernel import window_attention as copied
assert str(copied) != str(window_attention)  # their names

attention_kernel.MAX_PROGRAMS = 4  # so that a program has several windows, and the last one has fewer

def kernel(qkv, bias, scale):
    return window_attention(qkv, bias.squeeze(0), scale, bias.shape[1])

for shape in {SHAPES}:
    errors = relative_errors(kernel, *shape), relative_errors(kernel, *shape, dtype=torch.float16)
    assert max(errors[0]) < 1e-6 and max(errors[1]) < 2e-3, (shape, errors)
    assert max(errors[0]) > 0
qkv, bias = torch.randn(3, 10, 3 * 32, requires_grad=True), torch.randn(2, 10, 10, requires_grad=True)
torch.library.opcheck(window_attention, (qkv, bias, 0.25, 2))
compiled = torch.compile(lambda qkv, bias: window_attention(qkv, bias, 0.25, 2), backend='aot_eager', fullgraph=True)
assert torch.equal(compiled(qkv, bias), window_attention(qkv, bias, 0.25, 2))
for function in (window_attention, copied):
    grads = (torch.autograd.grad(f(qkv, bias, 0.25, 2).sum(), (qkv, bias)) for f in (function, window_attention))
    assert all(torch.equal(*pair) for pair in zip(*grads))
print('equal')
"""


@pytest.mark.parametrize('shape', SHAPES)
def test_matmuls_equal_the_formula(shape):
    assert max(relative_errors(attention.attend, *shape)) < 1e-6
    assert max(relative_errors(attention.attend, *shape, dtype=torch.bfloat16)) < 1.2e-2


@pytest.mark.slow
def test_kernel_equals_the_formula_in_the_interpreter():
    pytest.importorskip('triton')
    done = subprocess.run(
        [sys.executable, '-c', INTERPRETED], cwd=ROOT, env=os.environ | {'TRITON_INTERPRET': '1'},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == 'equal', done.stderr[-2000:]


@pytest.mark.parametrize(
    ('device', 'dtype', 'grad', 'dropout', 'msg_only', 'windows', 'window', 'path'),
    [
        ('cpu', torch.float32, False, 0.0, False, 4, 7, 'sdpa'),
        ('cpu', torch.float32, True, 0.0, False, 4, 7, 'matmuls'),
        ('cpu', torch.bfloat16, False, 0.0, False, 4, 7, 'matmuls'),
        ('cuda', torch.bfloat16, True, 0.0, False, 4, 7, 'kernel'),
        ('cuda', torch.float16, False, 0.0, False, 4, 7, 'kernel'),
        ('cuda', torch.float32, True, 0.0, False, 4, 7, 'matmuls'),
        ('cuda', torch.bfloat16, True, 0.1, False, 4, 7, 'sdpa'),
        ('cuda', torch.bfloat16, True, 0.0, True, 4, 7, 'matmuls'),
        ('cuda', torch.bfloat16, True, 0.0, False, 4, 12, 'sdpa'),
        ('cuda', torch.bfloat16, False, 0.0, False, 4, 12, 'sdpa'),
        ('cuda', torch.bfloat16, True, 0.0, False, 65_536, 7, 'kernel'),
        ('cuda', torch.bfloat16, True, 0.0, False, 65_536, 12, 'matmuls'),
    ],
)
def test_path_of_a_call(monkeypatch, device, dtype, grad, dropout, msg_only, windows, window, path):
    monkeypatch.setattr(attention, 'MAX_TOKENS', 64)
    monkeypatch.setattr(attention, 'MAX_HEAD_CHANNELS', 64)
    N = window**2 + 1
    shape = (windows, N, 288)
    qkv = SimpleNamespace(is_cpu=device == 'cpu', is_cuda=device == 'cuda', dtype=dtype, shape=shape)  # no GPU needed
    bias = SimpleNamespace(shape=(1, 3, N, N), requires_grad=grad)
    assert attention.choose_path(qkv, bias, dropout, msg_only) == path


def test_logits_in_bf16_are_within_two_percent_of_fp32():
    model, x = fill_(MSGTransformer()).eval(), images(1, 224)
    with torch.no_grad():
        exact = model(x)
        with torch.autocast('cpu', torch.bfloat16):
            autocast = model(x)
        converted = model.to(torch.bfloat16)(x.to(torch.bfloat16))
    for logits in (autocast, converted):
        assert logits.dtype == torch.bfloat16
        assert 0 < (logits.float() - exact).norm() < 0.02 * exact.norm()
