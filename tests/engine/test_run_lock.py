"""One writer per run folder; test_two_writers has real runs."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import utils
from engine import run_lock
from engine.run_lock import RunLock, RunLockError
from tests.helpers.paths import ROOT
from tests.helpers.processes import wait_for

HOLDER = """
import errno, fcntl, logging, os, sys, time
from pathlib import Path
from engine.run_lock import RunLock
if sys.argv[2:] == ['no_locks']:
    def refuse(*_): raise OSError(errno.ENOLCK, 'No locks available')
    fcntl.lockf = os.lockf = refuse
lock = RunLock(Path(sys.argv[1]), logging.getLogger('holder'))
lock.acquire(0)
if sys.argv[2:] == ['fork'] and os.fork() == 0:
    time.sleep(600)
print('locked', flush=True)
time.sleep(600)
"""


def lock_in(folder):
    return RunLock(folder, logging.getLogger('test'))


@pytest.fixture
def holder(tmp_path):
    """A function that starts another process holding the lock of the test's folder."""
    started = []

    def start(*arguments):
        process = subprocess.Popen(
            [sys.executable, '-c', HOLDER, str(tmp_path), *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        assert process.stdout.readline() == 'locked\n'
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


@pytest.fixture
def without_locks(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(os, 'lockf', refuse)
    monkeypatch.setattr(fcntl, 'lockf', refuse)


def test_lock_leaves_nothing_and_is_taken_again(tmp_path):
    for _ in range(2):
        lock = lock_in(tmp_path)
        assert lock.acquire(0)
        lock.check()
        assert json.loads((tmp_path / 'run.lock').read_text())['pid'] == os.getpid()
        lock.release()
        assert list(tmp_path.iterdir()) == []
    lock.release()  # without effect


def test_holder_is_named_and_waited_for(tmp_path, holder, caplog):
    process = holder()
    lock = lock_in(tmp_path)
    assert lock.is_held_by_another()
    start = time.monotonic()
    with pytest.raises(RunLockError) as error:
        lock.acquire(0.5)
    assert time.monotonic() - start >= 0.5
    message = f'is being written to by process {process.pid} on {os.uname().nodename} since 20'
    assert message in str(error.value)
    assert str(error.value).endswith('stop that run, or write another --tag')
    assert caplog.text.count('waiting up to 0 s for it to end') == 1
    assert not lock.acquire(60, is_stopped=lambda: True)
    lock.release()  # gives up waiting, not the other's lock
    assert lock_in(tmp_path).is_held_by_another()
    os.kill(process.pid, signal.SIGKILL)
    assert lock.acquire(60)  # the dying predecessor
    assert not lock_in(tmp_path / 'other').is_held_by_another()
    lock.release()


def test_a_killed_holders_loader_processes_do_not_keep_the_lock(tmp_path, holder):
    process = holder('fork')
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    lock = lock_in(tmp_path)
    assert lock.acquire(0)
    lock.release()


def test_a_lock_whose_file_was_removed_is_written_again(tmp_path, caplog):
    lock = lock_in(tmp_path)
    lock.acquire(0)
    (tmp_path / 'run.lock').unlink()
    lock.check()
    assert 'was removed while this run writes to its folder' in caplog.text
    assert json.loads((tmp_path / 'run.lock').read_text())['pid'] == os.getpid()
    lock.release()


def test_a_lock_that_another_process_has_taken_is_lost(tmp_path, holder):
    lock = lock_in(tmp_path)
    lock.acquire(0)
    (tmp_path / 'run.lock').unlink()
    holder()
    with pytest.raises(RunLockError, match='another process has taken .* over: this run writes nothing more to it'):
        lock.check()
    lock.release()
    assert lock_in(tmp_path).is_held_by_another()


def test_lease_where_there_are_no_locks(tmp_path, without_locks, monkeypatch):
    monkeypatch.setattr(run_lock, 'HEARTBEAT', 0.05)
    lock, other = lock_in(tmp_path), lock_in(tmp_path)
    assert lock.acquire(0)
    assert [path.name for path in tmp_path.iterdir()] == ['run.lock']
    assert other.is_held_by_another()
    os.utime(tmp_path / 'run.lock', (0, 0))
    wait_for(lambda: (tmp_path / 'run.lock').stat().st_mtime > 0)  # until the next heartbeat
    with pytest.raises(RunLockError, match=f'is being written to by process {os.getpid()} on .* since 20'):
        other.acquire(0.1)
    lock.check()
    (tmp_path / 'run.lock').unlink()
    lock.check()  # written again
    lock.release()
    assert list(tmp_path.iterdir()) == []
    assert other.acquire(0)
    (tmp_path / 'run.lock').write_text('{"token": "of another"}')
    with pytest.raises(RunLockError, match='has taken .* over'):
        other.check()
    other.release()
    assert (tmp_path / 'run.lock').exists()  # not ours any more


@pytest.mark.parametrize('host', ['here', 'elsewhere'])
@pytest.mark.parametrize('locks', [True, False])
def test_lease_of_a_dead_holder_is_taken_over(tmp_path, monkeypatch, request, host, locks):
    if not locks:
        request.getfixturevalue('without_locks')
    dead = subprocess.Popen(['true'])
    dead.wait()
    name = os.uname().nodename if host == 'here' else 'another-host'
    record = {'host': name, 'pid': dead.pid, 'since': 'yesterday', 'token': 'x', 'is_lease': True}
    (tmp_path / 'run.lock').write_text(json.dumps(record))
    lock = lock_in(tmp_path)
    assert lock.is_held_by_another() == (host == 'elsewhere')  # only missing heartbeats tell
    if host == 'elsewhere':
        with pytest.raises(RunLockError, match='process .* on another-host since yesterday'):
            lock.acquire(0)
        monkeypatch.setattr(run_lock, 'EXPIRY', 0.3)
        time.sleep(0.5)
    assert lock.acquire(0)
    assert json.loads((tmp_path / 'run.lock').read_text())['pid'] == os.getpid()
    assert [path.name for path in tmp_path.iterdir()] == ['run.lock']
    lock.release()


def test_a_process_without_locks_respects_a_lock(tmp_path, holder, without_locks):
    process = holder()
    with pytest.raises(RunLockError, match=f'by process {process.pid} on'):
        lock_in(tmp_path).acquire(0)
    assert lock_in(tmp_path).is_held_by_another()
    assert json.loads((tmp_path / 'run.lock').read_text())['pid'] == process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    lock = lock_in(tmp_path)
    assert lock.acquire(0)
    lock.release()


def test_a_process_with_locks_respects_a_lease(tmp_path, holder):
    process = holder('no_locks')
    with pytest.raises(RunLockError, match=f'by process {process.pid} on'):
        lock_in(tmp_path).acquire(0)
    assert lock_in(tmp_path).is_held_by_another()


def test_of_several_that_find_a_lease_free_one_has_it(tmp_path, without_locks):
    locks = [lock_in(tmp_path) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        taken = list(pool.map(lambda lock: lock._try(), locks))
    assert taken.count(True) == 1
    locks[taken.index(True)].check()
    for lock in locks:
        lock.release()


def test_other_errors_are_errors(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, 'Input/output error')

    monkeypatch.setattr(fcntl, 'lockf', fail)
    with pytest.raises(OSError, match='Input/output'):
        lock_in(tmp_path).acquire(0)


def test_temporary_files_of_dead_processes_go_before_the_lock_is_written(tmp_path, monkeypatch):
    dead = subprocess.Popen(['true'])
    dead.wait()
    here = utils._host_hash()
    temporary = tmp_path / f'ckpt_epoch_0.pth.{here}-{dead.pid}-01234567.tmp'
    temporary.touch()
    (tmp_path / f'ckpt_epoch_1.pth.{here}-{os.getpid()}-01234567.tmp').touch()  # alive
    (tmp_path / f'ckpt_epoch_2.pth.0123456789ab-{dead.pid}-01234567.tmp').touch()  # perhaps alive, in a container
    write = os.pwrite

    def write_to_disk(*arguments):
        if temporary.exists():
            raise OSError(errno.ENOSPC, 'No space left on device')
        return write(*arguments)

    monkeypatch.setattr(os, 'pwrite', write_to_disk)
    lock = lock_in(tmp_path)
    assert lock.acquire(0)
    assert len(list(tmp_path.glob('*.tmp'))) == 2
    lock.release()


def test_container_of_the_same_name_is_another_host(tmp_path, without_locks):
    dead = subprocess.Popen(['true'])
    dead.wait()
    record = {'host': os.uname().nodename, 'pid': dead.pid, 'since': 'today', 'token': 'x', 'is_lease': True}
    for host_id, is_held in ((utils.host_id(), False), (utils.host_id() + '1', True)):
        (tmp_path / 'run.lock').write_text(json.dumps(record | {'host_id': host_id}))
        assert lock_in(tmp_path).is_held_by_another() == is_held


@pytest.mark.parametrize('locks', [True, False])
def test_lease_of_the_future_has_expired(tmp_path, request, locks):
    if not locks:
        request.getfixturevalue('without_locks')
    record = {'host': 'other', 'pid': 1, 'since': 'tomorrow', 'token': 'x', 'is_lease': True}
    (tmp_path / 'run.lock').write_text(json.dumps(record))
    os.utime(tmp_path / 'run.lock', (time.time() + 10_000, time.time() + 10_000))
    lock = lock_in(tmp_path)
    assert not lock.is_held_by_another()
    assert lock.acquire(0)
    lock.release()


def damaged_holders():
    """Contents that a lock file should not have, from a fixed seed."""
    rng = random.Random(0)
    values = [
        None,
        True,
        -1,
        0,
        10**30,
        1.5,
        float('nan'),
        float('inf'),
        '',
        'x\x1b[2J',
        '\ud800',
        [],
        {},
        [[1]],
        'é' * 99,
    ]
    names = ['host', 'host_id', 'pid', 'since', 'token', 'is_lease', 'other']
    whole = json.dumps({'host': 'a', 'pid': 1, 'since': 'now', 'token': 'x', 'is_lease': True}).encode()
    yield from (b'', b'[]', b'null', b'3', b'"x"', b'\xff\xfe', b'[' * 9_000, b'9' * 9_000, whole[:20])
    for _ in range(200):
        record = json.dumps({name: rng.choice(values) for name in rng.sample(names, rng.randint(0, 7))}).encode()
        if rng.random() < 0.3:
            record = bytearray(record)
            record[rng.randrange(len(record))] = rng.randrange(256)
        yield bytes(record[: rng.randint(0, len(record))]) if rng.random() < 0.3 else bytes(record)


@pytest.mark.parametrize('locks', [True, False])
def test_damaged_lock_file_is_another_process_until_its_heartbeat_expires(tmp_path, request, locks):
    if not locks:
        request.getfixturevalue('without_locks')
        request.getfixturevalue('monkeypatch').setattr(run_lock, 'SETTLE', 0)
    for content in damaged_holders():
        (tmp_path / 'run.lock').write_bytes(content)
        if lock_in(tmp_path).is_held_by_another():
            with pytest.raises(RunLockError) as error:
                lock_in(tmp_path).acquire(0)
            assert str(error.value).isprintable()
            os.utime(tmp_path / 'run.lock', (0, 0))
        lock = lock_in(tmp_path)
        assert lock.acquire(0)
        lock.check()
        lock.release()
        assert not (tmp_path / 'run.lock').exists()
