"""Real training processes that are killed, stopped and starved, and what is left of them."""

import contextlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

from checkpoint import CheckpointFolder, load_checkpoint
from signals import EXIT_STOPPED
from tests.conftest import ROOT, TINY, write_images
from tests.test_command_line import environment
from tests.test_resume import differences

TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node']

# Random augmentation and Mixup stay on; epochs short, so that evaluation and both kinds of save come often.
OPTIONS = 'TRAIN.EPOCHS 12 SAVE_STEPS 3 SAVE_KEEP 3 DATA.NUM_WORKERS 2 MODEL.DROP_PATH_RATE 0.2 TRAIN.EMA_DECAY 0.9'


class Job:
    """A training program in a process group of its own.

    Args:
        folder: of its data and output.
        tag: of the run.
        launcher: arguments of Python before the program.
        options: config keys and values besides `OPTIONS`.
        limit: largest size of a file that it may write, in bytes.
        pipe: write what it says into a pipe, in place of a file beside its data.
    """

    def __init__(self, folder, tag, launcher=(), options='', limit=None, pipe=False):
        self.run = folder / 'output' / 'tiny' / tag
        command = [sys.executable, *launcher, 'main.py', '--cfg', TINY, '--data-path', folder / 'tree']
        command += ['--output', folder / 'output', '--tag', tag, '--opts', *OPTIONS.split(), *options.split()]
        self.said = folder.parent / f'{folder.name}_{tag}.txt'
        with self.said.open('a') as said:
            self.process = subprocess.Popen(
                list(map(str, command)), cwd=ROOT, env=environment(), start_new_session=True,
                stdout=subprocess.PIPE if pipe else said, stderr=subprocess.STDOUT,
                preexec_fn=limit and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))),
            )  # fmt: skip

    def wait(self, timeout=120):
        return self.process.wait(timeout)

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def wait_for(self, condition, timeout=120):
        """Wait, as closely as the machine can, until a condition holds; whether it came before the program's end."""
        end = time.monotonic() + timeout
        while not condition():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < end, self.said.read_text()
        return True

    def log(self, rank=0):
        path = self.run / f'log_rank{rank}.txt'
        return path.read_text() if path.exists() else ''

    def last(self):
        return load_checkpoint(self.run / 'ckpt_epoch_11.pth')

    def names(self):
        return {path.name for path in self.run.glob('ckpt_*')}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('survival')
    write_images(folder / 'tree')
    return folder


@pytest.fixture(scope='module')
def undisturbed(folder):
    """The run that nothing happens to, and the seconds it takes from its first checkpoint on."""
    job = Job(folder, 'undisturbed')
    assert job.wait_for(lambda: job.run.exists() and job.names())
    began = time.monotonic()
    assert job.wait() == 0, job.said.read_text()
    return job.last(), time.monotonic() - began


def survives_kills(folder, undisturbed, tag, count, seed):
    """Kill a run `count` times, every third time while it saves, and let it end."""
    expected, seconds = undisturbed
    chance, kinds = random.Random(seed), set()
    for number in range(count):
        before = Job(folder, tag)
        began = (before.run / 'log_rank0.txt').stat().st_size if before.log() else 0

        def has_begun(job=before, began=began):
            return 'Train: [' in job.log()[began:]

        assert before.wait_for(has_begun), before.said.read_text()
        if number % 3 == 0:
            wait = before.wait_for(lambda job=before: any(name.endswith('.tmp') for name in job.names()))
        else:
            time.sleep(chance.uniform(0, seconds / count))
            wait = True
        before.kill()
        if wait and any(name.endswith('.tmp') for name in before.names()):
            kinds.add('saving')
        kinds.add('killed' if before.process.returncode == -signal.SIGKILL else 'ended')
    job = Job(folder, tag)
    assert job.wait() == 0, job.said.read_text()
    assert differences(expected, job.last()) == []
    assert not any(name.endswith('.tmp') for name in job.names())
    figures = [json.loads(line) for line in (job.run / 'metrics.jsonl').read_text().splitlines()]
    assert [record['epoch'] for record in figures if record['kind'] == 'epoch'] == list(range(12))
    return kinds


