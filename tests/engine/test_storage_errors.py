"""Full disks, read-only file systems and damaged checkpoints: earlier checkpoints survive, and runs resume."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch

from engine.checkpoint import load_checkpoint
from engine.run_folder import RunFolder
from tests.helpers.processes import SpawnedRun
from tests.helpers.runs import differences


@pytest.mark.slow
def test_full_disk_stops_the_run_and_leaves_earlier_checkpoints(folder, uninterrupted):
    run = SpawnedRun(folder, 'full')
    assert run.wait_for(lambda: 'ckpt_epoch_2.pth saved' in run.log())
    run.kill()
    before = {path.name: path.read_bytes() for path in run.folder.glob('ckpt_*.pth')}
    size = max(map(len, before.values()))
    run = SpawnedRun(folder, 'full', limit=size // 2)  # of each file: a write fails in the middle of a checkpoint
    assert run.wait() == 1
    output = run.output.read_text()
    last_line = output.strip().splitlines()[-1]
    assert last_line.startswith('error: ')
    assert 'cannot be written: File too large. Earlier checkpoints are intact: make room' in last_line
    assert 'Traceback' not in output
    assert {path.name: path.read_bytes() for path in run.folder.glob('ckpt_*')} == before
    run = SpawnedRun(folder, 'full')
    assert run.wait() == 0, run.output.read_text()
    assert differences(uninterrupted[0], run.last_checkpoint()) == []


@contextlib.contextmanager
def mounted_tmpfs(path, options):
    """A tmpfs of its own at a path; a skip where this user may not mount one."""
    path.mkdir()
    done = subprocess.run(['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', path], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f'no tmpfs can be mounted: {done.stderr.strip()}')
    try:
        yield
    finally:
        subprocess.run(['umount', '-l', path], check=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='mounts a tmpfs, which needs Linux')
def test_full_and_read_only_file_systems(folder, uninterrupted):
    disk = folder / 'disk'
    with mounted_tmpfs(disk, 'size=2m'):
        (disk / 'tree').symlink_to(folder / 'tree')
        run = SpawnedRun(disk, 'full', options='SAVE_KEEP 0')  # each checkpoint takes about 100 kB
        assert run.wait() == 1
        output = run.output.read_text()
        assert 'cannot be written: No space left on device. Earlier checkpoints are intact' in output, output
        assert 'Traceback' not in output
        names = run.checkpoint_names()
        assert not any(name.endswith('.tmp') for name in names)
        assert all(load_checkpoint(run.folder / name) for name in names)
        subprocess.run(['mount', '-o', 'remount,size=40m', disk], check=True)
        run = SpawnedRun(disk, 'full', options='SAVE_KEEP 0')
        assert run.wait() == 0, run.output.read_text()
        assert differences(uninterrupted[0], run.last_checkpoint()) == []

        subprocess.run(['mount', '-o', 'remount,ro', disk], check=True)
        run = SpawnedRun(disk, 'read_only')
        assert run.wait() == 1
        output = run.output.read_text().strip()
        assert output.endswith('Read-only file system: write another --output, or make room')
        assert 'Traceback' not in output


class Malicious:
    """An object whose unpickling makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.slow
def test_damaged_checkpoints_are_skipped_unless_asked_for(folder, uninterrupted):
    run = SpawnedRun(folder, 'damaged', options='SAVE_KEEP 0')
    assert run.wait_for(lambda: 'ckpt_epoch_3.pth saved' in run.log())
    run.kill()
    (run.folder / 'ckpt_best.pth').unlink()  # it may be as new
    unpickled = folder / 'unpickled'
    newest = RunFolder(run.folder, 0, None).checkpoints()[:4]
    content = newest[0].read_bytes()
    newest[0].write_bytes(content[: len(content) // 2])
    newest[1].write_bytes(b'')
    newest[2].write_bytes(b'garbage' * 99)
    torch.save({'model': Malicious(unpickled)}, newest[3])
    for path in (newest[0], newest[3]):
        explicit = SpawnedRun(folder, 'explicit', options=f'MODEL.RESUME {path}')
        assert explicit.wait() == 1
        last_line = explicit.output.read_text().strip().splitlines()[-1]
        assert last_line.startswith(f'error: {path} is not a checkpoint that can be read safely')

    run = SpawnedRun(folder, 'damaged')
    assert run.wait() == 0, run.output.read_text()
    for path in newest:
        assert f'skipping a damaged checkpoint: {path} is not a checkpoint' in run.log()
    assert not unpickled.exists()
    assert differences(uninterrupted[0], run.last_checkpoint()) == []
