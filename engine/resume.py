"""Where a run starts: from scratch, from weights, or where it or another run has stopped."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from engine.checkpoint import CheckpointError, choose_weights, fit_weights, load_checkpoint, load_weights
from engine.class_names import same_classes
from engine.config_tree import ConfigTree
from engine.distributed import on_main_process
from engine.experiment import (
    ENVIRONMENT,
    ExperimentError,
    changed_splits,
    compare_classes,
    identify,
    warn_of_other_classes,
)
from engine.run import Run
from engine.run_folder import progress_of
from engine.state import TrainingState

# Keys that say how a run begins from MODEL.PRETRAINED.
_PRETRAINED_KEYS = ('MODEL.PRETRAINED_WEIGHTS', 'MODEL.PRETRAINED_HEAD')


class Start(NamedTuple):
    """The checkpoint that a run starts from.

    Attributes:
        checkpoint: its content; for a new run, its `model` are the weights chosen among raw and EMA ones.
        path: its path.
        resumes: whether the run resumes from it.
        is_new_run: whether a new run starts from its weights.
        is_automatic: whether it is the newest in the run's folder.
        pretrained: path and hash of the file whose weights the run began from; None for a run from scratch, and where
            the checkpoint does not say.
    """

    checkpoint: dict[str, Any]
    path: str
    resumes: bool
    is_new_run: bool
    is_automatic: bool
    pretrained: Mapping[str, str] | None

    def load_weights(self, run: Run, model: nn.Module, head: str, classes: Sequence[str] | None = None) -> None:
        """Load its weights into a network, fitted to its windows and image size unless the run resumes.

        A new run may keep a head of its own. The log says what was done.

        Args:
            run: the run.
            model: the network.
            head: regular expression that matches the start of the names of weights that depend on the classes.
            classes: names of the data's classes, where a new run starts.

        Raises:
            CheckpointError: it does not fit.
        """
        choice = run.config.MODEL.PRETRAINED_HEAD
        has_other_names = bool(classes) and same_classes(classes, self.checkpoint.get('classes')) is False
        is_new = choice == 'new' or (choice == 'auto' and has_other_names)
        replaceable = head if self.is_new_run and choice != 'keep' else None
        checkpoint, notes = self.checkpoint, []
        if not self.resumes:
            weights, notes = fit_weights(model, checkpoint['model'], self.path)
            checkpoint = checkpoint | {'model': weights}
        try:
            is_replaced = load_weights(model, checkpoint, self.path, replaceable, is_replaced=is_new)
        except CheckpointError as error:
            remedy = ': to start over, write another --tag or --opts TRAIN.AUTO_RESUME False'
            raise CheckpointError(f'{error}{remedy if self.is_automatic else ""}') from error
        run.logger.info(f'weights of {self.path} loaded')
        for note in notes:
            run.logger.info(f'{self.path}: {note}')
        if is_replaced:
            reason = 'MODEL.PRETRAINED_HEAD is new' if choice == 'new' else f'{self.path} has other classes'
            run.logger.info(f'{reason}: the head starts from scratch')
        elif self.is_new_run and has_other_names:
            run.logger.warning(f'{self.path} has classes of other names, and MODEL.PRETRAINED_HEAD keeps its head')


def find_start(run: Run, tree: ConfigTree) -> Start | None:
    """Load what the run starts from: --resume, else the newest intact checkpoint in its folder, else --pretrained.

    A run that does not train never takes its own checkpoint automatically.

    Args:
        run: the run.
        tree: the task's keys.

    Returns:
        The checkpoint, or None for a run from scratch.

    Raises:
        CheckpointError: it cannot be read.
        ExperimentError: the folder holds a run of another network, or one that began from other weights.
    """
    config, automatic = run.config, None
    weights_choice = config.MODEL.PRETRAINED_WEIGHTS.replace('auto', '')
    if config.TRAIN.AUTO_RESUME and run.is_training_run and not config.MODEL.RESUME:
        automatic = on_main_process(run.folder.newest_complete)
    resume = config.MODEL.RESUME or automatic
    path = resume or config.MODEL.PRETRAINED
    if not path:
        return None
    checkpoint = load_checkpoint(path)
    pretrained = checkpoint.get('pretrained')
    is_new_run = not resume and not config.EVAL_MODE
    if automatic:
        _check_experiment(run, checkpoint, automatic, tree)
    if is_new_run:
        pretrained = on_main_process(lambda: identify(path))
        weights, name = choose_weights(checkpoint, path, weights_choice)
        checkpoint = {key: x for key, x in checkpoint.items() if key != 'model_ema'} | {'model': weights}
        run.logger.info(f'{path}: {name}')
    resumes = run.is_training_run and bool(resume)
    return Start(checkpoint, str(path), resumes, is_new_run, automatic is not None, pretrained)


def _check_experiment(run: Run, checkpoint: dict[str, Any], path: Path, tree: ConfigTree) -> None:
    """Refuse to continue a run of another network or other data, or one that began from other weights."""
    saved = checkpoint.get('config')
    changed = tree.changed_keys(run.config, saved) if saved else []
    pretrained = run.config.MODEL.PRETRAINED
    if saved and pretrained:
        changed += tree.changed_keys(run.config, saved, _PRETRAINED_KEYS)
    refused = [str(key) for key in changed if key.defines_experiment or key.name in _PRETRAINED_KEYS]
    if refused:
        raise _other_experiment(run, path, refused)
    if not pretrained:
        return
    if 'pretrained' not in checkpoint:
        run.logger.warning(f'{path} does not say whether its run began from {pretrained}: it resumes')
        return
    recorded = checkpoint['pretrained']
    if not on_main_process(lambda: _is_same_file(pretrained, recorded)):
        origin = recorded['path'] if recorded else 'scratch'
        raise ExperimentError(
            f'{run.output_dir} holds a run that began from {origin}, not from {pretrained}: '
            f'write another --tag, or leave out --pretrained to resume it'
        )


def _other_experiment(run: Run, path: str | Path, changes: list[str]) -> ExperimentError:
    return ExperimentError(
        f'{run.output_dir} holds a run of another experiment ({"; ".join(changes)}): '
        f'write another --tag, or --resume {path} to go on from it where its weights fit'
    )


def _is_same_file(path: str, recorded: Mapping[str, str] | None) -> bool:
    """Whether a file is the one that a run began from: by path, then by content."""
    if recorded is None:
        return False
    return str(Path(path).resolve()) == recorded['path'] or identify(path)['sha256'] == recorded['sha256']


def begin_training(
    run: Run, state: TrainingState, start: Start | None, record: dict[str, Any], tree: ConfigTree
) -> dict[str, Any]:
    """Resume training where a checkpoint left it, or begin a new run; every process calls it at the same point.

    What the run's folder holds of an abandoned run is set aside. The log says whether a run resumes bit for bit.

    Args:
        run: the run.
        state: the training state, with the start's weights.
        start: what the run starts from.
        record: from `describe_run`.
        tree: the task's keys.

    Returns:
        What the run's checkpoints say about it: the record, and `pretrained`, if it is known.

    Raises:
        ExperimentError: the folder holds a run on other data or other classes.
        CheckpointError: no run can be resumed from the checkpoint.
    """
    if start is None or not start.resumes:
        if state.epoch < run.config.TRAIN.EPOCHS:
            on_main_process(lambda: run.folder.set_run_aside('a new run starts here'))
        return record | {'pretrained': start and start.pretrained}
    checkpoint = start.checkpoint
    data_changes = changed_splits(checkpoint.get('data') or {}, record['data'])
    changes = data_changes + compare_classes(record['classes'], checkpoint)
    if start.is_automatic and changes:
        raise _other_experiment(run, start.path, changes)
    notes = state.load_state_dict(checkpoint, run.process.rank, run.process.world_size) + data_changes
    if data_changes:
        state.max_accuracy = -1.0
        run.logger.warning(f'the data have changed: {"; ".join(data_changes)}: the best metric starts from nothing')
    warn_of_other_classes(run, checkpoint, record['classes'])
    changed = tree.changed_keys(run.config, checkpoint.get('config') or run.config)
    if not start.is_automatic and state.epoch < run.config.TRAIN.EPOCHS:
        adopted = checkpoint | record | {'config': run.plain_config}
        if data_changes:
            adopted |= {'max_accuracy': -1.0, 'scores': {}}
        is_changed = bool(changes) or any(key.defines_experiment for key in changed)
        on_main_process(lambda: _make_room(run, start, adopted, is_changed))
    if changed:
        before = ' '.join(f'{key.name} {shlex.quote(str(key.before))}' for key in changed)
        run.logger.warning(f'other settings than before: {"; ".join(map(str, changed))}: undo with --opts {before}')
    notes += [f'{key.name} has changed' for key in changed] + _environment_notes(run, checkpoint, record)
    exactness = f'not bit for bit: {"; ".join(notes)}' if notes else 'bit for bit, as if it had never stopped'
    best = f'{state.max_accuracy:.2f}%' if state.max_accuracy >= 0 else 'none'
    run.logger.info(f'resuming at epoch {state.epoch}, update {state.step}, max accuracy {best}')
    run.logger.info(f'the run resumes {exactness}')
    return record | ({'pretrained': start.pretrained} if 'pretrained' in checkpoint else {})


def _environment_notes(run: Run, checkpoint: Mapping[str, Any], record: Mapping[str, Any]) -> list[str]:
    """What of the environment keeps the run from resuming bit for bit, as far as the checkpoint knows."""
    before = checkpoint.get('environment') or {}
    environment = {name: record['environment'][name] for name in ENVIRONMENT}
    pairs = {name: (before.get(name, now), now) for name, now in environment.items()}
    notes = [f'{name} was {old} and is {now}' for name, (old, now) in pairs.items() if old != now]
    notes += [f'it has no record of its {name}' for name in ('data', 'environment') if name not in checkpoint]
    if run.process.device.type != 'cpu' and not run.config.DETERMINISTIC:
        notes.append('DETERMINISTIC is off')
    return notes


def _make_room(run: Run, start: Start, adopted: dict[str, Any], is_changed: bool) -> None:
    """Set aside what else the folder holds, and keep the checkpoint given to --resume as this run's own.

    If the run is killed before it saves, the same command without --resume goes on from it.

    Args:
        run: the run.
        start: what it starts from.
        adopted: the checkpoint with this run's config, data and classes.
        is_changed: whether automatic resuming would refuse the checkpoint as it is.
    """
    folder = run.folder
    path = folder.path_of(adopted)
    if Path(start.path).resolve().parent == run.output_dir.resolve():
        others = [path] if is_changed else []
        if adopted['max_accuracy'] < 0:  # that of the best is of other data
            others.append(folder.best)
        folder.set_newer_aside(progress_of(adopted), [x for x in others if x.exists()])
    else:
        folder.set_run_aside(f'the run resumes from {start.path}')
    if not path.exists():
        folder.copy(adopted)
    folder.copy_best(adopted)
