"""Train, evaluate or time an MSG-Transformer on a tree of image class folders.

    python main.py --cfg configs/msg_tiny_p4_win7_224.yaml --data-path <imagenet>

README has the commands for several GPUs and nodes.
"""

import argparse
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import yaml
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from yacs.config import CfgNode

from config import get_config
from data import build_criterion, build_eval_loader, build_loaders, build_mixup
from logger import MetricsLog, TrainMeter, create_logger, peak_memory_mb
from lr_scheduler import accumulation_steps, build_scheduler, learning_rate_scale, updates_per_epoch
from models import build_model
from optimizer import build_optimizer
from precision import Precision, build_precision
from utils import (
    CheckpointError,
    Process,
    all_reduce_sum,
    distribute,
    find_latest_checkpoint,
    from_main_process,
    load_checkpoint,
    load_weights,
    mistakes_in_one_line,
    save_checkpoint,
    set_seed,
    start_process,
    synchronize_gradients,
)


def parse_option(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a flag that is not given is None and overrides nothing."""
    parser = argparse.ArgumentParser(
        description='Train, evaluate or time an MSG-Transformer. Every setting is a key of the config tree '
        '(config.py); flags go before --opts, --opts before the file, the file before the defaults.',
        allow_abbrev=False,
    )
    add = parser.add_argument
    add('--cfg', required=True, metavar='FILE', help='YAML config, such as configs/msg_tiny_p4_win7_224.yaml')
    add(
        '--opts',
        nargs='+',
        action='extend',
        metavar='KEY VALUE',
        help='config keys and values, such as TRAIN.EPOCHS 100 SEED 1; may be given more than once',
    )
    add('--batch-size', type=int, metavar='N', help='images a process and step (DATA.BATCH_SIZE)')
    add('--data-path', metavar='DIR', help='folder with train/<class>/ and val/<class>/ (DATA.DATA_PATH)')
    add('--resume', metavar='FILE', help='checkpoint to continue, or to evaluate with --eval (MODEL.RESUME)')
    add('--pretrained', metavar='FILE', help='checkpoint whose weights start a new run (MODEL.PRETRAINED)')
    add('--accumulation-steps', type=int, metavar='N', help='batches an update (TRAIN.ACCUMULATION_STEPS)')
    add('--use-checkpoint', action='store_true', default=None, help='recompute activations, for memory')
    add('--amp-opt-level', choices=['O0', 'O1', 'O2'], help='mixed precision: O0 none, O1 autocast, O2 Apex only')
    add('--device', choices=['auto', 'cuda', 'cpu'], help='device; auto takes a GPU where there is one')
    add('--output', metavar='DIR', help='folder of all runs; this one writes <DIR>/<MODEL.NAME>/<TAG> (output)')
    add('--tag', metavar='NAME', help='name of this run among those of its model (default)')
    add('--eval', action='store_true', default=None, help='evaluate --resume or --pretrained and stop')
    add('--throughput', action='store_true', default=None, help='measure images/s of the network and stop')
    add('--local_rank', '--local-rank', type=int, metavar='N', help='set by torch.distributed.launch; not required')
    return parser.parse_args(argv)


class Run(NamedTuple):
    """What all parts of a job share."""

    config: CfgNode
    process: Process
    precision: Precision
    output_dir: Path
    logger: logging.Logger


def main(config: CfgNode) -> None:
    """Do the config's job in this process; its folder is `<OUTPUT>/<MODEL.NAME>/<TAG>`."""
    with start_process(config.DEVICE, config.LOCAL_RANK) as process:
        set_seed(config.SEED + process.rank)
        torch.backends.cudnn.benchmark = True
        output_dir = Path(config.OUTPUT or 'output') / config.MODEL.NAME / config.TAG
        logger = create_logger(output_dir, process.rank)
        run = Run(config, process, build_precision(config, process.device), output_dir, logger)
        with logging_redirect_tqdm([logger] if process.rank == 0 else []):  # log lines go above a progress bar
            logger.info(f'{process.world_size} process(es), device {process.device}, {run.precision}')
            model = build_model(config).to(process.device)
            parameters = sum(p.numel() for p in model.parameters())
            logger.info(f'{config.MODEL.NAME}: {parameters:,} parameters, {model.flops():,} multiply-adds')
            if config.THROUGHPUT_MODE:
                throughput(run, model)
                return
            checkpoint = load_start(run, model)
            if config.EVAL_MODE:
                validate(run, model, build_eval_loader(config, process.rank, process.world_size))
            else:
                train(run, model, checkpoint)


def load_start(run: Run, model: nn.Module) -> dict[str, Any] | None:
    """Load the weights the job starts from: --resume, else the run's newest checkpoint, else --pretrained.

    Returns:
        The checkpoint to continue; None where a new run starts.
    """
    config = run.config
    automatic = None
    if config.TRAIN.AUTO_RESUME and not config.EVAL_MODE and not config.MODEL.RESUME:
        automatic = from_main_process(find_latest_checkpoint(run.output_dir))
    resume = config.MODEL.RESUME or automatic
    path = resume or config.MODEL.PRETRAINED
    if not path:
        return None
    try:
        checkpoint = load_checkpoint(path)
        new_head = load_weights(model, checkpoint, path, may_replace_head=not resume and not config.EVAL_MODE)
    except CheckpointError as error:
        remedy = '; to start afresh, write another --tag or --opts TRAIN.AUTO_RESUME False' if automatic else ''
        raise CheckpointError(f'{error}{remedy}') from error
    if new_head:
        run.logger.info(f'the head of {path} has other classes: a new one is trained')
    run.logger.info(f'weights of {path} loaded')
    return checkpoint if resume else None


def train(run: Run, model: nn.Module, checkpoint: dict[str, Any] | None) -> None:
    """Train to the last epoch, evaluating after each; continue the checkpoint if there is one."""
    config, process, logger = run.config, run.process, run.logger

    # Data, loss
    train_loader, eval_loader = build_loaders(config, process.rank, process.world_size)
    mixup, criterion = build_mixup(config), build_criterion(config)

    # Optimizer, schedule
    scale = learning_rate_scale(config, process.world_size)
    optimizer = build_optimizer(config, model, lr=config.TRAIN.BASE_LR * scale)
    steps_per_epoch = updates_per_epoch(config, len(train_loader))
    scheduler = build_scheduler(config, optimizer, steps_per_epoch, lr_scale=scale)

    # Where to start
    start_epoch, max_accuracy = config.TRAIN.START_EPOCH, -1.0
    if checkpoint is not None:
        start_epoch, max_accuracy = restore(checkpoint, optimizer, run.precision)
        logger.info(f'continuing after epoch {start_epoch - 1}, max accuracy {max_accuracy:.2f}%')
    scheduler.step_update(max(start_epoch * steps_per_epoch - 1, 0))
    if start_epoch >= config.TRAIN.EPOCHS:
        logger.info(f'nothing to train: epoch {start_epoch} of TRAIN.EPOCHS {config.TRAIN.EPOCHS}')
        return

    # What the run leaves behind
    is_main = process.rank == 0
    metrics = MetricsLog(run.output_dir / 'metrics.jsonl' if is_main else None)
    if is_main:
        logger.info(f'config:\n{config.dump()}')
        (run.output_dir / 'config.yaml').write_text(config.dump())

    network = distribute(model, process.device)
    began = time.time()
    for epoch in range(start_epoch, config.TRAIN.EPOCHS):
        train_loader.sampler.set_epoch(epoch)
        fit = train_one_epoch(run, network, criterion, train_loader, optimizer, scheduler, mixup, epoch, metrics)
        result = validate(run, model, eval_loader)
        is_best = result.acc1 > max_accuracy
        max_accuracy = max(max_accuracy, result.acc1)
        logger.info(f'Max accuracy: {max_accuracy:.2f}%')
        metrics.write(kind='epoch', epoch=epoch, **fit, **result._asdict(), max_accuracy=max_accuracy)
        if is_main:
            state = {
                'model': model.state_dict(),
                'optimizer': optimizer.state_dict(),
                'lr_scheduler': scheduler.state_dict(),
                'precision': run.precision.state_dict(),
                'epoch': epoch,
                'max_accuracy': max_accuracy,
                'config': yaml.safe_load(config.dump()),
                'classes': eval_loader.dataset.classes,
            }
            if (epoch + 1) % config.SAVE_FREQ == 0 or epoch + 1 == config.TRAIN.EPOCHS:
                path = run.output_dir / f'ckpt_epoch_{epoch}.pth'
                save_checkpoint(path, state)
                logger.info(f'{path} saved')
            if is_best:
                save_checkpoint(run.output_dir / 'ckpt_best.pth', state)
    logger.info(f'Training time {timedelta(seconds=int(time.time() - began))}')


def restore(checkpoint: dict[str, Any], optimizer: Optimizer, precision: Precision) -> tuple[int, float]:
    """Restore the optimizer and the precision from a checkpoint.

    The schedule is a function of the config and the update alone, so that a longer run, another batch size or
    another number of processes takes effect; its saved state is for other programs.

    Returns:
        The epoch to start with, and the best accuracy so far in percent.

    Raises:
        CheckpointError: it holds weights only, or another optimizer's state.
    """
    missing = [name for name in ('optimizer', 'epoch', 'max_accuracy') if checkpoint.get(name) is None]
    if missing:
        raise CheckpointError(
            f'the checkpoint has no {", ".join(missing)}, so it cannot be continued: '
            f'start a new run from it with --pretrained'
        )
    try:
        saved, ours = checkpoint['optimizer']['param_groups'][0], optimizer.param_groups[0]
        if any((name in saved) != (name in ours) for name in ('betas', 'momentum')):
            raise ValueError('AdamW and SGD keep different states')
        optimizer.load_state_dict(checkpoint['optimizer'])
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint's optimizer is another than the config's ({error}): "
            f'write the TRAIN.OPTIMIZER it was made with, or start a new run from it with --pretrained'
        ) from error
    precision.load_state_dict(checkpoint.get('precision', {}))
    return checkpoint['epoch'] + 1, checkpoint['max_accuracy']


