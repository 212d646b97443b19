"""Evaluation, shared by all tasks: batches, stop requests, log lines, EMA weights."""

import copy
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from engine.checkpoint import fit_weights, load_weights
from engine.distributed import Process
from engine.meter import peak_memory_mb
from engine.run import Run

Result = TypeVar('Result')
Poll = Callable[[], None]


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
        self.start_time = time.time()
        for step, batch in enumerate(progress_bar(self.loader, 'evaluation', self.run.process)):
            self.step = step
            yield batch
            self.poll()
        for _ in range(missing_batches(self.loader, self.run.process.world_size)):
            self.poll()

    def log(self, text: Callable[[], str]) -> None:
        """Log the current batch, every PRINT_FREQ batches; `text` is called only then."""
        if self.step % self.run.config.PRINT_FREQ == 0:
            seconds = (time.time() - self.start_time) / (self.step + 1)
            memory = peak_memory_mb(self.run.process.device)
            self.run.logger.info(
                f'Test: [{self.step}/{len(self.loader)}]\tTime {seconds:.3f}\t{text()}\tMem {memory:.0f}MB'
            )


def evaluate_with_ema(
    run: Run, evaluate_fn: Callable[[nn.Module], Result], model: nn.Module, ema_model: nn.Module | None
) -> tuple[Result, Result | None]:
    """Evaluate a network, then its EMA weights if there are any."""
    result = evaluate_fn(model)
    if ema_model is None:
        return result, None
    run.logger.info('EMA weights:')
    return result, evaluate_fn(ema_model)


def load_ema(model: nn.Module, checkpoint: dict[str, Any]) -> nn.Module | None:
    """A copy of the network with the checkpoint's EMA weights; None if it has none."""
    if 'model_ema' not in checkpoint:
        return None
    ema_model = copy.deepcopy(model)  # not the same network: Apex may hold float16 copies of its weights
    name = "the checkpoint's model_ema"
    weights, _ = fit_weights(ema_model, checkpoint['model_ema'], name)  # as the raw weights were, which is logged
    load_weights(ema_model, {'model': weights}, name)
    return ema_model


def progress_bar(loader: DataLoader, name: str, process: Process) -> tqdm:
    """The loader's batches, with a progress bar where rank 0 has a terminal."""
    return tqdm(loader, name, leave=False, disable=None if process.rank == 0 else True)


def missing_batches(loader: DataLoader, world_size: int) -> int:
    """How many batches this process's shard has fewer than rank 0's, the largest."""
    return math.ceil(math.ceil(len(loader.dataset) / world_size) / loader.batch_size) - len(loader)
