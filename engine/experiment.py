"""What identifies a run: its origin, data, classes and environment, which every checkpoint records."""

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from engine.checkpoint import CheckpointError
from engine.distributed import gather_on_main_process, on_main_process
from engine.run import Run
from engine.task import SampleList
from utils import UserError, environment

# What a run started from: random weights (scratch), the weights of a checkpoint (pretrained), or the training state of
# another run's checkpoint (resume). A mapping with `kind`; for the last two also `path` and `sha256` of the checkpoint;
# for pretrained also `weights`, `head` and `missing`, the values of the config; for resume also `origin`, that of the
# other run.
# A run that distils has `teacher`: a mapping with `name`, as the config has it, and `sha256` of the weights.
Origin = Mapping[str, Any]
SCRATCH, PRETRAINED, RESUME = 'scratch', 'pretrained', 'resume'

# Entries of the environment, as checkpoints record it, that affect bit-exact resuming.
_LIBRARIES = ('torch', 'torchvision', 'timm', 'numpy', 'opencv', 'pillow', 'simplejpeg')
ENVIRONMENT = (*_LIBRARIES, 'cuda', 'device', 'cpu', 'threads', 'world_size', 'precision')


class ExperimentError(UserError):
    """Conflict between runs, or between ranks: a different network, different data or a different origin.

    Attributes:
        differences: what differs between the run in a folder and that of the command, if this is the conflict.
    """

    differences: Sequence[str] = ()


def describe_run(run: Run, datasets: Mapping[str, SampleList], origin: Origin | None) -> dict[str, Any]:
    """Collect what every checkpoint records about its run; every rank calls it at the same point.

    Args:
        run: the run.
        datasets: the splits `train` and `val`; their notes are logged.
        origin: where the run started; None if that is unknown.

    Returns:
        `classes`, `data`, `environment` and `origin`.

    Raises:
        ExperimentError: a rank has other data than rank 0.
    """
    log_notes(run, datasets)
    classes = list(datasets['val'].classes)
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
    known = {name: known[name] for name in known if name not in ('command', 'host', 'system')}  # in the log only
    return {'classes': classes, 'data': data, 'environment': known | ours, 'origin': origin}


def log_notes(run: Run, datasets: Mapping[str, SampleList]) -> None:
    """Log each dataset's notes, after the name of its split."""
    for split, dataset in datasets.items():
        for note in dataset.notes:
            run.logger.info(f'{split}: {note}')


def describe_samples(names: Iterable[str]) -> dict[str, int | str]:
    """Number of samples and a hash of their names, in order; the content of the files is not hashed.

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
    """Describe the splits whose samples have changed; a split that `before` does not have counts as unchanged."""
    changes = []
    for split, ours in now.items():
        theirs = before.get(split, ours)
        if theirs['images'] != ours['images']:
            changes.append(f'{split} has {ours["images"]} images, not {theirs["images"]}')
        elif theirs != ours:
            changes.append(f'{split} has as many images, but different ones')
    return changes


def origin_of_file(kind: str, path: str) -> dict[str, Any]:
    """The origin of a run that starts from a checkpoint file.

    Args:
        kind: `PRETRAINED` or `RESUME`.
        path: the checkpoint.

    Raises:
        CheckpointError: it cannot be read.
    """
    return {'kind': kind, 'path': str(Path(path).resolve()), 'sha256': _sha256(path)}


def pretrained_options(model: CfgNode) -> dict[str, str]:
    """What the origin of a run with --pretrained records of a config's node MODEL, in addition to the file."""
    return {name: model[f'PRETRAINED_{name.upper()}'] for name in ('weights', 'head', 'missing')}


def changed_options(model: CfgNode, recorded: Origin) -> list[str]:
    """Describe how a config's `pretrained_options` differ from those of a recorded origin."""
    return [
        f'MODEL.PRETRAINED_{name.upper()} was {recorded[name]} and is {value}'
        for name, value in pretrained_options(model).items()
        if recorded.get(name, value) != value
    ]


def recorded_origin(checkpoint: Mapping[str, Any]) -> Origin | None:
    """The origin that a checkpoint records; None if it records none.

    Older checkpoints have an entry `pretrained` instead of `origin`.
    """
    if 'pretrained' not in checkpoint:
        return checkpoint.get('origin')
    pretrained = checkpoint['pretrained']
    return {'kind': SCRATCH} if pretrained is None else {'kind': PRETRAINED, **pretrained}


def is_pretrained(origin: Origin | None) -> bool:
    """Whether a run, or the run that it was resumed from, started with --pretrained; False if that is unknown."""
    while origin is not None and origin['kind'] == RESUME:
        origin = origin.get('origin')
    return origin is not None and origin['kind'] == PRETRAINED


def recorded_teacher(origin: Origin | None) -> Mapping[str, str]:
    """The teacher that an origin records; an empty mapping if there is none."""
    return (origin or {}).get('teacher') or {}


def changed_teacher(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Describe how a run's teacher differs from the recorded one; empty if the weights are the same."""
    if before.get('sha256') == now.get('sha256'):
        return []
    if not before:
        return [f'it had no teacher, and now has {now["name"]}']
    if not now:
        return [f'its teacher was {before["name"]}, and now there is none']
    if before['name'] == now['name']:
        return [f'the weights of its teacher {now["name"]} have changed']
    return [f'its teacher was {before["name"]}, and now is {now["name"]}']


def origin_name(origin: Origin) -> str:
    """Format an origin for messages, such as `--pretrained FILE`."""
    return 'scratch' if origin['kind'] == SCRATCH else f'--{origin["kind"]} {origin["path"]}'


def is_same_origin(kind: str, path: str, recorded: Origin) -> bool:
    """Whether a recorded origin matches a file of the command line, by path or by SHA-256.

    A file at the same path counts as the same, whatever it holds now: it may have been removed or overwritten since.
    """
    if recorded['kind'] != kind:
        return False
    return str(Path(path).resolve()) == recorded['path'] or _sha256(path) == recorded['sha256']


def has_changed(path: str, recorded: Origin) -> bool:
    """Whether the file at the path of a recorded origin still exists, but has another content."""
    is_at_path = str(Path(path).resolve()) == recorded['path']
    return is_at_path and Path(path).exists() and _sha256(path) != recorded['sha256']


def _sha256(path: str) -> str:
    try:
        with open(path, 'rb') as file:
            return hashlib.file_digest(file, 'sha256').hexdigest()
    except OSError as error:
        raise CheckpointError(f'checkpoint {path} cannot be read: {error.strerror}') from error


def compare_classes(classes: Sequence[str], checkpoint: Mapping[str, Any]) -> list[str]:
    """Describe how the class names of the data differ from those of a checkpoint; empty if they do not.

    A checkpoint without class names counts as equal.
    """
    theirs = [unicodedata.normalize('NFC', str(name)) for name in checkpoint.get('classes') or ()]
    classes = [unicodedata.normalize('NFC', name) for name in classes]  # copies from a Mac have decomposed letters
    if not theirs or theirs == classes:
        return []
    if len(classes) != len(theirs):
        return [f'{len(classes)} classes instead of {len(theirs)}']
    first = next(f'{ours} for {before}' for ours, before in zip(classes, theirs, strict=True) if ours != before)
    return [f'other classes ({first})']


def warn_of_other_classes(run: Run, checkpoint: Mapping[str, Any], classes: Sequence[str]) -> None:
    """Warn where the names of the data's classes differ from those of the checkpoint."""
    for change in compare_classes(classes, checkpoint):
        run.logger.warning(
            f'{change} than in the checkpoint: metrics mean nothing unless the classes stand for the same things'
        )
