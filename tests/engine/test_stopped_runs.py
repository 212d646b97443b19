"""Processes that are stopped by a signal: they finish the update, save, exit and resume to the same bits."""

import os
import signal
import subprocess
import sys
import time

import pytest

from engine.signals import EXIT_STOPPED
from tests.helpers.paths import ROOT, TINY
from tests.helpers.processes import SpawnedRun, environment, start_two_ranks
from tests.helpers.runs import differences
from tools.rehearsal.launch import children


@pytest.mark.slow
def test_signals_finish_the_update_save_and_exit(folder, uninterrupted):
    """One run, stopped by one signal after the other, ends with the same bits."""
    for stops, number in enumerate((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1), start=1):
        # That workers outlive all three signals, test_workers shows.
        run = SpawnedRun(folder, 'signals', options=f'DATA.NUM_WORKERS {2 if number == signal.SIGINT else 0}')
        assert run.wait_for(lambda run=run, epoch=3 * stops: f'Train: [{epoch}/12]' in run.log())
        os.killpg(run.process.pid, number)  # like launchers: the DataLoader workers get it too
        assert run.wait(30) == EXIT_STOPPED, run.output.read_text()
        assert f'{number.name}: stopping after this update' in run.output.read_text()
        assert run.log().count('stopped by a signal: start again to resume from') == stops
        assert 'Traceback' not in run.output.read_text()
    run = SpawnedRun(folder, 'signals')
    assert run.wait() == 0, run.output.read_text()
    assert differences(uninterrupted[0], run.last_checkpoint()) == []


@pytest.mark.slow
def test_stopped_run_saves_without_a_reader_of_its_output(folder):
    """As after Ctrl-C on `python main.py ... 2>&1 | tee log`, which ends tee first."""
    run = SpawnedRun(folder, 'unread', pipe=True)
    assert run.wait_for(lambda: 'Train: [1/12]' in run.log())
    run.process.stdout.close()
    run.process.send_signal(signal.SIGINT)
    assert run.wait(30) == EXIT_STOPPED
    assert 'stopped by a signal' in run.log()


@pytest.mark.slow
def test_signal_during_an_evaluation_loses_no_update(folder, uninterrupted):
    run = SpawnedRun(folder, 'evaluation')
    assert run.wait_for(lambda: 'EPOCH 3 training takes' in run.log())
    run.process.send_signal(signal.SIGTERM)
    assert run.wait(30) == EXIT_STOPPED, run.output.read_text()
    run = SpawnedRun(folder, 'evaluation')
    assert run.wait() == 0, run.output.read_text()
    assert differences(uninterrupted[0], run.last_checkpoint()) == []


# A process whose evaluation neither ends nor polls. As in a wait for another rank or for the GPU, it stays in C, where
# no signal handler of Python's runs.
BLOCKED = """
import ctypes, sys, main, config

def block(*_):
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)

main.validate = block
sys.argv[0] = 'main.py'
main.main(config.get_config(main.parse_option()))
"""


def test_second_signal_exits_at_once(folder):
    command = [sys.executable, '-c', BLOCKED, '--cfg', TINY, '--data-path', folder / 'tree']
    command += ['--output', folder / 'output', '--tag', 'blocked']
    with subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout:
            if 'EPOCH 0 training takes' in line:
                break
        process.send_signal(signal.SIGTERM)
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 128 + signal.SIGTERM


@pytest.mark.slow
def test_two_ranks_stop_at_the_same_update_and_resume_bit_for_bit(folder, uninterrupted_pair):
    run = start_two_ranks(folder, 'stopped_pair')
    assert run.wait_for(lambda: all('Train: [2/12]' in run.log(rank) for rank in (0, 1)))
    os.kill(children(run.process.pid)[1], signal.SIGTERM)  # one rank only
    assert run.wait(60) != 0
    output = run.output.read_text()
    assert output.count('SIGTERM: stopping after this update') == 1
    assert output.count(f'exitcode  : {EXIT_STOPPED}') == 2, output  # each rank's, in torchrun's report
    assert 'Traceback' not in output.split('torch/distributed')[0]
    run = start_two_ranks(folder, 'stopped_pair')
    assert run.wait_for(lambda: 'Train: [7/12]' in run.log())
    run.process.send_signal(signal.SIGTERM)  # to torchrun, which forwards it to both ranks
    assert run.wait(60) != 0
    assert 'stopped by a signal' in run.log().splitlines()[-1]
    run = start_two_ranks(folder, 'stopped_pair')
    assert run.wait() == 0, run.output.read_text()
    assert differences(uninterrupted_pair, run.last_checkpoint()) == []
    resumed = [line for line in run.log().splitlines() if 'the run resumes ' in line]
    assert len(resumed) == 2
    assert all('bit for bit, as if it had never stopped' in line for line in resumed)