def train_one_epoch(
    run: Run,
    model: nn.Module,
    criterion: nn.Module,
    loader: DataLoader,
    optimizer: Optimizer,
    scheduler: Scheduler,
    mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    epoch: int,
    metrics: MetricsLog,
) -> dict[str, float]:
    """One pass over the training images; losses and norms are read from the device only where they are logged.

    Returns:
        `train_loss` (mean over all processes), `lr` of the last update, `seconds`, `images_per_s` of all processes.
    """
    config, process = run.config, run.process
    model.train()
    steps = updates_per_epoch(config, len(loader))
    meter = TrainMeter(run.logger, metrics, epoch, config.TRAIN.EPOCHS, steps, process.device)
    batches = progress(loader, f'epoch {epoch}', process)
    for step, group in enumerate(groups(batches, accumulation_steps(config))):
        lr = optimizer.param_groups[0]['lr']
        meter.update(*train_step(run, model, criterion, group, optimizer, mixup))
        scheduler.step_update(epoch * steps + step)
        if step % config.PRINT_FREQ == 0 or step + 1 == steps:
            meter.log(lr)
    seconds = meter.seconds
    run.logger.info(f'EPOCH {epoch} training takes {timedelta(seconds=int(seconds))}')
    images = len(loader) * config.DATA.BATCH_SIZE * process.world_size
    train_loss = all_reduce_sum(meter.total)[0].item() / (steps * process.world_size)
    return {'train_loss': train_loss, 'lr': lr, 'seconds': seconds, 'images_per_s': images / seconds}


