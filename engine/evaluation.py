"""The evaluation loop, shared by all tasks, and the evaluation of EMA weights."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from torch import nn
from torch.utils.data import DataLoader

from engine.memory import peak_memory_mb
from engine.meter import progress_bar
from engine.run import Run
from engine.weights import fit_weights, load_weights

Poll = Callable[[], None]


class Evaluation(Protocol):
    """The result of evaluating a network.

    Attributes:
        metrics: by name, in percent except for losses, `val_...`; `val_loss` breaks ties when the best checkpoint is
            selected.
    """

    metrics: dict[str, float]

    def write_report(self, run: Run, suffix: str) -> None:
        """Write detailed results, such as metrics per class, to the run's folder and log.

        Every rank calls it, and rank 0 writes.

        Args:
            run: the run.
            suffix: at the end of the file names: '_ema' for the EMA weights, '' otherwise.
        """


class EvaluateFn(Protocol):
    """Evaluates networks."""

    def __call__(self, network: nn.Module, poll: Poll, suffix: str) -> Evaluation:
        """Evaluate a network; every rank calls it at the same point.

        Args:
            network: the network, not wrapped in DDP.
            poll: called after each batch, equally often on every rank, because it is a collective; may raise `Stopped`.
            suffix: at the end of the names of files and folders that it writes: '_ema' for the EMA weights.
        """


def no_poll() -> None:
    """No-op poll for evaluation outside training; signals keep their default effect."""


class EvaluationLoop:
    """Iterates over this process's evaluation batches, with a progress bar, log lines and polls for stop requests.

    Args:
        run: the run.
        loader: this process's shard; rank 0 has the largest.
        poll: called after each batch, equally often in every process.
    """

    def __init__(self, run: Run, loader: DataLoader, poll: Poll):
        self.run, self.loader, self.poll = run, loader, poll
        self.step = 0

    def __iter__(self) -> Iterator[Any]:
        self.start_time = time.monotonic()
        for step, batch in enumerate(progress_bar(self.loader, 'evaluation', self.run.process)):
            self.step = step
            yield batch
            self.poll()
        for _ in range(missing_batches(self.loader, self.run.process.world_size)):
            self.poll()

    def log(self, text: Callable[[], str]) -> None:
        """Log the current batch, every PRINT_FREQ batches; `text` is evaluated only then."""
        if self.step % self.run.config.PRINT_FREQ == 0:
            seconds = (time.monotonic() - self.start_time) / (self.step + 1)
            memory = peak_memory_mb(self.run.process.device)
            self.run.logger.info(
                f'Test: [{self.step}/{len(self.loader)}]\tTime {seconds:.3f}\t{text()}\tMem {memory:.0f}MB'
            )


def evaluate_with_ema(
    run: Run, evaluate: EvaluateFn, network: nn.Module, ema_network: nn.Module | None = None, poll: Poll = no_poll
) -> dict[str, Evaluation]:
    """Evaluate a network, then its EMA weights if there are any.

    Returns:
        The evaluations, as `raw` and `ema`.
    """
    evaluations = {'raw': evaluate(network, poll, '')}
    if ema_network is not None:
        run.logger.info('EMA weights:')
        evaluations['ema'] = evaluate(ema_network, poll, '_ema')
    return evaluations


def load_ema(network: nn.Module, checkpoint: Mapping[str, Any]) -> nn.Module | None:
    """A copy of the network with the checkpoint's EMA weights; None if the checkpoint has none."""
    if 'model_ema' not in checkpoint:
        return None
    ema_network = copy.deepcopy(network)  # not the same network: Apex may hold float16 copies of its weights
    name = "the checkpoint's model_ema"
    weights, _ = fit_weights(ema_network, checkpoint['model_ema'], name)  # like the raw weights, which was logged
    load_weights(ema_network, {'model': weights}, name)
    return ema_network


def missing_batches(loader: DataLoader, world_size: int) -> int:
    """Number of batches by which this rank's evaluation shard is shorter than that of rank 0."""
    return math.ceil(math.ceil(len(loader.dataset) / world_size) / loader.batch_size) - len(loader)
