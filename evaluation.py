"""Evaluation of a classifier: metrics over a split, on any number of processes."""

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.recfunctions import unstructured_to_structured
from torch import Tensor, nn
from torch.utils.data import DataLoader

from data import IGNORED, ImageDataset, Preprocess, SkippedImages
from engine.distributed import all_reduce_sum, gather_on_main_process, on_main_process
from engine.evaluation import EvaluationLoop, Poll, no_poll
from engine.run import Run
from models.build import maybe_compile

# With this many classes or fewer, top-5 accuracy is always 100 %
MAX_TRIVIAL = 5


class Accuracy(NamedTuple):
    """Mean cross entropy, and top-1 and top-5 accuracy in percent, of `images` images.

    Attributes:
        val_loss: mean cross entropy.
        acc1: top-1 accuracy.
        acc5: top-5 accuracy; None for five classes or fewer.
        images: number of images.
        results: per-image results of this process, for the report; None during training.
        dataset: the dataset of the images.
    """

    val_loss: float
    acc1: float
    acc5: float | None
    images: int
    results: 'ImageResults | None' = None
    dataset: ImageDataset | None = None

    @classmethod
    def from_sums(cls, sums: Tensor) -> 'Accuracy':
        """Means from sums (4,): of the loss, of top-1 and top-5 hits (NaN for none), and the number of images."""
        loss, top1, top5, images = sums.tolist()
        count = images or math.nan  # all images of a batch may be unreadable
        acc5 = None if math.isnan(top5) else 100 * top5 / count
        return cls(loss / count, 100 * top1 / count, acc5, int(images))

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics by name."""
        top5 = {} if self.acc5 is None else {'acc5': self.acc5}
        return {'val_loss': self.val_loss, 'acc1': self.acc1} | top5

    def write_report(self, run: Run, suffix: str) -> None:
        """Write `predictions`, `classes`, `confusion` and others to the run's folder; see `evaluation_report`."""
        from evaluation_report import write_report  # scikit-learn and matplotlib, which training does not need

        write_report(run, self.dataset, self.results.table(), suffix, has_top5=self.acc5 is not None)


class ImageResults:
    """Collects the per-image results for the report of `--eval`: a few numbers per image, for any number of classes.

    Args:
        indices: indices of the images in the dataset, in the loader's order.
    """

    dtype = np.dtype(
        [
            ('index', np.int64),  # of the image in the dataset
            ('target', np.int64),  # index of the true class
            ('prediction', np.int64),  # index of the predicted class
            ('probability', np.float64),  # of the predicted class
            ('target_probability', np.float64),  # of the true class
            ('in_top5', np.int64),  # 1 if the true class is among the five most likely ones, else 0
            ('loss', np.float64),
        ]
    )

    def __init__(self, indices: Iterable[int]):
        self._indices = iter(indices)
        self._rows = [np.zeros((0, len(self.dtype)))]

    def add(self, logits: Tensor, top: Tensor, targets: Tensor) -> None:
        """Add a batch.

        Args:
            logits: (B, K).
            top: indices of the most likely classes, most likely first, (B, at most 5).
            targets: class indices (B,); `IGNORED` images are left out.
        """
        known, own = targets != IGNORED, targets.clamp(min=0)[:, None]
        log_probabilities = logits.float().log_softmax(dim=1)
        loss = -log_probabilities.gather(1, own)
        probability = log_probabilities.gather(1, top[:, :1]).exp()
        in_top5 = (top == own).any(dim=1, keepdim=True)
        values = torch.cat((own, top[:, :1], probability, (-loss).exp(), in_top5, loss), dim=1)  # float32
        indices = torch.tensor(list(islice(self._indices, len(targets))), dtype=torch.float64)
        self._rows.append(torch.cat((indices[:, None], values.cpu().double()), dim=1)[known.cpu()].numpy())

    def table(self) -> np.ndarray:
        """A row for each image, (images,) of `dtype`."""
        return unstructured_to_structured(np.concatenate(self._rows), self.dtype)


class SelectedClasses(nn.Module):
    """A classifier that computes the logits of some of its classes, in a given order.

    Args:
        network: the classifier.
        indices: indices of the classes to keep, in this order.
    """

    def __init__(self, network: nn.Module, indices: list[int]):
        super().__init__()
        self.network = network
        device = next(network.parameters()).device
        self.register_buffer('indices', torch.tensor(indices, device=device))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images."""
        return self.network(images)[:, self.indices]


def predict_batches(
    run: Run, network: nn.Module, loop: EvaluationLoop, skipped: SkippedImages | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Compute the logits (B, classes) of each batch of an evaluation; call it in inference mode.

    Args:
        run: the run.
        network: the network.
        loop: the loop over this process's batches.
        skipped: counts and logs unreadable images, over all evaluations of a run; None for a new counter.

    Yields:
        Logits and targets, on the device.
    """
    forward = maybe_compile(network.eval(), run.config, run.config.TEST.COMPILE)
    preprocess = Preprocess(run.config, run.process.device)
    skipped = skipped or SkippedImages(loop.loader.dataset, run.config.DATA.ERROR_LIMIT, run.logger.warning)
    for batch in loop:
        skipped.count(batch.skipped)
        images, targets = preprocess(batch)
        with run.precision.autocast():
            logits = forward(images)
        yield logits, targets


