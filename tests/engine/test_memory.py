from types import SimpleNamespace

import pytest

from engine import memory
from engine.memory import peak_memory_mb
from tests.helpers.runs import CPU


@pytest.mark.parametrize(('platform', 'ru_maxrss'), [('linux', 3 * 2**10), ('darwin', 3 * 2**20)])
def test_peak_memory_of_the_host_in_the_units_of_its_system(monkeypatch, platform, ru_maxrss):
    monkeypatch.setattr(memory.sys, 'platform', platform)
    monkeypatch.setattr(memory.resource, 'getrusage', lambda _: SimpleNamespace(ru_maxrss=ru_maxrss))
    assert peak_memory_mb(CPU) == 3
