"""Train, evaluate or time an MSG-Transformer on a tree of class folders.

    torchrun --nproc_per_node 8 main.py --cfg configs/msg_tiny_p4_win7_224.yaml --data-path <imagenet>

docs/training.md has the commands for other machines.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from config import TREE, ConfigError, get_config
from data import (
    IGNORED,
    ImageDataset,
    Preprocess,
    Sample,
    SkippedImages,
    build_criterion,
    build_eval_loader,
    build_loaders,
    build_mixup,
)
from engine.distributed import all_reduce_sum
from engine.evaluation import EvaluationLoop, Poll, evaluate_with_ema, load_ema, no_poll
from engine.experiment import describe_run, log_notes, warn_of_other_classes
from engine.resume import Start, begin_training, find_start
from engine.run import Run, build_state, run_parser, start_run
from engine.timing import Quartiles, seconds_per_batch, time_callable
from engine.trainer import Trainer
from lr_scheduler import build_scheduler
from models import build_model
from models.build import class_weights
from optimizer import build_optimizer
from utils import exit_on_user_error

# Images per update that the config's learning rates are for.
BASE_BATCH = 512


def parse_option(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a flag not given is None and overrides nothing."""
    return run_parser(
        'Train, evaluate or time an MSG-Transformer. Every setting is a key of the config tree '
        '(docs/configuration.md): flags override --opts, --opts override the file, the file overrides the defaults.',
        TREE,
        example='configs/msg_tiny_p4_win7_224.yaml',
    ).parse_args(argv)


def main(config: CfgNode) -> None:
    """Train, evaluate or time as the config says."""
    is_training_run = not (config.EVAL_MODE or config.THROUGHPUT_MODE)
    with start_run(config, is_training_run, compiles=config.TRAIN.COMPILE or config.TEST.COMPILE) as run:
        start = find_start(run, TREE)
        model = build_model(config).to(run.process.device)
        parameters = sum(p.numel() for p in model.parameters())
        multiply_adds = f', {model.flops():,} multiply-adds' if config.MODEL.TYPE == 'msg' else ''
        run.logger.info(f'{config.MODEL.NAME}: {parameters:,} parameters{multiply_adds}')
        if is_training_run:
            train(run, model, start)
            return
        if start is not None:
            start.load_weights(run, model, class_weights(model))
        model, _ = run.precision.prepare(model)
        if config.EVAL_MODE:
            evaluate(run, model, start)
        else:
            throughput(run, model)


def train(run: Run, model: nn.Module, start: Start | None) -> None:
    """Train to the last epoch, evaluating after each."""
    config, process = run.config, run.process

    # Data
    train_loader, eval_loader = build_loaders(config, process.rank, process.world_size)
    classes = eval_loader.dataset.classes
    datasets = {'train': train_loader.dataset.dataset, 'val': eval_loader.dataset}
    record = describe_run(run, classes, datasets)

    # Weights
    if start is not None:
        start.load_weights(run, model, class_weights(model), classes)
    elif config.TRAIN.FROZEN_STAGES >= 0:
        raise ConfigError('TRAIN.FROZEN_STAGES freezes trained weights: give them with --pretrained')
    if config.TRAIN.FROZEN_STAGES >= 0:
        model.freeze_stages(config.TRAIN.FROZEN_STAGES)

    # Optimizer, schedule
    lr_scale = run.images_per_update / BASE_BATCH
    lr = config.TRAIN.BASE_LR * lr_scale
    optimizer = build_optimizer(config, model, lr, layer_decay=config.TRAIN.LAYER_DECAY)
    build_schedule = partial(build_scheduler, config, lr_scale=lr_scale)
    network, state = build_state(run, model, optimizer, train_loader, build_schedule, config.TRAIN.START_EPOCH)
    record = begin_training(run, state, start, record, TREE)

    # Loss, metrics
    forward = run.maybe_compile(network, config.TRAIN.COMPILE)
    preprocess, mixup, criterion = Preprocess(config, process.device), build_mixup(config), build_criterion(config)
    skipped, skipped_val = (skipped_images(run, dataset) for dataset in datasets.values())

    def loss_fn(batch: Sample) -> dict[str, Tensor]:
        skipped.record(batch.skipped)
        images, targets = mixup(*preprocess(batch))
        return {'loss': criterion(forward(images), targets)}

    def evaluate_fn(model: nn.Module, poll: Poll) -> dict[str, float]:
        return validate(run, model, eval_loader, poll, skipped_val)._asdict()

    compiles = config.TRAIN.COMPILE or config.TEST.COMPILE
    Trainer(run, state, network, train_loader, loss_fn, evaluate_fn, 'acc1', record, compiles=compiles).fit()


def evaluate(run: Run, model: nn.Module, start: Start) -> None:
    """Evaluate a checkpoint's weights, already loaded, and its EMA weights if it has any."""
    loader = build_eval_loader(run.config, run.process.rank, run.process.world_size)
    log_notes(run, {'val': loader.dataset})
    warn_of_other_classes(run, start.checkpoint, loader.dataset.classes)
    skipped = skipped_images(run, loader.dataset)

    def evaluate_fn(model: nn.Module) -> Metrics:
        return validate(run, model, loader, no_poll, skipped)

    evaluate_with_ema(run, evaluate_fn, model, load_ema(model, start.checkpoint))


def skipped_images(run: Run, dataset: ImageDataset) -> SkippedImages:
    """What the run says of a dataset's bad images: of each once, however often it is read."""
    return SkippedImages(dataset, run.config.DATA.ERROR_LIMIT, run.logger.warning)


