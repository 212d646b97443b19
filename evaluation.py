"""Evaluation of a classifier: metrics over a split, on any number of processes."""

import math
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from data import IGNORED, Preprocess, SkippedImages
from engine.distributed import all_reduce_sum, gather_on_main_process, on_main_process
from engine.evaluation import EvaluationLoop, Poll, no_poll
from engine.run import Run
from models.build import maybe_compile


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


class MeanAveragePrecision(NamedTuple):
    """Result of `validate_multi_label`.

    Attributes:
        val_loss: mean binary cross entropy, over images and classes.
        mean_ap: mean over the classes of their average precision, in percent; NaN if no class is present.
        present: number of classes that at least one image shows; the others have no average precision.
        classes: number of classes.
        images: number of images.
    """

    val_loss: float
    mean_ap: float
    present: int
    classes: int
    images: int

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics by name."""
        return {'val_loss': self.val_loss, 'map': self.mean_ap}

    def write_report(self, run: Run, suffix: str) -> None:
        """Write nothing: the log has all of it."""


@torch.inference_mode()
def validate_multi_label(
    run: Run, network: nn.Module, loader: DataLoader, poll: Poll = no_poll, skipped: SkippedImages | None = None
) -> MeanAveragePrecision:
    """Evaluate a network, not wrapped, on every image once, where an image may have several classes.

    Rank 0 gathers the logits of all images, since the average precision of a class ranks the images of all processes.

    Args:
        run: the run.
        network: the network.
        loader: this process's shard; rank 0 has the largest.
        poll: called after each batch, equally often in every process.
        skipped: of earlier evaluations, which have logged their bad images.
    """
    device = run.process.device
    forward = maybe_compile(network.eval(), run.config, run.config.TEST.COMPILE)
    preprocess = Preprocess(run.config, device)
    skipped = skipped or SkippedImages(loader.dataset, run.config.DATA.ERROR_LIMIT, run.logger.warning)
    loop, classes = EvaluationLoop(run, loader, poll), len(loader.dataset.classes)
    batches = [(torch.zeros(0, classes), torch.zeros(0, classes))]  # a shard may be empty
    for batch in loop:
        skipped.count(batch.skipped)
        images, targets = preprocess(batch)
        with run.precision.autocast():
            logits = forward(images)
        is_kept = targets[:, 0] != IGNORED
        batches.append((logits[is_kept].float().cpu(), targets[is_kept].cpu()))
        loop.log(lambda pair=batches[-1]: f'Loss {F.binary_cross_entropy_with_logits(*pair).item():.4f}')
    gathered = gather_on_main_process([torch.cat(tensors).numpy() for tensors in zip(*batches, strict=True)])
    result = on_main_process(lambda: _mean_average_precision(*map(np.concatenate, zip(*gathered, strict=True))))
    run.logger.info(f' * mAP {result.mean_ap:.3f}')
    absent = result.classes - result.present
    run.logger.info(
        f'mAP of the network on the {result.images} test images: {result.mean_ap:.1f}%, over {result.present} classes'
        + (f'; {absent} classes that no image shows are left out' if absent else '')
    )
    return result


def _mean_average_precision(logits: np.ndarray, targets: np.ndarray) -> MeanAveragePrecision:
    """Metrics of all images: logits and targets of 0 and 1, (images, classes)."""
    from sklearn.metrics import average_precision_score  # takes a second to import

    loss = F.binary_cross_entropy_with_logits(torch.from_numpy(logits), torch.from_numpy(targets))
    present = np.flatnonzero(targets.any(axis=0))
    mean_ap = math.nan
    if len(present) and np.isfinite(logits).all():  # a network that diverges has none
        mean_ap = 100 * float(np.mean([average_precision_score(targets[:, i], logits[:, i]) for i in present]))
    return MeanAveragePrecision(loss.item(), mean_ap, len(present), targets.shape[1], len(targets))
