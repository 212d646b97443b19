"""Train, evaluate or time an MSG-Transformer on a tree of class folders.

    torchrun --nproc_per_node 8 main.py --cfg configs/msg_tiny_p4_win7_224.yaml --data-path <imagenet>

docs/training.md has the commands for other machines. This file holds what is specific to classification: its loss and
its metrics. The course of a run stands in engine/run_task.py.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from config import TREE, check_schedule, get_config
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
from engine.distributed import all_reduce_sum, once_per_node
from engine.evaluation import EvaluateFn, EvaluationLoop, Poll, no_poll
from engine.run import Run, run_parser
from engine.run_task import run_task
from engine.task import LossFn, Task
from lr_scheduler import build_scheduler
from models import build_model
from models.build import head_pattern, maybe_compile
from optimizer import build_optimizer
from utils import exit_on_user_error


def parse_option(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a flag not given is None and overrides nothing."""
    return run_parser(
        'Train, evaluate or time an MSG-Transformer. Every setting is a key of the config tree '
        '(docs/configuration.md); that of each flag is in parentheses. Flags override --opts, --opts override '
        'the file, the file overrides the defaults.',
        TREE,
        example='configs/msg_tiny_p4_win7_224.yaml',
    ).parse_args(argv)


def main(config: CfgNode) -> None:
    """Train, evaluate or time as the config says."""
    if config.THROUGHPUT_MODE:
        from tools.benchmark.throughput import log_throughput  # programs of tools/ know this file

        log_throughput(TASK, config)
    else:
        run_task(TASK, config)


class Classification(Task):
    """Image classification."""

    name = 'classification'
    program = 'main'
    tree = TREE
    metric = 'acc1'
    metric_name = 'accuracy'

    def build_network(self, config: CfgNode) -> nn.Module:
        """An MSG-Transformer, or a network of timm."""
        return build_model(config)

    def build_loaders(self, config: CfgNode, rank: int = 0, world_size: int = 1) -> tuple[DataLoader, DataLoader]:
        """Loaders of `data.Sample`s."""
        return build_loaders(config, rank, world_size, once_per_node)

    def build_eval_loader(self, config: CfgNode, rank: int = 0, world_size: int = 1) -> DataLoader:
        """A loader of `data.Sample`s."""
        return build_eval_loader(config, rank, world_size, once_per_node)

    def head_pattern(self, network: nn.Module) -> str:
        """The names of the head."""
        return head_pattern(network)

    def backbone(self, network: nn.Module) -> nn.Module:
        """The network itself."""
        return network

    def build_optimizer(self, config: CfgNode, network: nn.Module, lr: float) -> Optimizer:
        """The published groups, with `TRAIN.LAYER_DECAY`."""
        return build_optimizer(config, network, lr, layer_decay=config.TRAIN.LAYER_DECAY)

    def build_scheduler(
        self, config: CfgNode, optimizer: Optimizer, steps_per_epoch: int, lr_scale: float
    ) -> Scheduler:
        """The schedule of `TRAIN.LR_SCHEDULER`."""
        return build_scheduler(config, optimizer, steps_per_epoch, lr_scale)

    def check_schedule(self, config: CfgNode, steps_per_epoch: int | None = None) -> None:
        """Refuse a step schedule that makes no step."""
        check_schedule(config)

    def compiles(self, config: CfgNode) -> bool:
        """Whether `TRAIN.COMPILE` or `TEST.COMPILE` is on."""
        return config.TRAIN.COMPILE or config.TEST.COMPILE

    def build_loss(self, run: Run, network: nn.Module, dataset: ImageDataset) -> LossFn:
        """The loss of `TRAIN.LOSS`, with Mixup."""
        config = run.config
        forward = maybe_compile(network, config, config.TRAIN.COMPILE)
        preprocess, mixup, criterion = (
            Preprocess(config, run.process.device),
            build_mixup(config),
            build_criterion(config).to(run.process.device),
        )
        skipped = SkippedImages(dataset, config.DATA.ERROR_LIMIT, run.logger.warning)

        def loss_fn(batch: Sample) -> dict[str, Tensor]:
            skipped.count(batch.skipped)
            images, targets = mixup(*preprocess(batch))
            return {'loss': criterion(forward(images), targets)}

        return loss_fn

    def build_evaluation(self, run: Run, loader: DataLoader) -> EvaluateFn:
        """Top-1 and top-5 accuracy."""
        skipped = SkippedImages(loader.dataset, run.config.DATA.ERROR_LIMIT, run.logger.warning)
        return lambda network, poll, suffix: validate(run, network, loader, poll, skipped)