def train_step(
    run: Run,
    model: nn.Module,
    criterion: nn.Module,
    batches: list[tuple[Tensor, Tensor]],
    optimizer: Optimizer,
    mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """One update from the mean gradient of some batches; processes exchange gradients at the last batch only.

    Returns:
        The mean loss and the gradient norm before clipping, scalars on the device.
    """
    device = run.process.device
    total_loss = torch.zeros((), device=device)
    for number, (images, targets) in enumerate(batches, start=1):
        images, targets = mixup(images.to(device, non_blocking=True), targets.to(device, non_blocking=True))
        with synchronize_gradients(model, enabled=number == len(batches)):
            with run.precision.autocast():
                loss = criterion(model(images), targets) / len(batches)
            run.precision.backward(loss)
        total_loss += loss.detach()
    return total_loss, run.precision.step(optimizer, model, run.config.TRAIN.CLIP_GRAD)


def progress(loader: DataLoader, name: str, process: Process) -> tqdm:
    """The loader's batches, with a bar where rank 0 has a terminal."""
    return tqdm(loader, name, leave=False, disable=None if process.rank == 0 else True)


def groups(batches: Iterable, size: int) -> Iterator[list]:
    """Consecutive lists of `size` batches; the last may be shorter."""
    batches = iter(batches)
    while group := list(islice(batches, size)):
        yield group


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
def validate(run: Run, model: nn.Module, loader: DataLoader) -> Evaluation:
    """Evaluate the network, not wrapped, on every image once.

    Sums are kept on the device and added up over the processes once, at the end, so shards may differ in size.
    """
    device = run.process.device
    model.eval()
    # Summed cross entropy; images whose class is the first guess, or among the first five; images
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    began = time.time()
    for number, (images, targets) in enumerate(progress(loader, 'evaluation', run.process)):
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        with run.precision.autocast():
            logits = model(images)
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
    result = Evaluation.from_sums(all_reduce_sum(sums))
    run.logger.info(f' * Acc@1 {result.acc1:.3f} Acc@5 {result.acc5:.3f}')
    run.logger.info(f'Accuracy of the network on the {len(loader.dataset)} test images: {result.acc1:.1f}%')
    return result


@torch.inference_mode()
def throughput(run: Run, model: nn.Module) -> float:
    """Log images/s of the forward pass on a random batch, the median of at least five seconds of runs."""
    from torch.utils.benchmark import Timer  # loads PyTorch's C++ compiler support, which no other job needs

    model.eval()
    data, channels = run.config.DATA, run.config.MODEL.MSG.IN_CHANS
    images = torch.randn(data.BATCH_SIZE, channels, data.IMG_SIZE, data.IMG_SIZE, device=run.process.device)

    def forward() -> None:
        with run.precision.autocast():
            model(images)

    timer = Timer('forward()', globals={'forward': forward}, num_threads=torch.get_num_threads())
    images_per_s = data.BATCH_SIZE / timer.blocked_autorange(min_run_time=5).median
    run.logger.info(f'batch_size {data.BATCH_SIZE} throughput {images_per_s:.1f} images/s')
    return images_per_s


if __name__ == '__main__':
    with mistakes_in_one_line():
        main(get_config(parse_option()))
