"""`--throughput` of both tasks: images/s of a run's network in inference, of its training step and of its loader."""

import math
from collections.abc import Iterator, Sequence
from itertools import count, cycle, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from engine.memory import peak_memory_mb
from engine.run import Run, start_run
from engine.run_task import build_network, build_trainer
from engine.start import find_start
from engine.task import Task
from engine.trainer import Trainer
from models.build import maybe_compile
from tools.benchmark.timing import seconds_per_batch, time_callable

# Batches that training steps are timed on, in turns: those of a detector differ in size
BATCHES = 8


def log_throughput(task: Task, config: CfgNode) -> None:
    """Log images/s of a task's network in inference and, where there are data, of its training step and its loader.

    Every process of the run does the same, as in training, and logs its own images/s.

    Args:
        task: the task.
        config: its config tree; the weights of `MODEL.RESUME` or `MODEL.PRETRAINED`, if any, are loaded.
    """
    with start_run(config, is_training_run=False, compiles=task.compiles(config)) as run:
        start = find_start(run, task.tree)
        network = build_network(run, task)
        start.load_weights(run, task, network)
        log_inference = INFERENCE[task.name]
        if not config.DATA.DATA_PATH:
            network, _ = run.precision.prepare(network)
            log_inference(run, network)
            run.logger.info('give --data-path to time training and its loader too')
            return
        train_loader, eval_loader = task.build_loaders(config, run.process.rank, run.process.world_size)
        phases = task.phases(config, train_loader)
        run = run._replace(teacher=task.build_teacher(run))
        trainer = build_trainer(run, task, network, start, phases, eval_loader, provenance={})
        log_inference(run, trainer.state.model)
        log_training(run, trainer)


@torch.inference_mode()
def log_classifier(run: Run, network: nn.Module) -> None:
    """Log images/s of a classifier on a random batch."""
    config, device = run.config, run.process.device
    network = maybe_compile(network.eval(), config, config.TEST.COMPILE)
    batch, size = config.DATA.BATCH_SIZE, config.DATA.IMG_SIZE
    images = torch.randn(batch, config.MODEL.MSG.IN_CHANS, size, size, device=device)

    def forward() -> Tensor:
        with run.precision.autocast():
            return network(images)

    for _ in range(3):
        forward()
    seconds = time_callable(forward, device)
    rate, low, high = (batch / x for x in (seconds.median, seconds.high, seconds.low))
    run.logger.info(f'batch_size {batch} throughput {rate:.1f} images/s (quartiles {low:.1f} to {high:.1f})')


@torch.inference_mode()
def log_detector(run: Run, network: nn.Module) -> None:
    """Log images/s of a detector with all its detections, one random image at a time.

    The image is as high as in evaluation and 1.6 times as wide (1280 x 800). What is found in it depends on the
    weights, so the minimum score is lowered until there are MODEL.BOX.DETECTIONS, each with its mask.
    """
    network.eval()
    height, device = run.config.INPUT.TEST_SHORT, run.process.device
    image = torch.rand(3, height, round(1.6 * height), device=device)

    def forward() -> list[dict[str, Tensor]]:
        with run.precision.autocast():
            return network([image])

    network.roi_heads.min_score = 0.0
    scores = forward()[0]['scores']
    if len(scores):  # no lower than needed, since NMS of every candidate would take its own time
        network.roi_heads.min_score = scores.min().item() * (1 - 1e-6)
    seconds = time_callable(forward, device)
    run.logger.info(
        f'image {image.shape[2]} x {height} throughput {1 / seconds.median:.2f} images/s, '
        f'{len(scores)} detections, mem {peak_memory_mb(device):.0f}MB'
    )


# How each task logs images/s of inference
INFERENCE = {'classification': log_classifier, 'detection': log_detector}


def log_training(run: Run, trainer: Trainer) -> None:
    """Log images/s of training steps and of the loader, and which of them bounds the run."""
    data = run.config.DATA
    batches = endless_batches(trainer.loader)
    first_batches = list(islice(batches, BATCHES))
    loaded = data.BATCH_SIZE / seconds_per_batch(batches, warm_up=2 * data.NUM_WORKERS)
    trained = data.BATCH_SIZE * run.accumulation_steps / time_training_step(run, trainer, first_batches)
    workers = max(data.NUM_WORKERS, 1)
    needed = math.ceil(trained / (loaded / workers))
    slower = 'the loader' if loaded < trained else 'the network'
    run.logger.info(
        f'training {trained:.1f} images/s, loader {loaded:.1f} images/s with {workers} process(es), per rank: '
        f'{slower} bounds the run; {needed} loader process(es) on separate cores feed the network'
    )


def endless_batches(loader: DataLoader) -> Iterator[Any]:
    """Training batches, epoch after epoch."""
    for epoch in count():
        loader.sampler.set_epoch(epoch)
        yield from loader


def time_training_step(run: Run, trainer: Trainer, batches: Sequence[Any]) -> float:
    """Median seconds of a training step: loss, backward, clipping, optimizer, schedule and EMA."""
    remaining, pending = cycle(batches), None
    trainer.network.train()

    def step() -> None:
        nonlocal pending
        pending = trainer.train_step(list(islice(remaining, run.accumulation_steps)), pending)

    for _ in range(3):
        step()
    return time_callable(step, run.process.device).median