class Metrics(NamedTuple):
    """Mean cross entropy, and top-1 and top-5 accuracy in percent."""

    val_loss: float
    acc1: float
    acc5: float

    @classmethod
    def from_sums(cls, sums: Tensor) -> 'Metrics':
        """Means from sums (4,): of the loss, of top-1 and top-5 hits, and the number of images."""
        loss, top1, top5, images = sums.tolist()
        images = images or math.nan  # all images of a batch may be bad ones
        return cls(loss / images, 100 * top1 / images, 100 * top5 / images)


@torch.inference_mode()
def validate(
    run: Run, model: nn.Module, loader: DataLoader, poll: Poll = no_poll, skipped: SkippedImages | None = None
) -> Metrics:
    """Evaluate a network, not wrapped, on every image once.

    Sums are kept on the device and reduced over the processes once, at the end, so shards may differ in size.

    Args:
        run: the run.
        model: the network.
        loader: this process's shard; rank 0 has the largest.
        poll: called after each batch, equally often in every process.
        skipped: of earlier evaluations, which have logged their bad images.
    """
    device = run.process.device
    network = run.maybe_compile(model.eval(), run.config.TEST.COMPILE)
    sums = torch.zeros(4, dtype=torch.float32 if device.type == 'mps' else torch.float64, device=device)
    preprocess = Preprocess(run.config, device)
    skipped = skipped or skipped_images(run, loader.dataset)
    loop = EvaluationLoop(run, loader, poll)
    for batch in loop:
        skipped.record(batch.skipped)
        images, targets = preprocess(batch)
        with run.precision.autocast():
            logits = network(images)
        loss = F.cross_entropy(logits.float(), targets, reduction='sum', ignore_index=IGNORED)
        hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]  # (B, 5)
        batch_sums = torch.stack((loss, hits[:, 0].sum(), hits.sum(), (targets != IGNORED).sum()))
        sums += batch_sums
        loop.log(partial(_log_text, batch_sums, sums))
    sums = all_reduce_sum(sums)
    metrics = Metrics.from_sums(sums)
    run.logger.info(f' * Acc@1 {metrics.acc1:.3f} Acc@5 {metrics.acc5:.3f}')
    run.logger.info(f'Accuracy of the network on the {sums[3]:.0f} test images: {metrics.acc1:.1f}%')
    return metrics


def _log_text(batch_sums: Tensor, sums: Tensor) -> str:
    now, mean = Metrics.from_sums(batch_sums), Metrics.from_sums(sums)
    return (
        f'Loss {now.val_loss:.4f} ({mean.val_loss:.4f})\tAcc@1 {now.acc1:.3f} ({mean.acc1:.3f})\t'
        f'Acc@5 {now.acc5:.3f} ({mean.acc5:.3f})'
    )


def throughput(run: Run, model: nn.Module) -> None:
    """Log images/s of the forward pass and, where there are data, of training and of its loader."""
    config, logger = run.config, run.logger
    seconds = time_forward(run, model)
    rate, low, high = (config.DATA.BATCH_SIZE / x for x in (seconds.median, seconds.high, seconds.low))
    logger.info(
        f'batch_size {config.DATA.BATCH_SIZE} throughput {rate:.1f} images/s (quartiles {low:.1f} to {high:.1f})'
    )
    if not config.DATA.DATA_PATH:
        logger.info('give --data-path to time training and its loader too')
        return
    trained, loaded = (config.DATA.BATCH_SIZE / x for x in (time_training(run, model), time_loader(run)))
    workers = max(config.DATA.NUM_WORKERS, 1)
    needed = math.ceil(trained / (loaded / workers))
    slower = 'the loader' if loaded < trained else 'the network'
    logger.info(
        f'training {trained:.1f} images/s, loader {loaded:.1f} images/s with {workers} process(es), per rank: '
        f'{slower} bounds the run; {needed} loader process(es) on cores of their own feed the network'
    )


@torch.inference_mode()
def time_forward(run: Run, model: nn.Module) -> Quartiles:
    """Seconds of the forward pass on a random batch; see also `tools.benchmark`."""
    images, network = random_images(run), run.maybe_compile(model.eval(), run.config.TEST.COMPILE)

    def forward() -> Tensor:
        with run.precision.autocast():
            return network(images)

    for _ in range(3):
        forward()
    return time_callable(forward, run.process.device)


def time_training(run: Run, model: nn.Module) -> float:
    """Seconds of forward and backward pass on a random batch."""
    images, network = random_images(run), run.maybe_compile(model.train(), run.config.TRAIN.COMPILE)

    def step() -> None:
        with run.precision.autocast():
            loss = network(images).float().logsumexp(1).mean()
        loss.backward()

    step()
    return time_callable(step, run.process.device).median


def time_loader(run: Run) -> float:
    """Seconds per batch of the training loader, with its images prepared on the device."""
    config, process = run.config, run.process
    loader, _ = build_loaders(config, process.rank, process.world_size)
    preprocess = Preprocess(config, process.device)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for epoch in count():
            loader.sampler.set_epoch(epoch)
            yield from map(preprocess, loader)

    return seconds_per_batch(batches(), warm_up=2 * config.DATA.NUM_WORKERS)


def random_images(run: Run) -> Tensor:
    """A batch of normalised images."""
    data, channels = run.config.DATA, run.config.MODEL.MSG.IN_CHANS
    return torch.randn(data.BATCH_SIZE, channels, data.IMG_SIZE, data.IMG_SIZE, device=run.process.device)


if __name__ == '__main__':
    with exit_on_user_error():
        main(get_config(parse_option()))
