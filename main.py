"""Train, evaluate or benchmark an MSG-Transformer classifier.

    torchrun --nproc_per_node 8 main.py --cfg configs/msg_tiny_p4_win7_224.yaml --data-path <imagenet>

docs/launching.md has the commands for other machines. This file holds what is specific to classification: its loss and
its metrics. engine/run_task.py has the steps of a run, which all tasks share.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from config import TREE, check_schedule, get_config
from data import (
    ImageDataset,
    Preprocess,
    Sample,
    SkippedImages,
    build_criterion,
    build_eval_loader,
    build_loaders,
    build_mixup,
    class_weights,
    size_phases,
)
from data.class_names import class_indices
from distillation import Teacher, build_distillation, build_teacher
from engine.distributed import once_per_node
from engine.evaluation import EvaluateFn
from engine.run import Run, run_parser
from engine.run_task import run_task
from engine.task import LossFn, Task
from evaluation import SelectedClasses, validate, validate_multi_label
from lr_scheduler import build_scheduler
from models import build_model
from models.build import head_pattern, maybe_compile
from optimizer import build_optimizer
from utils import exit_on_user_error


def parse_option(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a flag not given is None and overrides nothing."""
    return run_parser(
        'python main.py',
        'Train, evaluate or benchmark a classifier. Every setting is a key of the config tree '
        "(docs/configuration.md); a flag's key is in parentheses. Flags override --opts, --opts override the file, and "
        'the file overrides the defaults.',
        TREE,
        example='configs/msg_tiny_p4_win7_224.yaml',
    ).parse_args(argv)


def main(config: CfgNode, until: tuple[int, int] | None = None) -> None:
    """Train, evaluate or benchmark as the config says; `until` ends training early, see `engine.trainer.Trainer`."""
    if config.THROUGHPUT_MODE:
        from tools.benchmark.throughput import log_throughput  # programs of tools/ know this file

        log_throughput(TASK, config)
    else:
        run_task(MULTI_LABEL_TASK if config.DATA.MULTI_LABEL else TASK, config, until)


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

    def phases(self, config: CfgNode, loader: DataLoader) -> list[tuple[int, CfgNode, DataLoader]]:
        """Split training into phases, one for each image size of `DATA.IMG_SIZES`."""
        return size_phases(config, loader)

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
        """Build the optimizer with the published weight-decay groups, and `TRAIN.LAYER_DECAY`."""
        return build_optimizer(config, network, lr, layer_decay=config.TRAIN.LAYER_DECAY)

    def build_scheduler(
        self, config: CfgNode, optimizer: Optimizer, updates_before: Callable[[int], int], lr_scale: float
    ) -> Scheduler:
        """The schedule of `TRAIN.LR_SCHEDULER`."""
        return build_scheduler(config, optimizer, updates_before(1), lr_scale, updates_before)

    def check_schedule(self, config: CfgNode, steps_per_epoch: int | None = None) -> None:
        """Refuse a step schedule whose learning rate never drops."""
        check_schedule(config)

    def compiles(self, config: CfgNode) -> bool:
        """Whether `TRAIN.COMPILE` or `TEST.COMPILE` is on."""
        return config.TRAIN.COMPILE or config.TEST.COMPILE

    def build_teacher(self, run: Run) -> Teacher | None:
        """The teacher of `DISTILL.TEACHER`."""
        return build_teacher(run, self)

    def build_loss(self, run: Run, network: nn.Module, dataset: ImageDataset) -> LossFn:
        """The loss of `TRAIN.LOSS`, with Mixup and distillation."""
        config = run.config
        weights = class_weights(config, dataset)
        if weights is not None:
            run.logger.info(f'class weights in the loss: {weights.min():.3g} to {weights.max():.3g}')
        forward = maybe_compile(network, config, config.TRAIN.COMPILE)
        preprocess, mixup, criterion = (
            Preprocess(config, run.process.device),
            build_mixup(config),
            build_criterion(config, weights).to(run.process.device),
        )
        distil = build_distillation(run, dataset.classes)
        skipped = SkippedImages(dataset, config.DATA.ERROR_LIMIT, run.logger.warning)

        def loss_fn(batch: Sample) -> dict[str, Tensor]:
            skipped.count(batch.skipped)
            images, targets = mixup(*preprocess(batch))
            logits = forward(images)
            return distil(criterion(logits, targets), logits, images)

        return loss_fn

    def build_evaluation(self, run: Run, loader: DataLoader) -> EvaluateFn:
        """Top-1 and top-5 accuracy."""
        skipped = SkippedImages(loader.dataset, run.config.DATA.ERROR_LIMIT, run.logger.warning)
        return lambda network, poll, suffix: validate(run, network, loader, poll, skipped)

    def select_classes(
        self, run: Run, network: nn.Module, dataset: ImageDataset, checkpoint: Mapping[str, Any]
    ) -> nn.Module:
        """Keep the logits of the classes that `TEST.CLASSES` selects."""
        model = run.config.MODEL
        if run.config.TEST.CLASSES == 'all':
            return network
        path, known = model.RESUME or model.PRETRAINED, checkpoint.get('classes')
        indices = class_indices(dataset.classes, known, model.NUM_CLASSES, dataset.samples.where, path)
        run.logger.info(f'TEST.CLASSES subset: {len(indices)} of {model.NUM_CLASSES} classes are evaluated')
        return SelectedClasses(network, indices)


class MultiLabelClassification(Classification):
    """Image classification with several classes for each image: `DATA.MULTI_LABEL`."""

    metric = 'map'
    metric_name = 'mAP'

    def build_evaluation(self, run: Run, loader: DataLoader) -> EvaluateFn:
        """Mean average precision."""
        skipped = SkippedImages(loader.dataset, run.config.DATA.ERROR_LIMIT, run.logger.warning)
        return lambda network, poll, suffix: validate_multi_label(run, network, loader, poll, skipped)


TASK = Classification()
MULTI_LABEL_TASK = MultiLabelClassification()


if __name__ == '__main__':
    with exit_on_user_error():
        main(get_config(parse_option()))
