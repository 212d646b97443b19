import pytest
import torch

from tests.helpers.runs import CPU
from tools.benchmark import matmul as rates
from tools.benchmark.matmul import ONEDNN, PYTORCH, MatmulReference, measure_peak


@pytest.mark.parametrize(('multiply_adds', 'side'), [(3 * 1024**3, 1024), (30**3, 30), (1, 1)])
def test_matmul_is_as_square_as_its_size_allows(multiply_adds, side):
    matmul = MatmulReference('fp32', CPU, multiply_adds)
    assert matmul.multiply_adds == matmul.left.numel() * matmul.right.shape[1] == multiply_adds
    assert matmul.right.shape == (side, side)


def test_a_large_matmul_is_a_repeated_smaller_one(monkeypatch):
    monkeypatch.setattr(rates, 'MAX_ROWS', 500)
    matmul = MatmulReference('fp32', CPU, 1200 * 1024**2)
    assert (matmul.repeats, matmul.left.shape) == (3, (400, 1024))
    assert matmul.multiply_adds == 1200 * 1024**2
    with torch.profiler.profile(acc_events=True) as profile:
        matmul()
    assert {event.key: event.count for event in profile.key_averages()}['aten::linear'] == 3


@pytest.mark.parametrize(('precision', 'library'), [('fp32', PYTORCH), ('fp32', ONEDNN), ('bf16', PYTORCH)])
def test_matmul_multiplies_by_its_library(precision, library):
    matmul = MatmulReference(precision, CPU, 10 * 1024**2, library)
    with torch.profiler.profile(acc_events=True) as profile:
        product = matmul()
    torch.testing.assert_close(product, matmul.left @ matmul.right.T, rtol=1e-4, atol=1e-4)
    operators = {event.key for event in profile.key_averages()}
    assert ('mkldnn::_linear_pointwise' in operators) == (library == ONEDNN)


def test_the_peak_is_the_fastest_library(monkeypatch):
    monkeypatch.setattr(rates, 'time_interleaved', lambda matmuls, *_: {PYTORCH: [2.0, 2.0, 9.0], ONEDNN: [0.5] * 3})
    monkeypatch.setattr(rates, 'mkl_leaves_avx512_unused', lambda: True)
    peak = measure_peak('fp32', CPU, 10**9)
    assert peak.library == ONEDNN
    assert [round(rate / 1e9, 2) for rate in peak.rates.values()] == [0.5, 2.0]
    assert 'PyTorch 0.5, oneDNN 2.0.' in str(peak)
    assert 'MKL, does not use the AVX-512' in str(peak)
    assert list(measure_peak('bf16', CPU, 10**6).rates) == [PYTORCH]  # which is oneDNN already