@torch.inference_mode()
def validate(
    run: Run, network: nn.Module, loader: DataLoader, poll: Poll = no_poll, skipped: SkippedImages | None = None
) -> Accuracy:
    """Evaluate a classifier on every image once: mean cross entropy, top-1 and top-5 accuracy.

    Sums are kept on the device and reduced over the processes once, at the end, so shards may differ in size.

    Args:
        run: the run.
        network: the network, not wrapped in DDP.
        loader: this process's shard of the images; rank 0 has the largest.
        poll: called after each batch, equally often in every process.
        skipped: counts and logs unreadable images, over all evaluations of a run; None for a new counter.
    """
    device = run.process.device
    sums = torch.zeros(4, dtype=torch.float32 if device.type == 'mps' else torch.float64, device=device)
    results = None if run.is_training_run else ImageResults(loader.sampler)
    loop = EvaluationLoop(run, loader, poll)
    for logits, targets in predict_batches(run, network, loop, skipped):
        loss = F.cross_entropy(logits.float(), targets, reduction='sum', ignore_index=IGNORED)
        top = logits.topk(min(5, logits.shape[1])).indices  # (B, 5)
        hits = top == targets[:, None]
        top5 = hits.sum() if logits.shape[1] > MAX_TRIVIAL else loss.new_full((), math.nan)
        batch_sums = torch.stack((loss, hits[:, 0].sum(), top5, (targets != IGNORED).sum()))
        sums += batch_sums
        if results is not None:
            results.add(logits, top, targets)
        loop.log(partial(_log_text, batch_sums, sums))
    accuracy = Accuracy.from_sums(all_reduce_sum(sums))._replace(results=results, dataset=loader.dataset)
    top5 = '' if accuracy.acc5 is None else f' Acc@5 {accuracy.acc5:.3f}'
    run.logger.info(f' * Acc@1 {accuracy.acc1:.3f}{top5}')
    run.logger.info(f'Accuracy of the network on the {accuracy.images} test images: {accuracy.acc1:.1f}%')
    return accuracy


def _log_text(batch_sums: Tensor, sums: Tensor) -> str:
    now, mean = Accuracy.from_sums(batch_sums), Accuracy.from_sums(sums)
    top5 = '' if mean.acc5 is None else f'\tAcc@5 {now.acc5:.3f} ({mean.acc5:.3f})'
    return f'Loss {now.val_loss:.4f} ({mean.val_loss:.4f})\tAcc@1 {now.acc1:.3f} ({mean.acc1:.3f}){top5}'


class MeanAveragePrecision(NamedTuple):
    """Average precision of each class, from `validate_multi_label`.

    Attributes:
        val_loss: mean binary cross entropy, over images and classes.
        average_precision: average precision of each class in percent, (classes,); NaN for a class without images.
        positives: number of images that show each class, (classes,).
        names: names of the classes.
        images: number of images.
    """

    val_loss: float
    average_precision: np.ndarray
    positives: np.ndarray
    names: Sequence[str]
    images: int

    @property
    def mean_ap(self) -> float:
        """Mean average precision in percent, over the classes that have images; NaN if there are none."""
        known = self.average_precision[~np.isnan(self.average_precision)]
        return float(known.mean()) if len(known) else math.nan

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics by name."""
        return {'val_loss': self.val_loss, 'map': self.mean_ap}

    def write_report(self, run: Run, suffix: str) -> None:
        """Write the average precision of each class to the run's folder; every rank calls it, and rank 0 writes."""
        from evaluation_report import write_average_precision  # scikit-learn and matplotlib take seconds to import

        write_average_precision(run, self.names, self.positives, self.average_precision, suffix)


@torch.inference_mode()
def validate_multi_label(
    run: Run, network: nn.Module, loader: DataLoader, poll: Poll = no_poll, skipped: SkippedImages | None = None
) -> MeanAveragePrecision:
    """Evaluate a multi-label classifier on every image once: mean average precision.

    Rank 0 gathers the logits of all images, since the average precision of a class ranks the images of all processes.

    Args:
        run: the run.
        network: the network, not wrapped in DDP.
        loader: this process's shard of the images; rank 0 has the largest.
        poll: called after each batch, equally often in every process.
        skipped: counts and logs unreadable images, over all evaluations of a run; None for a new counter.
    """
    loop, names = EvaluationLoop(run, loader, poll), loader.dataset.classes
    batches = [(torch.zeros(0, len(names)), torch.zeros(0, len(names)))]  # a shard may be empty
    for logits, targets in predict_batches(run, network, loop, skipped):
        is_kept = targets[:, 0] != IGNORED
        batches.append((logits[is_kept].float().cpu(), targets[is_kept].cpu()))
        loop.log(lambda pair=batches[-1]: f'Loss {F.binary_cross_entropy_with_logits(*pair).item():.4f}')
    gathered = gather_on_main_process([torch.cat(tensors).numpy() for tensors in zip(*batches, strict=True)])
    result = on_main_process(lambda: _mean_average_precision(*map(np.concatenate, zip(*gathered, strict=True)), names))
    present, absent = (result.positives > 0).sum(), (result.positives == 0).sum()
    run.logger.info(f' * mAP {result.mean_ap:.3f}')
    run.logger.info(
        f'mAP of the network on the {result.images} test images: {result.mean_ap:.1f}%, over {present} classes'
        + (f'; {absent} classes that no image shows are left out' if absent else '')
    )
    return result


def _mean_average_precision(logits: np.ndarray, targets: np.ndarray, names: Sequence[str]) -> MeanAveragePrecision:
    """Compute the metrics from all logits and targets of 0 and 1, both (images, classes)."""
    from sklearn.metrics import average_precision_score  # takes a second to import

    loss = F.binary_cross_entropy_with_logits(torch.from_numpy(logits), torch.from_numpy(targets))
    positives = targets.sum(axis=0).astype(np.int64)
    precision = np.full(len(names), np.nan)
    if np.isfinite(logits).all():  # a network that diverges has none
        for i in positives.nonzero()[0]:
            precision[i] = 100 * average_precision_score(targets[:, i], logits[:, i])
    return MeanAveragePrecision(loss.item(), precision, positives, names, len(targets))
