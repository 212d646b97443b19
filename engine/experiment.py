"""What makes two runs the same experiment: data, classes, the weights they began from, the environment."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from engine.checkpoint import CheckpointError
from engine.class_names import same_classes
from engine.distributed import gather_on_main_process, on_main_process
from engine.run import Run
from utils import UserError, environment

# What the bits of a run depend on beyond its config and data, of what checkpoints say of its environment.
ENVIRONMENT = ('torch', 'torchvision', 'timm', 'cuda', 'device', 'cpu', 'threads', 'world_size', 'precision')


class ExperimentError(UserError):
    """Runs or ranks that would spoil each other: another network, other data or other weights than before."""


class DescribedDataset(Protocol):
    """What a run needs to know of its data: notes for the log, and a name per sample."""

    notes: list[str]

    def sample_names(self) -> Iterable[str]:
        """A name per sample, in order, the same wherever and in whatever format the dataset is stored."""


def describe_run(run: Run, classes: list[str], datasets: Mapping[str, DescribedDataset]) -> dict[str, Any]:
    """What every checkpoint of the run says about it; every process calls it at the same point.

    Args:
        run: the run.
        classes: names of the classes.
        datasets: by split; their notes are logged.

    Returns:
        `classes`, `data` and `environment`.

    Raises:
        ExperimentError: a rank has other data than rank 0.
    """
    log_notes(run, datasets)
    data = {split: describe_samples(dataset.sample_names()) for split, dataset in datasets.items()}
    gathered = gather_on_main_process((classes, data))

    def check() -> None:
        for rank, (their_classes, theirs) in enumerate(gathered):
            if theirs != data or their_classes != classes:
                changes = changed_splits(data, theirs) or ['other classes']
                raise ExperimentError(
                    f'rank {rank} has other data than rank 0 ({"; ".join(changes)}): '
                    f'give every node the same files under --data-path {run.config.DATA.DATA_PATH}'
                )

    on_main_process(check)
    ours = {'world_size': str(run.process.world_size), 'precision': str(run.precision)}
    known = environment(run.process.device)
    known = {name: known[name] for name in known if name not in ('command', 'host', 'system')}  # logged alone
    return {'classes': classes, 'data': data, 'environment': known | ours}


def log_notes(run: Run, datasets: Mapping[str, DescribedDataset]) -> None:
    """Log the notes of datasets, by split."""
    for split, dataset in datasets.items():
        for note in dataset.notes:
            run.logger.info(f'{split}: {note}')


def describe_samples(names: Iterable[str]) -> dict[str, int | str]:
    """Number of samples and a hash of their names, in order: equal where the samples are.

    Args:
        names: a name per sample, the same wherever and in whatever format the dataset is stored.

    Returns:
        The number as `images` and a hexadecimal SHA-256 hash as `sha256`.
    """
    digest, count = hashlib.sha256(), 0
    for name in names:
        digest.update(name.encode(errors='surrogateescape') + b'\0')  # names of files need not be Unicode
        count += 1
    return {'images': count, 'sha256': digest.hexdigest()}


def changed_splits(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Splits whose samples differ, in words; nothing is known of a split that `before` does not have."""
    changes = []
    for split, ours in now.items():
        theirs = before.get(split, ours)
        if theirs['images'] != ours['images']:
            changes.append(f'{split} has {ours["images"]} images, not {theirs["images"]}')
        elif theirs != ours:
            changes.append(f'{split} has as many images, but other ones')
    return changes


def identify(path: str) -> dict[str, str]:
    """Path and content hash of a checkpoint."""
    try:
        with open(path, 'rb') as file:
            return {'path': str(Path(path).resolve()), 'sha256': hashlib.file_digest(file, 'sha256').hexdigest()}
    except OSError as error:
        raise CheckpointError(f'checkpoint {path} cannot be read: {error.strerror}') from error


def compare_classes(classes: Sequence[str], checkpoint: Mapping[str, Any]) -> list[str]:
    """What differs, in words, between the names of the data's classes and those of a checkpoint; empty for nothing."""
    theirs = checkpoint.get('classes')
    if same_classes(classes, theirs) is not False:
        return []
    if len(classes) != len(theirs):
        return [f'there were {len(theirs)} classes and are {len(classes)}']
    different = [f'{now} for {before}' for now, before in zip(classes, theirs, strict=True) if now != before]
    return [f'{len(different)} of the {len(classes)} classes have other names in the checkpoint ({different[0]})']


def warn_of_other_classes(run: Run, checkpoint: Mapping[str, Any], classes: Sequence[str]) -> None:
    """Warn where the names of the data's classes differ from those of the checkpoint."""
    for change in compare_classes(classes, checkpoint):
        run.logger.warning(f'{change}: accuracy means nothing unless they are the same classes')