def test_a_run_killed_three_times_ends_with_the_same_bits(folder, undisturbed):
    assert 'killed' in survives_kills(folder, undisturbed, 'killed_3', count=3, seed=time.time_ns())


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_with_the_same_bits(folder, undisturbed):
    kinds = survives_kills(folder, undisturbed, 'killed_20', count=20, seed=time.time_ns())
    assert kinds >= {'killed', 'saving'}


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_finishes_the_update_saves_and_exits(folder, undisturbed, number):
    job = Job(folder, f'signal_{number.name}')
    assert job.wait_for(lambda: 'Train: [1/12]' in job.log())
    os.killpg(job.process.pid, number)  # as launchers do: the loader processes get it too
    assert job.wait(30) == EXIT_STOPPED, job.said.read_text()
    assert f'{number.name}: stopping after this update' in job.said.read_text()
    assert 'stopped by a signal: start again to continue from' in job.log()
    assert 'Traceback' not in job.said.read_text()
    job = Job(folder, f'signal_{number.name}')
    assert job.wait() == 0, job.said.read_text()
    assert differences(undisturbed[0], job.last()) == []


def test_a_stop_is_saved_where_nobody_reads_what_the_run_says(folder):
    """As of Ctrl-C on `python main.py ... 2>&1 | tee log`, which ends tee first."""
    job = Job(folder, 'unread', pipe=True)
    assert job.wait_for(lambda: 'Train: [1/12]' in job.log())
    job.process.stdout.close()
    job.process.send_signal(signal.SIGINT)
    assert job.wait(30) == EXIT_STOPPED
    assert 'stopped by a signal' in job.log()


def test_a_signal_inside_an_evaluation_loses_no_update(folder, undisturbed):
    job = Job(folder, 'evaluation')
    assert job.wait_for(lambda: 'EPOCH 3 training takes' in job.log())
    job.process.send_signal(signal.SIGTERM)
    assert job.wait(30) == EXIT_STOPPED, job.said.read_text()
    job = Job(folder, 'evaluation')
    assert job.wait() == 0, job.said.read_text()
    assert differences(undisturbed[0], job.last()) == []


# A process whose evaluation never ends, and does not ask whether to stop. As in a wait for another rank or for the GPU,
# it stays in C, where no signal handler of Python's runs.
STUCK = """
import ctypes, sys, main, config

def wait(*_):
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)

main.validate = wait
sys.argv[0] = 'main.py'
main.main(config.get_config(main.parse_option()))
"""


def test_a_second_signal_exits_at_once(folder):
    script = folder / 'stuck.py'
    script.write_text(STUCK)
    command = [
        sys.executable,
        '-c',
        STUCK,
        '--cfg',
        TINY,
        '--data-path',
        folder / 'tree',
        '--output',
        folder / 'output',
    ]
    command += ['--tag', 'stuck']
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


def children(pid):
    """Processes that a process has started, from the system's table."""
    listed = subprocess.run(['ps', '-o', 'pid=', '--ppid', str(pid)], capture_output=True, text=True).stdout
    return [int(child) for child in listed.split()]


@pytest.mark.slow
def test_three_ranks_add_their_gradients_in_the_same_order_after_a_stop(folder):
    """Two ranks do in any case; three only where PyTorch does not group the gradients anew after the first update."""
    ranks = [*TORCHRUN, '3']
    options = 'DATA.BATCH_SIZE 2 TRAIN.EPOCHS 12 MODEL.MSG.EMBED_DIM 32 DATA.NUM_WORKERS 0'
    whole = Job(folder, 'three', ranks, options)
    assert whole.wait() == 0, whole.said.read_text()
    start = whole.run / 'ckpt_epoch_10.pth'
    again = Job(folder, 'three_again', ranks, f'{options} MODEL.RESUME {start}')
    assert again.wait() == 0, again.said.read_text()
    assert differences(whole.last(), again.last()) == []


def two_ranks(folder, tag, options='', restarts=0):
    return Job(folder, tag, [*TORCHRUN, '2', '--max-restarts', str(restarts)], options)


@pytest.fixture(scope='module')
def undisturbed_pair(folder):
    job = two_ranks(folder, 'pair')
    assert job.wait() == 0, job.said.read_text()
    return job.last()


