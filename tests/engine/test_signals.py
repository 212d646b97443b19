"""Requests to stop; test_stopped_runs has real processes."""

import os
import signal
import time

import pytest

from engine import signals
from engine.signals import COMPILED_UPDATE, STOP_SIGNALS, Stopped, StopRequest
from tests.helpers.processes import wait_for


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch):
    monkeypatch.delenv('TORCHELASTIC_RUN_ID', raising=False)


@pytest.mark.parametrize('number', STOP_SIGNALS)
def test_first_signal_requests_a_stop_and_handlers_are_restored(number, capfd):
    before = [signal.getsignal(x) for x in STOP_SIGNALS]
    with StopRequest() as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), number)
        assert stop.agreed()
        assert stop.signal == number
        wait_for(lambda: f'{signal.Signals(number).name}: stopping' in capfd.readouterr().err)
    assert [signal.getsignal(x) for x in STOP_SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_signal_during_compilation_says_what_it_waits_for(capfd):
    with StopRequest() as stop:
        stop.waits_for = COMPILED_UPDATE
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: 'SIGTERM: stopping after this update, for which torch.compile' in capfd.readouterr().err)


def test_copy_of_the_first_signal_is_ignored_and_a_second_exits_at_once(monkeypatch, capfd):
    exits, now = [], [100.0]
    monkeypatch.setattr(signals.os, '_exit', exits.append)
    monkeypatch.setattr(signals.time, 'monotonic', lambda: now[0])
    with StopRequest():
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: 'stopping' in capfd.readouterr().err)
        now[0] += 0.1  # srun and torchrun both forward it
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGCHLD)  # a DataLoader worker has ended
        time.sleep(0.1)
        assert exits == []
        now[0] += 1
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_for(lambda: exits == [128 + signal.SIGUSR1])


def test_stopped_run_keeps_its_exit_code():
    before = [signal.getsignal(x) for x in STOP_SIGNALS]
    try:
        with pytest.raises(Stopped), StopRequest():
            raise Stopped
        for number in STOP_SIGNALS:
            os.kill(os.getpid(), number)  # torchrun signals the slower rank
    finally:
        for number, handler in zip(STOP_SIGNALS, before, strict=True):
            signal.signal(number, handler)


def test_death_of_torchrun_requests_a_stop_but_not_that_of_a_shell(monkeypatch):
    parent = [os.getppid()]
    monkeypatch.setattr(signals.os, 'getppid', lambda: parent[0])
    shell = StopRequest()
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'none')
    torchrun = StopRequest()
    assert not torchrun.agreed()
    parent[0] = 1
    assert torchrun.agreed()
    assert not shell.agreed()
