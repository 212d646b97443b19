"""Start a training command as local processes or as a SLURM job, and interrupt it."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from engine.distributed import TORCHRUN_VARIABLES
from utils import UserError

ROOT = Path(__file__).parent.parent.parent


class RehearsalError(UserError):
    """A run of a rehearsal failed."""


def program_arguments(program: str) -> list[str]:
    """Arguments of Python that start a program: a file such as `main.py`, or a module such as `detection.main`."""
    return [program] if program.endswith('.py') else ['-m', program]


class Launch:
    """A training command that runs on a number of processes.

    Args:
        command: a program such as `main.py` or the module `detection.main`, and its arguments.
        processes: one is started without a launcher, several by torchrun.
        output: file to which everything that they print is appended.
    """

    def __init__(self, command: Sequence[str], processes: int, output: Path):
        self.processes, self.output = processes, output
        torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(processes)]
        launcher = torchrun if processes > 1 else []
        environment = {key: value for key, value in os.environ.items() if key not in TORCHRUN_VARIABLES}
        with output.open('a', encoding='utf-8') as file:
            self._process = subprocess.Popen(
                [sys.executable, *launcher, *program_arguments(command[0]), *command[1:]],
                cwd=ROOT,
                env=environment | {'OMP_NUM_THREADS': '1'},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def is_running(self) -> bool:
        """Whether the command has not ended."""
        return self._process.poll() is None

    def ranks(self) -> list[int]:
        """Process numbers of the training processes."""
        return children(self._process.pid) if self.processes > 1 else [self._process.pid]

    def wait(self) -> int:
        """Wait until the command ends, and return its exit code."""
        return self._process.wait()

    def kill(self) -> None:
        """Kill everything at once, as when the machine fails."""
        _kill(descendants(self._process.pid))
        self.wait()

    def kill_one_rank(self, rng: random.Random) -> None:
        """Kill one training process, as when memory runs out, and wait for the end of the others."""
        _kill([rng.choice(self.ranks())])
        self.wait()

    def preempt(self) -> None:
        """Send SIGTERM, as schedulers do, after which the run saves, and wait for its end."""
        self._process.terminate()
        self.wait()


class SlurmJob:
    """A training command as a SLURM job, submitted with `tools/train.sbatch`, which needs a SLURM on this machine.

    Args:
        command: see `Launch`.
        processes: tasks of the job.
        output: file to which everything that the job prints is appended.
    """

    def __init__(self, command: Sequence[str], processes: int, output: Path):
        options = ['--parsable', '--nodes=1', f'--ntasks-per-node={processes}', '--gpus-per-node=0']
        options += ['--cpus-per-task=1', f'--output={output}']
        program = ' '.join(program_arguments(command[0]))
        environment = os.environ | {'PYTHON': sys.executable, 'PROGRAM': program, 'OMP_NUM_THREADS': '1'}
        submitted = _slurm('sbatch', *options, 'tools/train.sbatch', *command[1:], environment=environment)
        self.number = submitted.split(';')[0]

    @property
    def is_running(self) -> bool:
        """Whether SLURM will still run the job, or runs it."""
        return self._state() not in ('COMPLETED', 'FAILED', 'CANCELLED', 'TIMEOUT', 'NODE_FAIL')

    def wait(self) -> int:
        """Wait for the end of the job, also over requeues; 0 if it has completed."""
        while self.is_running:
            self._start_now()
            time.sleep(1)
        return int(self._state() != 'COMPLETED')

    def kill(self) -> None:
        """Cancel the job."""
        _slurm('scancel', self.number)

    def time_is_up(self) -> None:
        """Send USR1, as SLURM does before the time limit; the job saves and puts itself into the queue again."""
        _slurm('scancel', '--signal=USR1', self.number)

    def requeue(self) -> None:
        """Requeue the job from outside, as SLURM does when it preempts the job or when its node fails."""
        _slurm('scontrol', 'requeue', self.number)

    def restart(self, restarts: int) -> None:
        """Wait until the job runs again after having been put into the queue this many times."""
        while self.is_running and not (self._restarts() >= restarts and self._state() == 'RUNNING'):
            self._start_now()
            time.sleep(0.5)

    def _start_now(self) -> None:
        """Start a requeued job after seconds: SLURM would wait for two minutes."""
        if self._state() == 'PENDING':
            time.sleep(3)  # slurmd does not start a job within the second in which it has ended, and SLURM gives it up
            with contextlib.suppress(RehearsalError):  # it has just started
                _slurm('scontrol', 'update', f'JobId={self.number}', 'StartTime=now')

    def _state(self) -> str:
        return self._field('JobState')

    def _restarts(self) -> int:
        return int(self._field('Restarts'))

    def _field(self, name: str) -> str:
        found = re.search(rf'\b{name}=(\S+)', _slurm('scontrol', 'show', 'job', self.number))
        if found is None:
            raise RehearsalError(f'scontrol show job {self.number} has no {name}')
        return found[1]


def _slurm(*command: str, environment: dict[str, str] | None = None) -> str:
    """Run a SLURM command, and return what it prints.

    Raises:
        RehearsalError: it fails, or is not installed.
    """
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, encoding='utf-8')
    except FileNotFoundError as error:
        raise RehearsalError(f'there is no {command[0]}: install SLURM, or leave out --slurm') from error
    if done.returncode:
        raise RehearsalError(f'{command[0]} failed: {done.stderr.strip()}')
    return done.stdout.strip()


def children(process: int) -> list[int]:
    """Process numbers of the children of a process."""
    listed = subprocess.run(
        ['ps', '-o', 'pid=', '--ppid', str(process)], capture_output=True, text=True, encoding='utf-8'
    ).stdout
    return [int(child) for child in listed.split()]


def descendants(process: int) -> list[int]:
    """Numbers of a process and of all its descendants."""
    return [process] + [x for child in children(process) for x in descendants(child)]


def _kill(processes: Sequence[int]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
