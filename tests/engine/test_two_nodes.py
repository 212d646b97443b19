"""Two nodes, as two network namespaces of this machine: the documented command, and a node that dies."""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.checkpoint import load_checkpoint
from tests.helpers.documents import commands
from tests.helpers.images import write_images
from tests.helpers.paths import ROOT, TINY
from tests.helpers.processes import RUN_OPTIONS, environment
from tests.helpers.runs import differences
from tools.rehearsal.launch import children

pytestmark = pytest.mark.slow


def sh(*commands):
    for command in commands:
        subprocess.run(command.split(), check=True, capture_output=True, text=True)


@pytest.fixture(scope='module')
def nodes():
    """Names of two namespaces, also their host names: 10.77.0.1 and 10.77.0.2."""
    if sys.platform != 'linux' or os.geteuid() or not all(map(shutil.which, ('ip', 'unshare'))):
        pytest.skip('network namespaces need Linux, root and iproute2')
    names = [f'msg-{letter}-{os.getpid()}' for letter in 'ab']
    folders = [Path('/etc/netns') / name for name in names]
    try:
        try:
            sh(*(f'ip netns add {name}' for name in names))
            sh(f'ip link add veth0 netns {names[0]} type veth peer name veth0 netns {names[1]}')
        except subprocess.CalledProcessError as error:
            pytest.skip(f'no network namespaces here: {error.stderr.strip()}')
        for number, (name, folder) in enumerate(zip(names, folders, strict=True), start=1):
            sh(f'ip -n {name} addr add 10.77.0.{number}/24 dev veth0')
            sh(f'ip -n {name} link set veth0 up', f'ip -n {name} link set lo up')
            folder.mkdir(parents=True)
            # `ip netns exec` binds this over /etc/hosts.
            (folder / 'hosts').write_text(f'127.0.0.1 localhost\n10.77.0.1 {names[0]}\n10.77.0.2 {names[1]}\n')
        yield names
    finally:
        for name, folder in zip(names, folders, strict=True):
            subprocess.run(['ip', 'netns', 'del', name], capture_output=True)
            shutil.rmtree(folder, ignore_errors=True)


def documented_command(first_node, tree, output, tag):
    """The two-node command of docs/launching.md, with a user's values."""
    (command,) = (x for x in commands((ROOT / 'docs' / 'launching.md').read_text()) if '--nnodes 2' in x)
    for placeholder, value in {
        '<first node>': first_node,
        '<imagenet>': str(tree),
        '--nproc_per_node 8': '--nproc_per_node 1',
        '--batch-size 64': '--batch-size 4',
        'configs/msg_base_p4_win7_224.yaml': str(TINY),
    }.items():
        assert placeholder in command, placeholder
        command = command.replace(placeholder, value)
    return f'{command} --output {output} --tag {tag} --opts {RUN_OPTIONS} TRAIN.EPOCHS 40'


class Node:
    """A torchrun on a node, and the ranks it has started."""

    def __init__(self, name, command, output):
        self.output = output
        torchrun = f'{shlex.quote(sys.executable)} -m torch.distributed.run'
        inside = f'hostname {name}; exec env {command.replace("torchrun", torchrun, 1)}'
        with output.open('a') as file:
            self.process = subprocess.Popen(
                ['ip', 'netns', 'exec', name, 'unshare', '--uts', 'sh', '-c', inside],
                cwd=ROOT, env=environment(), stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip

    def kill(self, with_ranks):
        ranks = children(self.process.pid)
        self.process.kill()
        for rank in ranks if with_ranks else ():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('nodes')
    write_images(folder / 'tree')
    return folder


def start(nodes, folder, tag):
    command = documented_command(nodes[0], folder / 'tree', folder / 'output', tag)
    return [Node(name, command, folder / f'{tag}_{name}.txt') for name in nodes], command


def finish(running, folder, tag):
    for node in running:
        assert node.process.wait(300) == 0, node.output.read_text()
    return load_checkpoint(folder / 'output' / 'tiny' / tag / 'ckpt_epoch_39.pth')


@pytest.fixture(scope='module')
def uninterrupted(nodes, folder):
    running, _ = start(nodes, folder, 'uninterrupted')
    return finish(running, folder, 'uninterrupted')


@pytest.mark.parametrize('with_ranks', [True, False], ids=['the whole node', 'torchrun alone'])
def test_node_that_dies_and_comes_back_changes_no_bit(nodes, folder, uninterrupted, with_ranks):
    tag = f'interrupted_{with_ranks}'
    running, command = start(nodes, folder, tag)
    log = folder / 'output' / 'tiny' / tag / 'log_rank0.txt'
    end = time.monotonic() + 120
    while not (log.exists() and 'Train: [5/40]' in log.read_text()):
        assert time.monotonic() < end, running[0].output.read_text()
        time.sleep(0.05)
    running[1].kill(with_ranks)
    running[1] = Node(nodes[1], command, running[1].output)
    assert differences(uninterrupted, finish(running, folder, tag)) == []
    assert 'the run resumes bit for bit, as if it had never stopped' in log.read_text()
