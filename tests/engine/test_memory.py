import mmap
import sys
from types import SimpleNamespace

import pytest

from engine import memory
from engine.memory import peak_memory_mb, reset_peak_memory
from tests.helpers.runs import CPU


@pytest.mark.parametrize(('platform', 'ru_maxrss'), [('linux', 3 * 2**10), ('darwin', 3 * 2**20)])
def test_peak_memory_of_the_host_in_the_units_of_its_system(monkeypatch, platform, ru_maxrss):
    monkeypatch.setattr(memory.sys, 'platform', platform)
    monkeypatch.setattr(memory.resource, 'getrusage', lambda _: SimpleNamespace(ru_maxrss=ru_maxrss))
    assert peak_memory_mb(CPU) == 3


@pytest.mark.skipif(sys.platform != 'linux', reason='Linux forgets a peak when it is told to')
def test_memory_that_is_given_back_before_training_is_not_reported():
    with mmap.mmap(-1, 300 * 2**20) as content:  # which the allocator does not keep
        content[::4096] = b'x' * (len(content) // 4096)
        peak = peak_memory_mb(CPU)
    assert peak_memory_mb(CPU) >= peak
    reset_peak_memory()
    assert peak_memory_mb(CPU) < peak - 200
