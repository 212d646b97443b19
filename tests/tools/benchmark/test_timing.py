import pytest

from tests.helpers.runs import CPU
from tools.benchmark import timing
from tools.benchmark.timing import Quartiles, seconds_per_batch, time_callable, time_interleaved


def test_quartiles():
    quartiles = Quartiles.from_values([5.0, 1.0, 2.0, 4.0, 3.0])
    assert quartiles == (3.0, 2.0, 4.0)
    assert f'{quartiles:.1f}' == '3.0 (2.0 to 4.0)'
    assert Quartiles.of_ratios([2.0, 8.0, 9.0], [1.0, 2.0, 3.0]) == (3.0, 2.5, 3.5)


def test_callables_are_interleaved_and_short_ones_repeat(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(timing.time, 'perf_counter', lambda: clock[0])

    def timed(name, seconds):
        def run():
            calls.append(name)
            clock[0] += seconds

        return run

    callables = {'a': timed('a', 0.25), 'b': timed('b', 1.0), 'c': timed('c', 2.0)}
    times = time_interleaved(callables, 3, CPU, min_seconds=0.5)
    assert times == {'a': [0.25] * 3, 'b': [1.0] * 3, 'c': [2.0] * 3}
    assert ''.join(calls) == 'abc' + 'aabc' + 'bcaa' + 'caab'


def test_time_callable_gives_seconds_per_call(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(timing.time, 'perf_counter', lambda: clock[0])

    def run():
        clock[0] += 2.0

    assert time_callable(run, CPU) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize(('seconds', 'calls'), [(2.0, 12), (10.0, 8), (40.0, 5)])
def test_slow_callables_are_timed_in_fewer_rounds(monkeypatch, seconds, calls):
    clock, ends = [0.0], []
    monkeypatch.setattr(timing.time, 'perf_counter', lambda: clock[0])

    def run():
        clock[0] += seconds
        ends.append(clock[0])

    assert time_callable(run, CPU).median == seconds
    assert len(ends) == calls  # two come before the rounds


def test_every_process_calls_as_often_as_rank_0(monkeypatch):
    """Training steps of several processes wait for each other."""
    calls = []
    monkeypatch.setattr(timing, 'on_main_process', lambda function: {'step': 6})
    time_interleaved({'step': lambda: calls.append(0)}, 4, CPU)
    assert len(calls) == 1 + 4 * 6
    answers = iter([4, {'': 6}])
    monkeypatch.setattr(timing, 'on_main_process', lambda function: next(answers))
    time_callable(lambda: calls.append(0), CPU)
    assert len(calls) == 1 + 4 * 6 + 2 + 4 * 6


@pytest.mark.parametrize('warm_up', [0, 3])
def test_batches_that_were_ready_are_not_timed(monkeypatch, warm_up):
    """Those of the warm-up come at once, and the next takes long; then one comes every quarter of a second."""
    clock = [0.0]
    monkeypatch.setattr(timing.time, 'perf_counter', lambda: clock[0])

    def batches():
        for number in range(1000):
            clock[0] += 0 if number < warm_up else 50 if number == warm_up else 0.25
            yield number

    assert seconds_per_batch(batches(), warm_up, min_seconds=10) == 0.25
    assert clock[0] == 60.0
