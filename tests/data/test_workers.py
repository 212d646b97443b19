"""Worker processes: forked from a server without threads, deaf to launchers' signals, and gone with their program."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from data import DataError, workers
from data.workers import WorkerLoader
from tests.helpers.paths import ROOT, TINY
from tests.helpers.processes import environment, start
from utils import is_running

needs_proc = pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='needs /proc/<pid>/task')


@contextmanager
def started_program(*arguments, **variables):
    """The program of `tests.helpers.loader_program`, and the words of its first line, in a process group of its own."""
    with subprocess.Popen(
        [sys.executable, '-m', 'tests.helpers.loader_program', *arguments],
        cwd=ROOT,
        env=environment(**variables),
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


@pytest.mark.slow
@needs_proc
def test_workers_have_a_server_of_one_thread_and_outlive_signals_to_the_process_group():
    with started_program('wait') as (process, (program, server, *started, seconds)):
        assert int(program) == process.pid != int(server)
        assert len(os.listdir(f'/proc/{server}/task')) == 1
        assert float(seconds) < 1.5  # of a core; importing PyTorch and timm alone takes more
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.killpg(process.pid, number)
        time.sleep(1.5)
        assert len(started) == 2
        assert all(map(is_running, map(int, [server, *started])))
        out, err = process.communicate('\n')
        assert (out, err, process.returncode) == ('16\n', '', 0)  # its second loader needs the server
        assert not any(map(is_running, map(int, started)))


def test_nothing_is_left_of_a_killed_program():
    with started_program('wait') as (process, _):
        assert len(group_of(process.pid)) >= 4  # with its workers and their server
        process.kill()
        process.wait()
        end = time.monotonic() + 10
        while group_of(process.pid):
            assert time.monotonic() < end
            time.sleep(0.1)


@pytest.mark.slow
def test_dead_worker_ends_the_program_in_one_line_and_long_temporary_folder_works(tmp_path):
    folder = tmp_path / ('long' * 30)  # too long for the path of a socket
    folder.mkdir()
    with started_program('kill', TMPDIR=str(folder)) as (process, words):
        out, err = process.communicate(timeout=60)
        assert len(words) == 5
        assert (out, process.returncode) == ('', 1)
        assert err.startswith('error: a worker process of the loader has died')
        assert err.count('\n') == 1


class Failing(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise OSError(errno.EIO, 'Input/output error')


@pytest.mark.parametrize(
    ('error', 'message'),
    [
        (RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed. '), 'has died .*killed by signal'),
        (RuntimeError('DataLoader worker (pid(s) 7, 8) exited unexpectedly'), 'has died .*pid.s. 7, 8'),
        (ConnectionResetError(errno.ECONNRESET, 'Connection reset by peer'), 'has died .*Connection reset'),
        (EOFError(), 'has died .*EOFError'),
        (RuntimeError('received 0 items of ancdata'), 'ulimit -n'),
        (
            RuntimeError(
                'Caught RuntimeError in DataLoader worker process 0.\nTraceback:\n'
                'RuntimeError: unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left (28)'
            ),
            '--shm-size',
        ),
        (RuntimeError('Caught RuntimeError in DataLoader worker process 0.\nTraceback: shared memory\nboom'), None),
        (OSError('Caught OSError in DataLoader worker process 0.\nOSError: Input/output error'), None),
    ],
)
def test_errors_of_worker_processes_are_explained(error, message):
    def batches():
        yield 1
        raise error

    received = workers._reporting_failures(batches())
    assert next(received) == 1
    with pytest.raises(DataError if message else type(error), match=message):
        next(received)


def test_errors_of_a_dataset_keep_their_type_without_workers():
    with pytest.raises(OSError, match='Input/output'):
        next(iter(WorkerLoader(Failing())))


def test_processes_that_cannot_start_are_explained(monkeypatch):
    def fail():
        raise OSError(errno.EMFILE, 'Too many open files')

    monkeypatch.setattr(workers, 'worker_context', fail)
    with pytest.raises(DataError, match=r'cannot be started \(Too many open files\): .*ulimit -n'):
        WorkerLoader(Failing(), num_workers=1)


def test_batches_are_in_shared_memory_when_they_are_collated():
    image, box = torch.zeros(3), torch.zeros(0, 4)
    workers._SharedBatches(lambda samples: ([image], ({'box': box, 'name': 'a'},)))([])
    assert image.is_shared()
    assert box.is_shared()


@pytest.mark.slow
def test_training_starts_in_a_folder_that_holds_one_named_like_a_package_of_the_project(image_tree, tmp_path):
    shutil.copytree(image_tree, tmp_path / 'data')
    command = [ROOT / 'main.py', '--cfg', TINY, '--data-path', 'data', '--output', 'output']
    done = start(*command, '--opts', 'DATA.NUM_WORKERS', '1', 'SAVE_STEPS', '1', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'Error' not in done.stderr
