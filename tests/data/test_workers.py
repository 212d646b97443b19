"""Worker processes: forked from a server without threads, deaf to launchers' signals, and gone with their program."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT, TINY
from tests.helpers.processes import environment, start
from utils import is_running

needs_proc = pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='needs /proc/<pid>/task')


@contextmanager
def started_program(*arguments):
    """The program of `tests.helpers.loader_program`, and the words of its first line, in a process group of its own."""
    with subprocess.Popen(
        [sys.executable, '-m', 'tests.helpers.loader_program', *arguments],
        cwd=ROOT,
        env=environment(),
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            yield process, process.stdout.readline().split()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def group_of(pid):
    """Processes of a process group that are not zombies."""
    listed = subprocess.run(['ps', '-e', '-o', 'pid=,pgid=,stat='], capture_output=True, text=True).stdout
    rows = [line.split() for line in listed.splitlines()]
    return [int(process) for process, group, state in rows if int(group) == pid and state[0] != 'Z']


@needs_proc
def test_workers_have_a_server_of_one_thread_and_outlive_signals_to_the_process_group():
    with started_program('wait') as (process, (program, server, *workers, seconds)):
        assert int(program) == process.pid != int(server)
        assert len(os.listdir(f'/proc/{server}/task')) == 1
        assert float(seconds) < 1.5  # of a core; importing PyTorch and timm alone takes more
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.killpg(process.pid, number)
        time.sleep(1.5)
        assert len(workers) == 2
        assert all(map(is_running, map(int, [server, *workers])))
        out, err = process.communicate('\n')
        assert (out, err, process.returncode) == ('16\n', '', 0)  # its second loader needs the server
        assert not any(map(is_running, map(int, workers)))


def test_nothing_is_left_of_a_killed_program():
    with started_program('wait') as (process, _):
        assert len(group_of(process.pid)) >= 4  # with its workers and their server
        process.kill()
        process.wait()
        end = time.monotonic() + 10
        while group_of(process.pid):
            assert time.monotonic() < end
            time.sleep(0.1)


def test_training_starts_in_a_folder_that_holds_one_named_like_a_package_of_the_project(image_tree, tmp_path):
    shutil.copytree(image_tree, tmp_path / 'data')
    command = [ROOT / 'main.py', '--cfg', TINY, '--data-path', 'data', '--output', 'output']
    done = start(*command, '--opts', 'DATA.NUM_WORKERS', '1', 'SAVE_STEPS', '1', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'Error' not in done.stderr
