"""Programs started as a user starts them, in processes of their own."""

import contextlib
import io
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from unittest import mock

import torch.distributed as dist
import torch.multiprocessing as mp

from data.workers import worker_context
from engine import distributed
from engine.checkpoint import load_checkpoint
from engine.distributed import TORCHRUN_VARIABLES
from tests.helpers.paths import ROOT, TINY
from tools.rehearsal.launch import descendants

TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node']

# Options of `SpawnedRun`: augmentation and Mixup stay on; epochs are short, so evaluation and both saves come often.
RUN_OPTIONS = 'TRAIN.EPOCHS 12 SAVE_STEPS 3 SAVE_KEEP 3 DATA.NUM_WORKERS 0 MODEL.DROP_PATH_RATE 0.2 TRAIN.EMA_DECAY 0.9'
RUN_OPTIONS += ' MODEL.MSG.EMBED_TYPE conv'  # batch norms, whose running statistics each process has for itself
RUN_OPTIONS += ' DATA.SAMPLING balanced AUG.REPEATS 2 TRAIN.OPTIMIZER.NAME lamb TRAIN.LR_SCHEDULER.UNIT epoch'


def environment(**variables):
    """The environment of a program that a user starts, and not a launcher."""
    inherited = {key: value for key, value in os.environ.items() if key not in TORCHRUN_VARIABLES}
    return (
        inherited
        | {'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'PYTHONUNBUFFERED': '1', 'PYTHONFAULTHANDLER': '1'}
        | variables
    )


def start(*command, timeout=300, variables=None, cwd=ROOT):
    """Run Python with these arguments to its end."""
    command = [sys.executable, *map(str, command)]
    return subprocess.run(
        command, cwd=cwd, env=environment(**(variables or {})), capture_output=True, text=True, timeout=timeout
    )


def run_here(*command, variables=None):
    """Run a program like `start`, but in this process, which saves the seconds that imports take."""
    argv = list(map(str, command))
    is_module = argv[0] == '-m'
    argv = argv[1:] if is_module else argv
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, 'argv', argv),
        mock.patch.dict(os.environ, environment(**(variables or {})), clear=True),
        contextlib.chdir(ROOT),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter('ignore', RuntimeWarning)  # the program may be imported already
        code = 0
        try:
            if is_module:
                runpy.run_module(argv[0], run_name='__main__', alter_sys=True)
            else:
                runpy.run_path(str(ROOT / argv[0]), run_name='__main__')
        except SystemExit as exit_:
            code = exit_.code or 0
    if isinstance(code, str):  # the interpreter prints it
        err.write(f'{code}\n')
        code = 1
    return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())


def error_line(*command, variables=None, run=run_here):
    """The one line in which a program reports a user's mistake."""
    done = run(*command, variables=variables)
    assert done.returncode not in (0, None)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert 'Traceback' not in done.stderr + done.stdout, done.stderr
    assert len(lines) == 1, done.stderr
    return lines[0]


def main_error(tmp_path, *flags, **options):
    """The line in which main.py, with the tiny config, reports a mistake; options are those of `error_line`."""
    return error_line('main.py', '--cfg', TINY, '--output', tmp_path / 'output', *flags, **options)


def wait_for(condition):
    """Wait until a condition holds, for ten seconds at most."""
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


class SpawnedRun:
    """A training run in a process group of its own.

    Args:
        folder: of its data, `tree/`, and its output.
        tag: of the run.
        launcher: arguments of Python before the program.
        options: further config keys and values, after `RUN_OPTIONS`.
        limit: largest size of a file it may write, in bytes.
        pipe: send its output into a pipe instead of a file.
        variables: of its environment.
    """

    def __init__(self, folder, tag, launcher=(), options='', limit=None, pipe=False, variables=None):
        self.folder = folder / 'output' / 'tiny' / tag
        command = [sys.executable, *launcher, 'main.py', '--cfg', TINY, '--data-path', folder / 'tree']
        command += ['--output', folder / 'output', '--tag', tag, '--opts', *RUN_OPTIONS.split(), *options.split()]
        self.output = folder.parent / f'{folder.name}_{tag}.txt'
        with self.output.open('a') as output:
            self.process = subprocess.Popen(
                list(map(str, command)),
                cwd=ROOT,
                env=environment(**(variables or {})),
                start_new_session=True,
                stdout=subprocess.PIPE if pipe else output,
                stderr=subprocess.STDOUT,
                preexec_fn=limit and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))),
            )

    def wait(self, timeout=120):
        """Its exit code; where it hangs, all its processes write their stacks before they are killed."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            for pid in descendants(self.process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGABRT)
            time.sleep(5)
            self.kill()
            raise AssertionError(f'no end in {timeout} s:\n{self.output.read_text()}') from None

    def kill(self):
        """Kill the process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def wait_for(self, condition, timeout=120):
        """Wait until a condition holds, which is asked every millisecond; False if the program ends first."""
        end = time.monotonic() + timeout
        while not condition():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < end, self.output.read_text()
            time.sleep(0.001)
        return True

    def log(self, rank=0):
        """A rank's log so far."""
        path = self.folder / f'log_rank{rank}.txt'
        return path.read_text() if path.exists() else ''

    def last_checkpoint(self):
        """The checkpoint of the last of its 12 epochs."""
        return load_checkpoint(self.folder / 'ckpt_epoch_11.pth')

    def checkpoint_names(self):
        """Names of its checkpoint files, temporary ones too."""
        return {path.name for path in self.folder.glob('ckpt_*')}


def start_two_ranks(folder, tag, options='', restarts=0):
    """A `SpawnedRun` of two ranks, which torchrun starts again up to `restarts` times."""
    return SpawnedRun(folder, tag, [*TORCHRUN, '2', '--max-restarts', str(restarts)], options)


def run_ranks(function, *args, nodes):
    """Call `function(rank, *args)` in a process group of ranks on these nodes, in forks of the workers' server."""
    with tempfile.TemporaryDirectory() as folder:
        worker_context()  # whose server has imported PyTorch
        mp.start_processes(
            _join_and_call, (folder, nodes, function, args), nprocs=len(nodes), start_method='forkserver'
        )


def _join_and_call(rank, folder, nodes, function, args):
    distributed.node_name = lambda: nodes[rank]
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=len(nodes))
    function(rank, *args)
    dist.barrier()
