"""Where a run starts: from scratch, from pretrained weights, or from a checkpoint of this or another run.

A folder holds one run. The same command continues it from its newest intact checkpoint. A command with another network,
other data, other classes or another origin is an error, except in an empty folder.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from engine.checkpoint import CheckpointError, load_checkpoint, other_task
from engine.config_tree import ConfigTree
from engine.distributed import gather_on_main_process, on_main_process
from engine.experiment import (
    ENVIRONMENT,
    PRETRAINED,
    RESUME,
    SCRATCH,
    ExperimentError,
    Origin,
    changed_options,
    changed_splits,
    changed_teacher,
    compare_classes,
    has_changed,
    is_pretrained,
    is_same_origin,
    origin_name,
    origin_of_file,
    pretrained_options,
    recorded_origin,
    recorded_teacher,
    warn_of_other_classes,
)
from engine.run import Run
from engine.state import TrainingState
from engine.task import Task
from engine.weights import (
    changed_network,
    check_same_network,
    choose_weights,
    fit_weights,
    load_weights,
    options_before,
)
from extensions import as_flags, missing_modules

# Kinds of `Start` in addition to SCRATCH, PRETRAINED and RESUME: continue the run in the folder, or evaluate weights.
CONTINUE, EVALUATE = 'continue', 'evaluate'

# Keys that change the network's input or the meaning of its logits: an evaluation with another value is an error
_INPUT_KEYS = ('DATA.EXIF', 'DATA.MULTI_LABEL')

# Keys, and prefixes of keys, that change what the evaluation of the same network on the same images measures
_EVALUATION_KEYS = ('DATA.IMG_SIZE', 'DATA.INTERPOLATION', 'DATA.PIPELINE', 'INPUT.TEST_', 'INPUT.MAX_LONG', 'TEST.')


class Start(NamedTuple):
    """What this process starts from.

    Attributes:
        kind: SCRATCH; PRETRAINED: the weights of --pretrained; RESUME: the training state of another run's checkpoint;
            CONTINUE: the newest checkpoint in the run's folder; or EVALUATE: weights only.
        origin: the starting point of the whole run, which its first checkpoint has recorded; None if it is unknown.
        path: the checkpoint's path; '' for SCRATCH.
        checkpoint: the loaded checkpoint, None for SCRATCH. For PRETRAINED, `model` holds the selected (raw or EMA)
            weights.
    """

    kind: str
    origin: Origin | None = None
    path: str = ''
    checkpoint: Mapping[str, Any] | None = None

    @property
    def resumes(self) -> bool:
        """Whether the optimizer, the schedule and the progress are restored as well."""
        return self.kind in (CONTINUE, RESUME)

    @property
    def is_pretrained(self) -> bool:
        """Whether the weights were trained before: they are evaluated, or the run (or its origin) had --pretrained."""
        return self.kind == EVALUATE or is_pretrained(self.origin)

    def load_weights(self, run: Run, task: Task, network: nn.Module, classes: Sequence[str] = ()) -> None:
        """Load the checkpoint's weights into a network; the log says what was done.

        A run that resumes loads them unchanged. Otherwise they are fitted to the network's window and image size. With
        PRETRAINED, the head may be replaced by a new one, the checkpoint may be of another task, and with
        `MODEL.PRETRAINED_MISSING allow`, it may lack weights of the network and have others.

        Args:
            run: the run.
            task: its task.
            network: the network.
            classes: names of the data's classes; empty if they do not matter.

        Raises:
            CheckpointError: names or shapes of the weights do not match.
        """
        if self.kind == SCRATCH:
            return
        path, checkpoint, choice = self.path, self.checkpoint, run.config.MODEL.PRETRAINED_HEAD
        missing = 'error'
        if self.kind == PRETRAINED:
            missing = 'allow' if run.config.MODEL.PRETRAINED_MISSING == 'allow' else 'report'
        if self.kind == PRETRAINED and checkpoint['task'] != task.name:
            _log_notes(run, path, task.load_other_task(network, checkpoint, path, missing))
            return
        if not self.resumes:
            weights, notes = fit_weights(network, checkpoint['model'], path)
            checkpoint = {**checkpoint, 'model': weights}
            _log_notes(run, path, notes)
        has_other_classes = bool(classes) and bool(compare_classes(classes, checkpoint))
        is_new = choice == 'new' or (choice == 'auto' and has_other_classes)
        replaceable = task.head_pattern(network) if self.kind == PRETRAINED and choice != 'keep' else None
        try:
            loaded = load_weights(network, checkpoint, path, replaceable, is_new, missing)
        except CheckpointError as error:
            remedy = ': to start over, write another --tag' if self.kind == CONTINUE else ''
            raise CheckpointError(f'{error}{remedy}') from error
        run.logger.info(f'weights of {path} loaded')
        for note in loaded.notes:
            run.logger.warning(f'{path}: {note}')
        if loaded.is_head_new:
            reason = 'MODEL.PRETRAINED_HEAD is new' if choice == 'new' else f'{path} has other classes'
            run.logger.info(f'{reason}: the head starts from scratch')
        elif self.kind == PRETRAINED and has_other_classes:
            run.logger.warning(f'{path} has other classes, but MODEL.PRETRAINED_HEAD keep keeps its head')


def _log_notes(run: Run, path: str, notes: Sequence[str]) -> None:
    for note in notes:
        run.logger.info(f'{path}: {note}')


def find_start(run: Run, tree: ConfigTree) -> Start:
    """Find and load what a run starts from.

    A training run continues from the newest checkpoint in its folder. In a folder without checkpoints it starts from
    --resume, from --pretrained, or from scratch. A run that does not train loads the weights of --resume or
    --pretrained.

    A checkpoint of a network that computes something else may load all the same (see `changed_network`). It is an error
    if --resume names such a checkpoint to evaluate or to benchmark it. With --pretrained, its weights are loaded into
    the config's network, with a warning that names the keys. For a run that resumes training, see `resume_training`.

    Args:
        run: the run.
        tree: the task's keys.

    Raises:
        CheckpointError: a checkpoint cannot be read, or is to be evaluated in another network.
        ExperimentError: the folder holds another run.
    """
    model = run.config.MODEL
    path = model.RESUME or model.PRETRAINED
    if run.is_training_run:
        newest = on_main_process(run.folder.newest_intact)
        if newest is not None:
            checkpoint = load_checkpoint(newest)
            _check_same_run(run, checkpoint, tree)
            if newest == run.folder.best:
                newest = on_main_process(lambda: run.folder.copy_best(checkpoint))
            return Start(CONTINUE, _continued_origin(run, checkpoint), str(newest), checkpoint)
    elif run.config.EVAL_MODE or model.RESUME:
        checkpoint = load_checkpoint(path)
        _warn_of_ignored(run, path, checkpoint)
        _check_evaluation(run, path, checkpoint, tree)
        return Start(EVALUATE, None, path, checkpoint)
    if not path:
        return Start(SCRATCH, {'kind': SCRATCH})
    checkpoint = load_checkpoint(path)
    _warn_of_ignored(run, path, checkpoint)
    kind = RESUME if model.RESUME else PRETRAINED
    origin = on_main_process(lambda: origin_of_file(kind, path))
    if kind == RESUME:
        return Start(kind, origin | {'origin': recorded_origin(checkpoint)}, path, checkpoint)
    _warn_of_other_network(run, path, checkpoint, tree)
    origin |= pretrained_options(model)
    weights, name = choose_weights(checkpoint, path, model.PRETRAINED_WEIGHTS)
    run.logger.info(f'{path}: {name}')
    checkpoint = {key: value for key, value in checkpoint.items() if key != 'model_ema'} | {'model': weights}
    return Start(kind, origin, path, checkpoint)


def _warn_of_ignored(run: Run, path: str, checkpoint: Mapping[str, Any]) -> None:
    if 'ignored' in checkpoint:
        names = ', '.join(checkpoint['ignored'])
        run.logger.warning(f'{path}: entries are ignored, as they are not what a run writes: {names}')


def _check_evaluation(run: Run, path: str, checkpoint: Mapping[str, Any], tree: ConfigTree) -> None:
    """Compare a checkpoint to be evaluated or timed with the config.

    Raises:
        CheckpointError: it is of another task or, named by --resume, of a network that computes something else.
    """
    if checkpoint['task'] != tree.task:
        raise other_task(checkpoint, path, tree.task)
    if run.config.MODEL.RESUME:
        otherwise = '. To take its weights for the network of this config, write --pretrained instead of --resume'
        check_same_network(run.config, checkpoint, path, tree, _INPUT_KEYS, otherwise)
    else:
        _warn_of_other_network(run, path, checkpoint, tree)
    starts = tuple(key for key in _EVALUATION_KEYS if key.endswith(('.', '_')))
    names = [
        name
        for name, key in tree.keys.items()
        if (name in _EVALUATION_KEYS or name.startswith(starts)) and key.affects != 'nothing'
    ]
    changed = tree.changed_keys(run.config, checkpoint.get('config') or run.config, names)
    if changed and run.config.EVAL_MODE:
        run.logger.warning(
            f'{path} is evaluated with other settings than its run: {"; ".join(map(str, changed))}: '
            f'undo with --opts {options_before(changed)}'
        )


def _warn_of_other_network(run: Run, path: str, checkpoint: Mapping[str, Any], tree: ConfigTree) -> None:
    """Warn of weights from a network that computes something else; other classes are reported elsewhere."""
    changed = changed_network(run.config, checkpoint, tree, _INPUT_KEYS)
    changed = [key for key in changed if key.name != 'MODEL.NUM_CLASSES']
    if changed:
        run.logger.warning(
            f'the config differs from that of {path} in what the network computes: {"; ".join(map(str, changed))}: '
            f'undo with --opts {options_before(changed)}'
        )


def _check_same_run(run: Run, checkpoint: Mapping[str, Any], tree: ConfigTree) -> None:
    """Compare the config and the origin of the command with those of the run in its folder.

    Raises:
        ExperimentError: they differ, or TRAIN.AUTO_RESUME is False.
    """
    if not run.config.TRAIN.AUTO_RESUME:
        raise ExperimentError(
            f'{run.output_dir} already holds a run, and TRAIN.AUTO_RESUME is False: write another --tag, or leave it '
            f'out to continue the run'
        )
    saved = checkpoint.get('config') or run.config
    if missing := missing_modules(saved.get('IMPORT'), run.config.IMPORT):
        raise ExperimentError(
            f'the run in {run.output_dir} had {as_flags(missing)}, and this command does not: add it to continue the '
            f'run, or write another --tag'
        )
    differences = [str(key) for key in tree.changed_keys(run.config, saved) if key.defines_experiment]
    differences += on_main_process(lambda: _changed_origin(run, checkpoint))
    if differences:
        raise _another_run(run, differences)


def _changed_origin(run: Run, checkpoint: Mapping[str, Any]) -> list[str]:
    """Describe how the origin of the command line differs from the recorded one; empty if it does not.

    A command without --resume and --pretrained has no origin: it continues the run.
    """
    model, recorded = run.config.MODEL, recorded_origin(checkpoint)
    kind, path = (RESUME, model.RESUME) if model.RESUME else (PRETRAINED, model.PRETRAINED)
    if not path:
        return []
    flag = f'--{kind} {path}'
    if recorded is None or (kind == RESUME and 'origin' not in checkpoint):  # older versions did not record --resume
        run.logger.warning(f'the run in {run.output_dir} does not record whether it started from {flag}: it continues')
        return []
    if not is_same_origin(kind, path, recorded):
        return [f'it started from {origin_name(recorded)}, not from {flag}; leave out --{kind} to continue it']
    if has_changed(path, recorded):
        run.logger.warning(
            f'{path} has changed since the run started from it: to start from it again, write another --tag'
        )
    return changed_options(model, recorded)


def _continued_origin(run: Run, checkpoint: Mapping[str, Any]) -> Origin | None:
    """The origin of the run in the folder; a run of an older version has that of --resume, which it did not record."""
    resume, recorded = run.config.MODEL.RESUME, recorded_origin(checkpoint)
    if not resume or 'origin' in checkpoint:
        return recorded
    return on_main_process(lambda: origin_of_file(RESUME, resume)) | {'origin': recorded}


def _another_run(run: Run, differences: Sequence[str]) -> ExperimentError:
    error = ExperimentError(f'{run.output_dir} holds another run ({"; ".join(differences)}): write another --tag')
    error.differences = differences
    return error


def record_teacher(run: Run, start: Start) -> Start:
    """Record the run's teacher in the origin of a new run; every rank calls it at the same point.

    Args:
        run: the run, with its teacher.
        start: where the run starts.

    Raises:
        ExperimentError: a run continues with another teacher, or a rank has another teacher than rank 0.
    """
    ours = run.teacher.identity if run.teacher else {}
    gathered = gather_on_main_process(ours)

    def check() -> None:
        for rank, theirs in enumerate(gathered):
            if changed_teacher(theirs, ours):
                raise ExperimentError(
                    f'the teacher of rank {rank} has other weights than that of rank 0: give every node the same files'
                )

    on_main_process(check)
    if start.kind != CONTINUE:
        return start._replace(origin={**start.origin, 'teacher': ours}) if ours else start
    recorded = recorded_teacher(start.origin)
    if changes := changed_teacher(recorded, ours):
        remedy = f'give that teacher with DISTILL.TEACHER {recorded["name"]}' if recorded else 'leave it out'
        raise _another_run(run, [f'{changes[0]}; {remedy} to continue the run'])
    return start


def resume_training(run: Run, task: Task, state: TrainingState, start: Start, provenance: Mapping[str, Any]) -> None:
    """Restore the training state from the checkpoint of a start; every rank calls it at the same point.

    The log says whether the run resumes bit for bit, and what is different if it does not.

    Args:
        run: the run.
        task: its task.
        state: the training state, whose network has the checkpoint's weights.
        start: where the run starts: CONTINUE or RESUME.
        provenance: what the run's checkpoints record, from `describe_run`.

    Raises:
        ExperimentError: the run in the folder has other data or other classes.
        CheckpointError: the checkpoint has no training state, or one that does not fit.
    """
    checkpoint = start.checkpoint
    data_changes = changed_splits(checkpoint.get('data') or {}, provenance['data'])
    changes = data_changes + compare_classes(provenance['classes'], checkpoint)
    if start.kind == CONTINUE and changes:
        raise _another_run(run, changes)
    notes = state.load_state_dict(checkpoint, run.own_ranks[0], run.rank_count) + data_changes
    changed = task.tree.changed_keys(run.config, checkpoint.get('config') or run.config)
    other_data = data_changes + [str(key) for key in changed if key.affects == 'data']
    if other_data:
        state.forget_best()
        run.logger.warning(f'other data than before: {"; ".join(other_data)}: the best metric is reset')
    warn_of_other_classes(run, checkpoint, provenance['classes'])
    origins = (recorded_origin(checkpoint), provenance.get('origin'))
    notes += changed_teacher(*map(recorded_teacher, origins))
    if changed:
        run.logger.warning(
            f'other settings than before: {"; ".join(map(str, changed))}: undo with --opts {options_before(changed)}'
        )
    notes += [f'{key.name} has changed' for key in changed] + _environment_notes(run, checkpoint, provenance)
    exactness = f'not bit for bit: {"; ".join(notes)}' if notes else 'bit for bit, as if it had never stopped'
    best = f'{state.max_accuracy:.2f}%' if state.max_accuracy >= 0 else 'none'
    run.logger.info(f'resuming at epoch {state.epoch}, update {state.step}, max {task.metric_name} {best}')
    run.logger.info(f'the run resumes {exactness}')


def _environment_notes(run: Run, checkpoint: Mapping[str, Any], provenance: Mapping[str, Any]) -> list[str]:
    """Reasons of hardware and software why resuming is not bit-exact, as far as the checkpoint records them."""
    before = checkpoint.get('environment') or {}
    environment = {name: provenance['environment'][name] for name in ENVIRONMENT}
    if run.config.TRAIN.VIRTUAL_RANKS:
        del environment['world_size']  # changes no bit
    pairs = {name: (before.get(name, now), now) for name, now in environment.items()}
    notes = [f'{name} was {old} and is {now}' for name, (old, now) in pairs.items() if old != now]
    notes += [
        f'the checkpoint does not record its {name}' for name in ('data', 'environment') if name not in checkpoint
    ]
    if run.process.device.type != 'cpu' and not run.config.DETERMINISTIC:
        notes.append('DETERMINISTIC is off')
    return notes
