"""Interrupt a training run at random moments, resume it, and compare its last checkpoint with another run's."""

import contextlib
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from engine.checkpoint import load_checkpoint
from engine.memory import read_kb
from tools.differences import EVALUATION_ENTRIES, differing_entries, entries
from tools.rehearsal.launch import Launch, RehearsalError, SlurmJob

# Seconds in which a run must make progress; the first start may read a large dataset
PATIENCE = 600

# An interruption comes at most so many seconds after its epoch has begun: in an update, an evaluation or a save
MOMENT = 3.0


class Restart(NamedTuple):
    """An interruption of a run, and the restart after it.

    Attributes:
        kind: how the run was interrupted, such as `one process killed`.
        epoch: epoch of the last logged update before the interruption.
        processes: number of processes before and after the interruption.
        lost_updates: logged updates that had to be computed again.
        seconds: from the start of the processes to the first logged update.
        peak_mb: peak memory (RSS) of the largest process before the interruption, in MB; 0 if it was not measured.
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
    """A training run of the given command, in the folder `<output>/<model>/<tag>`.

    Args:
        command: a program and its arguments, without `--output` and `--tag`.
        output: the folder of all runs.
        tag: the name of the run.

    Attributes:
        console: file with everything that the run has printed.
        job: the run's processes; None before the start.
    """

    def __init__(self, command: Sequence[str], output: Path, tag: str):
        self.command = [*command, '--output', str(output.resolve()), '--tag', tag]
        self.output, self.tag = output, tag
        self.console = output / f'{tag}.txt'
        self.job: Launch | SlurmJob | None = None

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
        """The newest checkpoint at the end of an epoch.

        Raises:
            RehearsalError: there is none.
        """
        names = (re.fullmatch(r'ckpt_epoch_(\d+)', path.stem) for path in self.folder.glob('ckpt_epoch_*.pth'))
        last = max((int(match[1]) for match in names if match), default=None)
        if last is None:
            raise RehearsalError(f'{self.folder} has no checkpoint of an epoch: see {self.console}')
        return self.folder / f'ckpt_epoch_{last}.pth'

    def log(self) -> str:
        """The log of rank 0; empty before the start."""
        with contextlib.suppress(RehearsalError):
            return (self.folder / 'log_rank0.txt').read_text(encoding='utf-8')
        return ''

    def start(self, processes: int) -> Launch:
        """Start or resume the run."""
        self.job = Launch(self.command, processes, self.console)
        return self.job

    def start_slurm(self, processes: int) -> SlurmJob:
        """Submit the command as a SLURM job."""
        self.job = SlurmJob(self.command, processes, self.console)
        return self.job

    def stop(self) -> None:
        """End the run's processes, if there are any."""
        if self.job is not None and self.job.is_running:
            self.job.kill()

    def finish(self) -> None:
        """Wait for the end of the run.

        Raises:
            RehearsalError: it failed.
        """
        if code := self.job.wait():
            raise RehearsalError(f'{self.tag} ended with exit code {code}: see {self.console}')

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds.

        Raises:
            RehearsalError: the run ends first, or its log does not grow for `PATIENCE` seconds.
        """
        size, since = -1, time.monotonic()
        while not condition():
            if not self.job.is_running and not condition():
                raise RehearsalError(f'{self.tag} has ended too early: see {self.console}')
            if len(log := self.log()) != size:
                size, since = len(log), time.monotonic()
            if time.monotonic() - since > PATIENCE:
                raise RehearsalError(f'{self.tag} has made no progress for {PATIENCE} s: see {self.console}')
            time.sleep(0.1)

    def wait_for_fraction(self, fraction: float) -> None:
        """Wait until the run has logged an update after a fraction of its epochs, in [0, 1)."""
        self.wait_for(lambda: 'Train: [' in self.log())
        self.wait_for(lambda: _last_update(self.log())[0] >= int(fraction * self.epochs))

    def wait_for_resume(self, start: int) -> str:
        """Wait until an update is logged after character `start` of the log, and return the log from there."""
        self.wait_for(lambda: 'Train: [' in self.log()[start:])
        return self.log()[start:]


def rehearse(run: RehearsedRun, process_counts: Sequence[int], kills: int, seed: int) -> Iterator[Restart]:
    """Train a run to its end, interrupting and resuming it at random moments.

    The moments are spread over all epochs. A third of the interruptions kill all processes, a third kill one process,
    and a third stop the run by SIGTERM, in random order.

    Args:
        run: the run, which has not begun.
        process_counts: numbers of processes, one after the other, each for an equal part of the run.
        kills: number of interruptions.
        seed: of the moments and kinds.

    Yields:
        Each interruption, once the run has resumed.

    Raises:
        RehearsalError: the run failed, or does not resume.
    """
    rng = random.Random(seed)
    kinds = [('all processes killed', 'one process killed', 'stopped by SIGTERM')[i % 3] for i in range(kills)]
    rng.shuffle(kinds)
    counts = [process_counts[i * len(process_counts) // (kills + 1)] for i in range(kills + 1)]
    job = run.start(counts[0])
    for number, kind in enumerate(kinds):
        run.wait_for_fraction((number + 0.9 * rng.random()) / kills)
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
        resumed = run.wait_for_resume(len(log_before))
        seconds = time.monotonic() - started
        yield restart_of_logs(kind, log_before, resumed, counts[number : number + 2], seconds, peak)
    run.finish()


def rehearse_slurm(run: RehearsedRun, processes: int, requeues: int, seed: int) -> Iterator[Restart]:
    """Train a run as a SLURM job that is requeued at random moments; otherwise like `rehearse`."""
    rng = random.Random(seed)
    job = run.start_slurm(processes)
    for number in range(requeues):
        run.wait_for_fraction((number + 0.9 * rng.random()) / requeues)
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
        resumed = run.wait_for_resume(len(log_before))
        yield restart_of_logs(kind, log_before, resumed, [processes, processes], time.monotonic() - started, 0.0)
    run.finish()


def restart_of_logs(
    kind: str, log_before: str, resumed: str, processes: Sequence[int], seconds: float, peak_mb: float
) -> Restart:
    """Describe an interruption from the logs before and after it.

    Args:
        kind: see `Restart`, also for `processes`, `seconds` and `peak_mb`.
        log_before: log up to the interruption.
        resumed: log after the interruption, up to the first update.
        processes: see `Restart`.
        seconds: see `Restart`.
        peak_mb: see `Restart`.
    """
    progress = re.search(r'resuming at epoch (\d+), update (\d+)', resumed)
    epoch, step, steps = _last_update(log_before)
    first_again = int(progress[1]) * steps + int(progress[2]) if progress else 0
    lost = max(epoch * steps + step + 1 - first_again, 0)
    # Without a checkpoint, the run starts from scratch, which is exact too
    is_exact = progress is None or 'the run resumes bit for bit' in resumed
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


def compare(one: Path, other: Path) -> list[str]:
    """Name and describe the entries in which two checkpoints of a rehearsal differ.

    The config and the origin name folders, and the environment the number of processes: these are not compared. The
    last digits of metrics depend on which images share a batch, and so on the number of processes: metrics are compared
    only if it is equal.
    """
    checkpoints = [load_checkpoint(path) for path in (one, other)]
    left_out = ('config', 'origin', 'environment')
    if len({checkpoint['environment']['world_size'] for checkpoint in checkpoints}) > 1:
        left_out += EVALUATION_ENTRIES
    return differing_entries(
        *({name: x for name, x in entries(c) if not name.startswith(left_out)} for c in checkpoints)
    )