def test_two_ranks_agree_where_to_stop_and_go_on_with_the_same_bits(folder, undisturbed_pair):
    job = two_ranks(folder, 'stopped_pair')
    assert job.wait_for(lambda: 'Train: [2/12]' in job.log() and 'Train: [2/12]' in job.log(rank=1))
    os.kill(children(job.process.pid)[1], signal.SIGTERM)  # one rank alone
    assert job.wait(60) != 0
    said = job.said.read_text()
    assert said.count('SIGTERM: stopping after this update') == 1
    assert said.count(f'exitcode  : {EXIT_STOPPED}') == 2, said  # each rank's, as torchrun tells them
    assert 'Traceback' not in said.split('torch/distributed')[0]
    job = two_ranks(folder, 'stopped_pair')
    assert job.wait_for(lambda: 'Train: [7/12]' in job.log())
    job.process.send_signal(signal.SIGTERM)  # to torchrun, which passes it on to both ranks
    assert job.wait(60) != 0
    assert 'stopped by a signal' in job.log().splitlines()[-1]
    job = two_ranks(folder, 'stopped_pair')
    assert job.wait() == 0, job.said.read_text()
    assert differences(undisturbed_pair, job.last()) == []
    continued = [line for line in job.log().splitlines() if 'the run goes on, ' in line]
    assert len(continued) == 2
    assert all('bit for bit as if it had not stopped' in line for line in continued)


def test_a_killed_rank_takes_the_other_down_and_torchrun_starts_them_again(folder, undisturbed_pair):
    job = two_ranks(folder, 'dead_rank')
    assert job.wait_for(lambda: 'Train: [2/12]' in job.log())
    ranks = children(job.process.pid)
    os.kill(ranks[0], signal.SIGKILL)
    assert job.wait(60) != 0  # within a minute
    assert all(not os.path.exists(f'/proc/{rank}') for rank in ranks)
    job = two_ranks(folder, 'dead_rank', restarts=1)
    assert job.wait_for(lambda: 'Train: [6/12]' in job.log())
    os.kill(children(job.process.pid)[0], signal.SIGKILL)
    assert job.wait() == 0, job.said.read_text()
    assert differences(undisturbed_pair, job.last()) == []


def test_another_number_of_ranks_goes_on_and_says_what_changes(folder, undisturbed_pair):
    job = Job(folder, 'pair', options='TRAIN.EPOCHS 13')
    assert job.wait() == 0, job.said.read_text()
    told = 'not bit for bit: it is of 2 processes: random numbers start anew; TRAIN.EPOCHS has changed'
    assert told in job.log()


def test_the_average_of_the_weights_is_the_same_on_every_rank(folder):
    """The ranks start from their own seeds; what they evaluate must be what rank 0 saves."""
    options = 'TRAIN.EMA_DECAY 0.9999 TRAIN.EPOCHS 2'
    job = two_ranks(folder, 'average', options)
    assert job.wait() == 0, job.said.read_text()
    last = json.loads((job.run / 'metrics.jsonl').read_text().splitlines()[-1])
    checkpoint = job.run / 'ckpt_epoch_1.pth'
    alone = Job(folder, 'alone', options=f'{options} EVAL_MODE True MODEL.RESUME {checkpoint}')
    assert alone.wait() == 0, alone.said.read_text()
    losses = [float(loss) for loss in re.findall(r'Test: \[2/3\].*Loss [\d.]+ \(([\d.]+)\)', alone.log())]
    assert losses == pytest.approx([last['val_loss'], last['ema_val_loss']], abs=1e-4)


def test_a_bad_loss_in_one_rank_stops_both_before_the_update(folder):
    """A pixel that is not finite, as a broken augmentation would make it, in one of the images."""
    script = folder / 'bad_rank.py'
    script.write_text(
        'import os, main, config, trainer, utils\n'
        'step = trainer.Trainer.train_step\n'
        'def train_step(self, batches):\n'
        '    if os.environ["RANK"] == "1" and (self.state.epoch, self.state.step) == (1, 1):\n'
        '        batches[0][0][0, 0, 0, 0] = float("nan")\n'
        '    return step(self, batches)\n'
        'trainer.Trainer.train_step = train_step\n'
        'with utils.mistakes_in_one_line():\n'
        '    main.main(config.get_config(main.parse_option()))\n'
    )
    command = [sys.executable, *TORCHRUN, '2', script, '--cfg', TINY, '--data-path', folder / 'tree', '--output']
    command += [folder / 'output', '--tag', 'bad_rank', '--opts', 'PRINT_FREQ', '1000']
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode != 0
    run = folder / 'output' / 'tiny' / 'bad_rank'
    told = 'not finite at epoch 1, update 1, learning rate 0.000781: nothing was updated since.'
    assert done.stderr.count(told) == 2, done.stderr  # on both ranks
    assert f'The last good checkpoint is {run / "ckpt_epoch_0.pth"}' in done.stderr
    weights = load_checkpoint(run / 'ckpt_epoch_0.pth')['model']
    assert all(value.isfinite().all() for value in weights.values())
    assert {path.name for path in run.glob('ckpt_*')} == {'ckpt_epoch_0.pth', 'ckpt_best.pth'}


