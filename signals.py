"""Stopping on a signal: all processes of a run finish the same update, save and exit."""

import contextlib
import os
import signal
import threading
import time
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

# Exit code of a run that was asked to stop and has saved: EX_TEMPFAIL of sysexits.h, "try again later".
EXIT_STOPPED = 75

# Of a launcher or the system, of Ctrl-C, and of SLURM before a job's time is up (sbatch --signal=USR1@120).
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

# Seconds in which a signal is taken for a copy of the first: srun and torchrun both pass one on.
_COPIES = 0.2


class Stopped(Exception):  # noqa: N818 - no error: the run ends as asked
    """The run has been stopped by a signal, and has saved where it can be continued."""


class StopRequest:
    """While it is entered, the first of `STOP_SIGNALS` asks for a stop, and a second one exits at once.

    The exit code of a second one is 128 + its number, as of a process that the signal kills. It works also where the
    process waits for another one or for the GPU. The death of the torchrun that has started the process asks for a stop
    too: torchrun can start again, and would find the ranks still at work.
    """

    def __init__(self) -> None:
        self.signal = 0  # number of the first signal that came
        self.torchrun = os.getppid() if 'TORCHELASTIC_RUN_ID' in os.environ else None
        self._before: dict[signal.Signals, signal.Handlers] = {}
        self._wakeup = (-1, -1)  # ends of the pipe that the system writes the number of each signal to

    def __enter__(self) -> 'StopRequest':
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread handle signals
            self._wakeup = os.pipe()
            os.set_blocking(self._wakeup[1], False)
            signal.set_wakeup_fd(self._wakeup[1], warn_on_full_buffer=False)
            self._before = {number: signal.signal(number, self._ask) for number in STOP_SIGNALS}
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            # A run that has stopped is on its way out with its exit code.
            signal.signal(number, signal.SIG_IGN if kind is Stopped else handler)
        if self._before:
            signal.set_wakeup_fd(-1)
            os.close(self._wakeup[1])

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number

    def _watch(self) -> None:
        """Say that the first signal has come, and exit on a second, in a thread: the main one may be waiting."""
        came = None
        while number := int.from_bytes(os.read(self._wakeup[0], 1)):
            if number not in STOP_SIGNALS:
                continue
            if came is None:
                came = time.monotonic()
                _say(f'{signal.Signals(number).name}: stopping after this update')
            elif time.monotonic() - came > _COPIES:
                os._exit(128 + number)
        os.close(self._wakeup[0])

    def agreed(self) -> bool:
        """Whether any process has been asked to stop; the same answer in every process.

        Every process calls it at the same points. It exchanges one number between the CPUs and waits for no GPU.
        """
        if self.torchrun is not None and os.getppid() != self.torchrun and not self.signal:
            self.signal = signal.SIGTERM
            _say('torchrun has died: stopping after this update')
        asked = torch.tensor(self.signal)
        if dist.is_initialized():
            dist.all_reduce(asked, dist.ReduceOp.MAX)
        return asked.item() > 0


def _say(text: str) -> None:
    """Tell on the standard error, if anybody still reads it: Ctrl-C ends a `| tee` first."""
    with contextlib.suppress(OSError):
        os.write(2, f'{text}\n'.encode())
