"""Stopping on a signal: all processes of a run finish the same update, save and exit."""

import contextlib
import os
import signal
import threading
import time
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

# Exit code of a run that was stopped and has saved: EX_TEMPFAIL of sysexits.h, "try again later".
EXIT_STOPPED = 75

# From a launcher or the system, from Ctrl-C, and from SLURM before a job's time is up (sbatch --signal=USR1@120).
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

# What a stop waits for, in messages; see `StopRequest.waits_for`.
UPDATE = 'this update'
COMPILED_UPDATE = 'this update, for which torch.compile works for some minutes'

# Seconds during which another signal counts as a copy of the first: srun and torchrun both forward one.
_COPY_SECONDS = 0.2


class Stopped(SystemExit):
    """The run was stopped by a signal and has saved; the program exits with `EXIT_STOPPED`."""

    def __init__(self) -> None:
        super().__init__(EXIT_STOPPED)


class StopRequest:
    """Context in which the first of `STOP_SIGNALS` requests a stop, and a second one exits at once.

    A second signal exits with code 128 + its number, like a process killed by it, also while the process waits for
    another one or for the GPU. The death of the torchrun that started the process requests a stop too: torchrun can be
    started again, and would find the ranks still running.

    Attributes:
        signal: number of the first signal; 0 before.
        waits_for: what a stop waits for now, for the message.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.waits_for = UPDATE
        self.torchrun = os.getppid() if 'TORCHELASTIC_RUN_ID' in os.environ else None
        self._handlers: dict[signal.Signals, signal.Handlers] = {}
        self._wakeup = (-1, -1)  # pipe to which the system writes the number of each signal

    def __enter__(self) -> 'StopRequest':
        if threading.current_thread() is threading.main_thread():  # Python handles signals in no other thread
            self._wakeup = os.pipe()
            os.set_blocking(self._wakeup[1], False)
            signal.set_wakeup_fd(self._wakeup[1], warn_on_full_buffer=False)
            self._handlers = {number: signal.signal(number, self._request) for number in STOP_SIGNALS}
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            # A stopped run is already exiting with its own code.
            signal.signal(number, signal.SIG_IGN if kind is Stopped else handler)
        if self._handlers:
            signal.set_wakeup_fd(-1)
            os.close(self._wakeup[1])

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number

    def _watch(self) -> None:
        """Announce the first signal and exit on a second one, in a thread, since the main thread may be waiting."""
        first = None
        while number := int.from_bytes(os.read(self._wakeup[0], 1)):
            if number not in STOP_SIGNALS:
                continue
            if first is None:
                first = time.monotonic()
                name = signal.Signals(number).name
                _announce(f'{name}: stopping after {self.waits_for}; a second signal ends the run at once')
            elif time.monotonic() - first > _COPY_SECONDS:
                os._exit(128 + number)
        os.close(self._wakeup[0])

    def agreed(self) -> bool:
        """Whether any process was asked to stop: the same answer in every process.

        Every process calls it at the same points. It exchanges one number between CPUs and waits for no GPU.
        """
        if self.torchrun is not None and os.getppid() != self.torchrun and not self.signal:
            self.signal = signal.SIGTERM
            _announce(f'torchrun has died: stopping after {self.waits_for}')
        requested = torch.tensor(self.signal)
        if dist.is_initialized():
            dist.all_reduce(requested, dist.ReduceOp.MAX)
        return requested.item() > 0


def _announce(text: str) -> None:
    """Write to standard error, if it still has a reader: Ctrl-C ends `| tee` first."""
    with contextlib.suppress(OSError):
        os.write(2, f'{text}\n'.encode())