def test_a_full_disk_stops_the_run_and_leaves_the_older_checkpoints(folder, undisturbed):
    job = Job(folder, 'full')
    assert job.wait_for(lambda: 'ckpt_epoch_2.pth saved' in job.log())
    job.kill()
    before = {path.name: path.read_bytes() for path in job.run.glob('ckpt_*.pth')}
    size = max(map(len, before.values()))
    job = Job(folder, 'full', limit=size // 2)  # of each file: a failed write in the middle of a checkpoint
    assert job.wait() == 1
    said = job.said.read_text().strip().splitlines()
    assert said[-1].startswith('error: ')
    assert 'cannot be written: File too large. Earlier checkpoints are as they were: make room' in said[-1]
    assert 'Traceback' not in job.said.read_text()
    assert {path.name: path.read_bytes() for path in job.run.glob('ckpt_*')} == before
    job = Job(folder, 'full')
    assert job.wait() == 0
    assert differences(undisturbed[0], job.last()) == []


@contextlib.contextmanager
def mounted(path, options):
    """A small file system of its own at a path, or a skip where this user may not mount one."""
    path.mkdir()
    done = subprocess.run(['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', path], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f'no tmpfs can be mounted: {done.stderr.strip()}')
    try:
        yield
    finally:
        subprocess.run(['umount', '-l', path], check=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='mounts a tmpfs, which is of Linux')
def test_a_full_and_a_read_only_file_system(folder, undisturbed):
    with mounted(folder / 'disk', 'size=2m'):
        (folder / 'disk' / 'tree').symlink_to(folder / 'tree')
        job = Job(folder / 'disk', 'full', options='SAVE_KEEP 0')  # each checkpoint takes about 100 kB
        assert job.wait() == 1
        said = job.said.read_text()
        assert 'cannot be written: No space left on device. Earlier checkpoints are as they were' in said, said
        assert 'Traceback' not in said
        names = job.names()
        assert not any(name.endswith('.tmp') for name in names)
        assert all(load_checkpoint(job.run / name) for name in names)
        subprocess.run(['mount', '-o', 'remount,size=40m', folder / 'disk'], check=True)
        job = Job(folder / 'disk', 'full', options='SAVE_KEEP 0')
        assert job.wait() == 0, job.said.read_text()
        assert differences(undisturbed[0], job.last()) == []

        subprocess.run(['mount', '-o', 'remount,ro', folder / 'disk'], check=True)
        job = Job(folder / 'disk', 'read_only')
        assert job.wait() == 1
        said = job.said.read_text().strip()
        assert said.endswith('Read-only file system: write another --output, or make room')
        assert 'Traceback' not in said


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_damaged_checkpoints_are_passed_over_but_not_where_one_is_asked_for(folder, undisturbed):
    job = Job(folder, 'damaged', options='SAVE_KEEP 0')
    assert job.wait_for(lambda: 'ckpt_epoch_3.pth saved' in job.log())
    job.kill()
    owned = folder / 'owned'
    newest = CheckpointFolder(job.run, 0, None).all()[:4]
    whole = newest[0].read_bytes()
    newest[0].write_bytes(whole[: len(whole) // 2])
    newest[1].write_bytes(b'')
    newest[2].write_bytes(b'garbage' * 99)
    torch.save({'model': Malicious(owned)}, newest[3])
    for path in (newest[0], newest[3]):
        explicit = Job(folder, 'explicit', options=f'MODEL.RESUME {path}')
        assert explicit.wait() == 1
        told = explicit.said.read_text().strip().splitlines()[-1]
        assert told.startswith(f'error: {path} is not a checkpoint that can be read safely')

    job = Job(folder, 'damaged')
    assert job.wait() == 0, job.said.read_text()
    for path in newest:
        assert f'passing over a damaged checkpoint: {path} is not a checkpoint' in job.log()
    assert not owned.exists()
    assert differences(undisturbed[0], job.last()) == []