TASK = Classification()


class Accuracy(NamedTuple):
    """Mean cross entropy, and top-1 and top-5 accuracy in percent, of `images` images."""

    val_loss: float
    acc1: float
    acc5: float
    images: int

    @classmethod
    def from_sums(cls, sums: Tensor) -> 'Accuracy':
        """Means from sums (4,): of the loss, of top-1 and top-5 hits, and the number of images."""
        loss, top1, top5, images = sums.tolist()
        count = images or math.nan  # all images of a batch may be bad ones
        return cls(loss / count, 100 * top1 / count, 100 * top5 / count, int(images))

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics by name."""
        return {'val_loss': self.val_loss, 'acc1': self.acc1, 'acc5': self.acc5}

    def write_report(self, run: Run, suffix: str) -> None:
        """Write nothing: the log has all of it."""


@torch.inference_mode()
def validate(
    run: Run, network: nn.Module, loader: DataLoader, poll: Poll = no_poll, skipped: SkippedImages | None = None
) -> Accuracy:
    """Evaluate a network, not wrapped, on every image once.

    Sums are kept on the device and reduced over the processes once, at the end, so shards may differ in size.

    Args:
        run: the run.
        network: the network.
        loader: this process's shard; rank 0 has the largest.
        poll: called after each batch, equally often in every process.
        skipped: of earlier evaluations, which have logged their bad images.
    """
    device = run.process.device
    forward = maybe_compile(network.eval(), run.config, run.config.TEST.COMPILE)
    sums = torch.zeros(4, dtype=torch.float32 if device.type == 'mps' else torch.float64, device=device)
    preprocess = Preprocess(run.config, device)
    skipped = skipped or SkippedImages(loader.dataset, run.config.DATA.ERROR_LIMIT, run.logger.warning)
    loop = EvaluationLoop(run, loader, poll)
    for batch in loop:
        skipped.count(batch.skipped)
        images, targets = preprocess(batch)
        with run.precision.autocast():
            logits = forward(images)
        loss = F.cross_entropy(logits.float(), targets, reduction='sum', ignore_index=IGNORED)
        hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]  # (B, 5)
        batch_sums = torch.stack((loss, hits[:, 0].sum(), hits.sum(), (targets != IGNORED).sum()))
        sums += batch_sums
        loop.log(partial(_log_text, batch_sums, sums))
    accuracy = Accuracy.from_sums(all_reduce_sum(sums))
    run.logger.info(f' * Acc@1 {accuracy.acc1:.3f} Acc@5 {accuracy.acc5:.3f}')
    run.logger.info(f'Accuracy of the network on the {accuracy.images} test images: {accuracy.acc1:.1f}%')
    return accuracy


def _log_text(batch_sums: Tensor, sums: Tensor) -> str:
    now, mean = Accuracy.from_sums(batch_sums), Accuracy.from_sums(sums)
    return (
        f'Loss {now.val_loss:.4f} ({mean.val_loss:.4f})\tAcc@1 {now.acc1:.3f} ({mean.acc1:.3f})\t'
        f'Acc@5 {now.acc5:.3f} ({mean.acc5:.3f})'
    )


if __name__ == '__main__':
    with exit_on_user_error():
        main(get_config(parse_option()))
