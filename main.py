"""Train, evaluate or time an MSG-Transformer on a tree of image class folders.

    python main.py --cfg configs/msg_tiny_p4_win7_224.yaml --data-path <imagenet>

README has the commands for several GPUs and nodes.
"""

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from checkpoint import load_weights
from config import TREE, get_config
from data import build_criterion, build_eval_loader, build_loaders, build_mixup
from job import compare_classes, continue_run, job_parser, load_start, prepare_training, started
from logger import peak_memory_mb
from lr_scheduler import build_scheduler, learning_rate_scale
from models import build_model
from optimizer import build_optimizer
from timing import alone
from trainer import Run, Trainer, batches_short, progress
from utils import all_reduce_sum, compiled, mistakes_in_one_line


def parse_option(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a flag that is not given is None and overrides nothing."""
    parser = job_parser(
        'Train, evaluate or time an MSG-Transformer. Every setting is a key of the config tree '
        '(config.py); flags go before --opts, --opts before the file, the file before the defaults.',
        cfg='configs/msg_tiny_p4_win7_224.yaml',
        data='train/<class>/ and val/<class>/',
    )
    parser.add_argument(
        '--throughput', action='store_true', default=None, help='measure images/s of the network and stop'
    )
    return parser.parse_args(argv)


def main(config: CfgNode) -> None:
    """Do the config's job in this process; its folder is `<OUTPUT>/<MODEL.NAME>/<TAG>`."""
    with started(config, compiles=config.TRAIN.COMPILE or config.TEST.COMPILE) as run:
        model = build_model(config).to(run.process.device)
        parameters = sum(p.numel() for p in model.parameters())
        run.logger.info(f'{config.MODEL.NAME}: {parameters:,} parameters, {model.flops():,} multiply-adds')
        if config.THROUGHPUT_MODE:
            throughput(run, run.precision.prepare(model)[0])
            return
        checkpoint = load_start(run, not config.EVAL_MODE, load_into(run, model))
        if config.EVAL_MODE:
            evaluate(run, run.precision.prepare(model)[0], checkpoint)
        else:
            train(run, model, checkpoint)


def load_into(run: Run, model: nn.Module) -> Callable[[dict[str, Any], str, bool], None]:
    """What puts a checkpoint's weights into the network, for `load_start`; a new run may have a new head."""

    def load(checkpoint: dict[str, Any], path: str, is_new_run: bool) -> None:
        if load_weights(model, checkpoint, path, r'head\.' if is_new_run else None):
            run.logger.info(f'the head of {path} has other classes: a new one is trained')

    return load


def train(run: Run, model: nn.Module, checkpoint: dict[str, Any] | None) -> None:
    """Train to the last epoch, evaluating after each; continue the checkpoint if there is one."""
    config, process = run.config, run.process

    # Data, loss
    train_loader, eval_loader = build_loaders(config, process.rank, process.world_size)
    mixup, criterion = build_mixup(config), build_criterion(config)

    def loss_of(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, targets = mixup(*to_device(batch, process.device))
        return criterion(network(images), targets)

    def figures_of(network: nn.Module, poll: Callable[[], None]) -> dict[str, float]:
        return validate(run, network, eval_loader, poll)._asdict()

    # Optimizer, schedule
    scale = learning_rate_scale(config, process.world_size)
    optimizer = build_optimizer(config, model, lr=config.TRAIN.BASE_LR * scale)
    network, state = prepare_training(
        run, model, optimizer, train_loader, partial(build_scheduler, config, lr_scale=scale), config.TRAIN.START_EPOCH
    )
    network = compiled(network, config.TRAIN.COMPILE, config.COMPILE_MODE)
    classes = eval_loader.dataset.classes
    if checkpoint is not None:
        compare_classes(run, checkpoint, classes)
        continue_run(run, state, checkpoint, TREE.changed_keys(config, checkpoint.get('config', {})))
    Trainer(run, state, network, train_loader, loss_of, figures_of, 'acc1', {'classes': classes}).fit()


def evaluate(run: Run, model: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Evaluate the checkpoint's weights, which the network has, and their average if it holds one."""
    loader = build_eval_loader(run.config, run.process.rank, run.process.world_size)
    compare_classes(run, checkpoint, loader.dataset.classes)
    validate(run, model, loader)
    if 'model_ema' in checkpoint:
        average = copy.deepcopy(model)  # Apex keeps half-precision copies of the weights that a network had
        load_weights(average, {'model': checkpoint['model_ema']}, 'model_ema of the checkpoint')
        run.logger.info('average of the weights:')
        validate(run, average, loader)


def to_device(batch: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """Images and class indices of a batch, on the device."""
    return tuple(tensor.to(device, non_blocking=True) for tensor in batch)


class Evaluation(NamedTuple):
    """Mean cross entropy, and top-1 and top-5 accuracy in percent."""

    val_loss: float
    acc1: float
    acc5: float

    @classmethod
    def from_sums(cls, sums: Tensor) -> 'Evaluation':
        """Means, from the sums of the loss, of first guesses right, of five guesses right, and of images."""
        loss, top1, top5, images = sums.tolist()
        return cls(loss / images, 100 * top1 / images, 100 * top5 / images)


@torch.inference_mode()
def validate(run: Run, model: nn.Module, loader: DataLoader, poll: Callable[[], None] = lambda: None) -> Evaluation:
    """Evaluate the network, not wrapped, on every image once.

    Sums are kept on the device and added up over the processes once, at the end, so shards may differ in size.

    Args:
        run: the job.
        model: the network.
        loader: this process's share of the images; rank 0 has the most.
        poll: called after each batch, as often in every process.
    """
    device, process = run.process.device, run.process
    network = compiled(model.eval(), run.config.TEST.COMPILE, run.config.COMPILE_MODE)
    # Summed cross entropy; images whose class is the first guess, or among the first five; images
    sums = torch.zeros(4, dtype=torch.float32 if device.type == 'mps' else torch.float64, device=device)
    began = time.time()
    for number, batch in enumerate(progress(loader, 'evaluation', process)):
        images, targets = to_device(batch, device)
        with run.precision.autocast():
            logits = network(images)
        loss = F.cross_entropy(logits.float(), targets, reduction='sum')
        hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]  # (B, 5)
        of_batch = torch.stack((loss, hits[:, 0].sum(), hits.sum(), torch.ones_like(targets).sum()))
        sums += of_batch
        if number % run.config.PRINT_FREQ == 0:
            now, mean = Evaluation.from_sums(of_batch), Evaluation.from_sums(sums)
            run.logger.info(
                f'Test: [{number}/{len(loader)}]\tTime {(time.time() - began) / (number + 1):.3f}\t'
                f'Loss {now.val_loss:.4f} ({mean.val_loss:.4f})\tAcc@1 {now.acc1:.3f} ({mean.acc1:.3f})\t'
                f'Acc@5 {now.acc5:.3f} ({mean.acc5:.3f})\t'
                f'Mem {peak_memory_mb(device):.0f}MB'
            )
        poll()
    images = len(loader.dataset)
    for _ in range(batches_short(loader, process.world_size)):
        poll()
    result = Evaluation.from_sums(all_reduce_sum(sums))
    run.logger.info(f' * Acc@1 {result.acc1:.3f} Acc@5 {result.acc5:.3f}')
    run.logger.info(f'Accuracy of the network on the {images} test images: {result.acc1:.1f}%')
    return result


@torch.inference_mode()
def throughput(run: Run, model: nn.Module) -> float:
    """Log images/s of the forward pass on a random batch, the median of ten turns; see also `tools.benchmark`."""
    data, channels = run.config.DATA, run.config.MODEL.MSG.IN_CHANS
    images = torch.randn(data.BATCH_SIZE, channels, data.IMG_SIZE, data.IMG_SIZE, device=run.process.device)
    network = compiled(model.eval(), run.config.TEST.COMPILE, run.config.COMPILE_MODE)

    def forward() -> Tensor:
        with run.precision.autocast():
            return network(images)

    for _ in range(3):
        forward()
    seconds = alone(forward, run.process.device)
    images_per_s = data.BATCH_SIZE / seconds.median
    low, high = data.BATCH_SIZE / seconds.high, data.BATCH_SIZE / seconds.low
    run.logger.info(
        f'batch_size {data.BATCH_SIZE} throughput {images_per_s:.1f} images/s (quartiles {low:.1f} to {high:.1f})'
    )
    return images_per_s


if __name__ == '__main__':
    with mistakes_in_one_line():
        main(get_config(parse_option()))
