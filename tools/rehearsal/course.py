"""The course of a rehearsal: runs of one command, undisturbed and disturbed, and what they leave."""

import contextlib
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from engine.memory import read_kb
from tools.rehearsal.launch import Launch, RehearsalError, SlurmJob

# Seconds in which a run must make progress; the first start may read a large dataset
PATIENCE = 600

# Seconds within which a disturbance comes after its epoch has begun: in an update, an evaluation or a save
MOMENT = 3.0


class Restart(NamedTuple):
    """A disturbance of a run, and the start after it.

    Attributes:
        kind: what was done to the run.
        epoch: the epoch in which it was, or which it had just ended.
        processes: number of processes before the disturbance, and after it.
        lost_updates: logged updates that had to be computed again.
        seconds: from the start of the processes to the first logged update.
        peak_mb: largest memory (RSS) of a process that was disturbed, up to then; 0 where it was not measured.
        is_exact: whether the log says that the run resumed bit for bit.
    """

    kind: str
    epoch: int
    processes: tuple[int, int]
    lost_updates: int
    seconds: float
    peak_mb: float
    is_exact: bool


class RehearsedRun:
    """A run of the rehearsed command, in the folder `<output>/<model>/<tag>`.

    Args:
        command: a program and its arguments, without `--output` and `--tag`.
        output: the folder of all runs.
        tag: the name of the run.
    """

    def __init__(self, command: Sequence[str], output: Path, tag: str):
        self.command = [*command, '--output', str(output.resolve()), '--tag', tag]
        self.output, self.tag = output, tag
        self.console = output / f'{tag}.txt'

    @property
    def folder(self) -> Path:
        """The run's folder.

        Raises:
            RehearsalError: there is none yet.
        """
        for config in self.output.glob(f'*/{self.tag}/config.yaml'):
            return config.parent
        raise RehearsalError(f'the run has not started: see {self.console}')

    @property
    def epochs(self) -> int:
        """Number of epochs of the whole run."""
        return yaml.safe_load((self.folder / 'config.yaml').read_text(encoding='utf-8'))['TRAIN']['EPOCHS']

    @property
    def last_checkpoint(self) -> Path:
        """The checkpoint of the last epoch."""
        return self.folder / f'ckpt_epoch_{self.epochs - 1}.pth'

    def log(self) -> str:
        """The log of rank 0; empty before the start."""
        with contextlib.suppress(RehearsalError):
            return (self.folder / 'log_rank0.txt').read_text(encoding='utf-8')
        return ''

    def start(self, processes: int) -> Launch:
        """Start the command, or go on with it."""
        return Launch(self.command, processes, self.console)

    def finish(self, job: Launch | SlurmJob) -> None:
        """Wait for the end of the run.

        Raises:
            RehearsalError: it failed.
        """
        if code := job.wait():
            raise RehearsalError(f'{self.tag} ended with exit code {code}: see {self.console}')

    def wait_for(self, job: Launch | SlurmJob, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds.

        Raises:
            RehearsalError: the run ends first, or its log does not grow for `PATIENCE` seconds.
        """
        size, since = -1, time.monotonic()
        while not condition():
            if not job.is_running and not condition():
                raise RehearsalError(f'{self.tag} has ended too early: see {self.console}')
            if len(log := self.log()) != size:
                size, since = len(log), time.monotonic()
            if time.monotonic() - since > PATIENCE:
                raise RehearsalError(f'{self.tag} has made no progress for {PATIENCE} s: see {self.console}')
            time.sleep(0.1)

    def epochs_when_started(self, job: Launch | SlurmJob) -> int:
        """`epochs`, after the first update."""
        self.wait_for(job, lambda: 'Train: [' in self.log())
        return self.epochs

    def wait_for_epoch(self, job: Launch | SlurmJob, epoch: int) -> None:
        """Wait until the run has logged an update of an epoch, or of a later one."""
        self.wait_for(job, lambda: _last_update(self.log())[0] >= epoch)

    def wait_for_resume(self, job: Launch | SlurmJob, start: int) -> str:
        """Wait until the run has logged an update after a place in its log, and return the log from there."""
        self.wait_for(job, lambda: 'Train: [' in self.log()[start:])
        return self.log()[start:]


def rehearse(run: RehearsedRun, process_counts: Sequence[int], kills: int, seed: int) -> Iterator[Restart]:
    """Train a run to its end, and disturb it at random moments.

    The moments are spread over all epochs. A third of the disturbances kill all processes, a third kill one process,
    and a third stop the run by SIGTERM, in random order.

    Args:
        run: the run, which has not begun.
        process_counts: numbers of processes, one after the other, each for an equal part of the run.
        kills: number of disturbances.
        seed: of the moments and kinds.

    Yields:
        Each disturbance, after the restart that follows it.

    Raises:
        RehearsalError: the run failed, or does not resume.
    """
    rng = random.Random(seed)
    kinds = [('all processes killed', 'one process killed', 'stopped by SIGTERM')[i % 3] for i in range(kills)]
    rng.shuffle(kinds)
    counts = [process_counts[i * len(process_counts) // (kills + 1)] for i in range(kills + 1)]
    job = run.start(counts[0])
    for number, kind in enumerate(kinds):
        run.wait_for_epoch(job, int((number + 0.9 * rng.random()) * run.epochs_when_started(job) / kills))
        time.sleep(rng.random() * MOMENT)
        peak = max((_peak_mb(rank) for rank in job.ranks()), default=0.0)
        if kind == 'all processes killed':
            job.kill()
        elif kind == 'one process killed':
            job.kill_one_rank(rng)
        else:
            job.preempt()
        log_before = run.log()
        started = time.monotonic()
        job = run.start(counts[number + 1])
        resumed = run.wait_for_resume(job, len(log_before))
        seconds = time.monotonic() - started
        yield restart_of_logs(kind, log_before, resumed, counts[number : number + 2], seconds, peak)
    run.finish(job)


def rehearse_slurm(run: RehearsedRun, processes: int, requeues: int, seed: int) -> Iterator[Restart]:
    """Train a run as a SLURM job that is put into the queue again and again; otherwise as `rehearse`."""
    rng = random.Random(seed)
    job = SlurmJob(run.command[1:], processes, run.console)
    for number in range(requeues):
        run.wait_for_epoch(job, int((number + 0.9 * rng.random()) * run.epochs_when_started(job) / requeues))
        time.sleep(rng.random() * MOMENT)
        if number % 2:
            kind = 'requeued from outside'
            job.requeue()
        else:
            kind = 'USR1, as before the time limit'
            job.time_is_up()
        started = time.monotonic()
        job.restart(number + 1)
        log_before = run.log()  # the job needs seconds until it writes to it
        resumed = run.wait_for_resume(job, len(log_before))
        yield restart_of_logs(kind, log_before, resumed, [processes, processes], time.monotonic() - started, 0.0)
    run.finish(job)


def restart_of_logs(
    kind: str, log_before: str, resumed: str, processes: Sequence[int], seconds: float, peak_mb: float
) -> Restart:
    """Describe a disturbance.

    Args:
        kind: see `Restart`, also for the last three.
        log_before: log up to the disturbance.
        resumed: what was logged after it, up to the first update.
        processes: their numbers before and after.
        seconds: of the start.
        peak_mb: largest memory of a process before.
    """
    place = re.search(r'resuming at epoch (\d+), update (\d+)', resumed)
    epoch, step, steps = _last_update(log_before)
    first_again = int(place[1]) * steps + int(place[2]) if place else 0
    lost = max(epoch * steps + step + 1 - first_again, 0)
    is_exact = place is None or 'the run resumes bit for bit' in resumed  # a run that starts again is exact, too
    return Restart(kind, epoch, tuple(processes), lost, seconds, peak_mb, is_exact)


def _last_update(log: str) -> tuple[int, int, int]:
    """Of the last logged update: its epoch, its number in the epoch, and the updates per epoch; -1, 0, 0 before it."""
    found = re.findall(r'Train: \[(\d+)/\d+\]\[(\d+)/(\d+)\]', log)
    epoch, step, steps = map(int, found[-1]) if found else (-1, 0, 0)
    return epoch, step, steps


def _peak_mb(process: int) -> float:
    """Largest memory (RSS) that a process has had, in MB (2^20 bytes); 0 where the system does not tell."""
    with contextlib.suppress(OSError, StopIteration):
        return read_kb(process, 'status', 'VmHWM:') / 2**10
    return 0.0


def sizes(run: RehearsedRun) -> dict[str, Any]:
    """Sizes of what a run has left, in bytes, by name."""
    folder = run.folder
    trackers = sum(path.stat().st_size for path in (folder / 'tensorboard').glob('*'))
    files = {name: (folder / name).stat().st_size for name in ('log_rank0.txt', 'metrics.jsonl')}
    return {'checkpoint': run.last_checkpoint.stat().st_size, **files, 'tensorboard': trackers}


def different_entries(one: Any, two: Any) -> list[str]:
    """Names of the entries in which two checkpoints differ, except for those that name folders."""
    return [name for name in sorted({*one, *two} - {'config', 'origin'}) if not _is_equal(one.get(name), two.get(name))]


def _is_equal(one: Any, two: Any) -> bool:
    """Whether two values of a checkpoint are equal to the last bit."""
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        return one.keys() == two.keys() and all(_is_equal(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(two, list | tuple):
        return len(one) == len(two) and all(map(_is_equal, one, two))
    return one == two
