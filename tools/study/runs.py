"""Runs of a study: trained by the task's program, in folders `<output>/<variant>/seed<n>`, and collected from there."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from statistics import median
from tempfile import TemporaryFile
from typing import Any, NoReturn

import yaml
from yacs.config import CfgNode

from engine.checkpoint import peek_checkpoint
from engine.config_tree import leaves
from engine.experiment import (
    PRETRAINED,
    changed_options,
    changed_splits,
    describe_samples,
    is_same_origin,
    origin_name,
    recorded_origin,
)
from engine.task import Task
from tools.plot import read_run
from tools.study.plan import Study, StudyError
from tools.summary.complexity import Complexity, count_complexity, count_detector
from utils import available_cores

ROOT = Path(__file__).parent.parent.parent

# Multiply-adds are counted in one thread at a time, as PyTorch's counter hooks into all networks
_COUNTING = threading.Lock()

# Metrics of an epoch that results keep; those of EMA weights where there are any
_EVALUATED = ('val_loss', 'acc1', 'acc5', 'box_AP', 'box_AP50', 'mask_AP', 'mask_AP50')
METRICS = ('train_loss', *_EVALUATED, *(f'ema_{name}' for name in _EVALUATED))


class StudyRuns:
    """Trains the runs of a study through its task's program.

    Args:
        study: the study.
        data_path: the dataset.
        output: folder of all runs.
        opts: config keys and values of every run.
        jobs: runs at a time, which share the cores.
    """

    def __init__(self, study: Study, data_path: Path, output: Path, opts: Sequence[str], jobs: int):
        self.study, self.data_path, self.output, self.opts = study, data_path, output, list(opts)
        threads = str(max(available_cores() // jobs, 1))
        self.environment = {'OMP_NUM_THREADS': threads} | os.environ
        self.processes: set[subprocess.Popen] = set()
        self.lock, self.is_stopped = threading.Lock(), False

    def train(self, variant: str, seed: int) -> dict[str, Any] | None:
        """Train a run from where it stands to its last epoch.

        Returns:
            Its result; None if the study was stopped.

        Raises:
            StudyError: it failed, or its folder holds another run.
        """
        options = self.study.options(variant, seed, self.opts)
        command = [sys.executable, '-m', self.study.task.program, '--cfg', str(self.study.cfg_file.resolve())]
        command += ['--data-path', str(self.data_path.resolve()), '--output', str(self.output.resolve())]
        command += ['--opts', *options]
        with TemporaryFile() as errors:
            with self.lock:
                if self.is_stopped:
                    return None
                process = subprocess.Popen(
                    command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors, env=self.environment
                )
                self.processes.add(process)
            code = process.wait()
            self.processes.discard(process)
            if self.is_stopped:
                return None
            if code:
                errors.seek(0)
                lines = errors.read().decode(errors='replace').strip().splitlines() or ['no message']
                raise StudyError(f'{variant}, seed {seed} failed: {lines[-1].removeprefix("error: ")}')
        return finished_run(self.study, self.output, variant, seed, self.opts)

    def stop(self) -> None:
        """Let the running runs save and end."""
        with self.lock:
            self.is_stopped = True
        for process in list(self.processes):
            process.terminate()
        for process in list(self.processes):
            process.wait()


@contextmanager
def stoppable(remedy: str = 'run the same command again to resume') -> Iterator[None]:
    """Context in which SIGTERM and Ctrl-C end the program with a line that says how to go on."""

    def interrupt(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(f'stopped: {remedy}')
    finally:
        signal.signal(signal.SIGTERM, before)


def describe_data(task: Task, config: CfgNode) -> dict[str, Any]:
    """Number and hash of the names of a dataset's images, by split, as checkpoints record them.

    Raises:
        DataError: the dataset cannot be used.
    """
    train_loader, eval_loader = task.build_loaders(config)
    datasets = {'train': train_loader.dataset.dataset, 'val': eval_loader.dataset}
    return {split: describe_samples(dataset.sample_names()) for split, dataset in datasets.items()}


def finished_run(
    study: Study,
    output: Path,
    variant: str,
    seed: int,
    opts: Sequence[str] = (),
    data: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """The result of a run, as plain data; None if it has not saved its last epoch, of early stopping too.

    Args:
        study: the study.
        output: folder of all runs.
        variant: of the run.
        seed: of the run.
        opts: config keys and values of every run.
        data: what the run must have been trained on, from `describe_data`; None if that does not matter.

    Raises:
        StudyError: its folder holds a run with other settings, on other data, or with another start or teacher.
    """
    folder = output / variant / f'seed{seed}'
    if not (folder / 'config.yaml').exists():
        return None
    config = study.config(variant, seed, opts)
    saved = yaml.safe_load((folder / 'config.yaml').read_text(encoding='utf-8'))
    changes = [*map(str, study.task.tree.changed_keys(config, saved)), *_changed_start(config, saved)]
    _refuse_other_run(folder, changes)
    epochs = read_run(folder, variant).epochs if (folder / 'metrics.jsonl').exists() else []
    is_last = epochs and (epochs[-1].get('early_stop') or epochs[-1]['epoch'] == config.TRAIN.EPOCHS - 1)
    last = folder / f'ckpt_epoch_{epochs[-1]["epoch"]}.pth' if is_last else None
    if last is None or not last.exists():
        return None
    checkpoint = peek_checkpoint(last)
    changes = [*_changed_weights(config, checkpoint), *changed_splits(checkpoint['data'], data or {})]
    _refuse_other_run(folder, changes)
    images = checkpoint['data']['train']['images']
    speeds = [record['images_per_s'] for record in epochs if record.get('images_per_s')]
    if not speeds:
        raise StudyError(f'{folder / "metrics.jsonl"} does not have the speed of an epoch: write another --output')
    with _COUNTING:
        complexity = _complexity(study.task, study.cfg_file, tuple(study.options(variant, 0, opts)))
    return {
        'variant': variant,
        'seed': seed,
        'parameters': complexity.parameters,
        'multiply_adds': complexity.measured,
        # From the median epoch, as `seconds` of one that was resumed are those since then.
        'train_seconds': round(len(epochs) * images / median(speeds), 1),
        'environment': checkpoint['environment'],
        'data': checkpoint['data'],
        'config': checkpoint['config'],
        'epochs': [{key: _rounded(record[key]) for key in METRICS if key in record} for record in epochs],
    }


def _refuse_other_run(folder: Path, changes: Sequence[str]) -> None:
    if changes:
        raise StudyError(f'{folder} holds another run ({"; ".join(changes)}): write another --output')


def _changed_start(config: CfgNode, saved: Mapping[str, Any]) -> list[str]:
    """Describe how a config starts or distils otherwise than a run, finished or not, with the config `saved`.

    Pretrained weights may be at another path: main.py, and `_changed_weights`, compare what is in the file.
    """
    ours, theirs, changes = dict(leaves(config)), dict(leaves(saved)), []
    for name in ('MODEL.PRETRAINED', 'DISTILL.TEACHER', 'DISTILL.TEACHER_WEIGHTS'):
        before, now = theirs.get(name, ''), ours.get(name, '')
        is_other = os.path.realpath(before) != os.path.realpath(now)
        if is_other and not (name == 'MODEL.PRETRAINED' and before and now):
            changes.append(f'{name} was {before!r} and is {now!r}')
    return changes


def _changed_weights(config: CfgNode, checkpoint: Mapping[str, Any]) -> list[str]:
    """Describe how the pretrained weights of a config differ from those of a finished run that had some."""
    origin, path = recorded_origin(checkpoint), config.MODEL.PRETRAINED
    if not path or origin is None:
        return []
    if not is_same_origin(PRETRAINED, path, origin):
        return [f'it started from {origin_name(origin)}, not from {path}']
    return changed_options(config.MODEL, origin)


def collect(study: Study, output: Path, opts: Sequence[str] = ()) -> dict[str, Any]:
    """The results of all finished runs of a study, whatever their seed.

    Raises:
        StudyError: they are not of one study: other settings, or other data.
    """
    runs = []
    for variant in study.variants:
        seeds = sorted(int(path.name[4:]) for path in (output / variant).glob('seed*') if path.name[4:].isdecimal())
        runs += [finished_run(study, output, variant, seed, opts) for seed in seeds]
    runs = [run for run in runs if run is not None]
    for run in runs:
        if run['data'] != runs[0]['data']:
            first, other = (f'{x["variant"]}, seed {x["seed"]}' for x in (runs[0], run))
            raise StudyError(f'{output}: {first} and {other} have been trained on other data: write another --output')
    labels = {name: variant.label for name, variant in study.variants.items()}
    head = {'study': study.name, 'metric': study.task.metric, 'metric_name': study.metric_name}
    head |= {'reference': study.reference, 'further_references': study.further_references}
    head |= {'labels': labels, 'comparisons': study.comparisons}
    return head | {'runs': runs}


@cache
def _complexity(task: Task, cfg_file: Path, options: tuple[str, ...]) -> Complexity:
    """Count a variant, once; a detector for an image of its evaluation, 4 : 3, with all proposals and detections."""
    config = task.tree.load(cfg_file, options)
    if task.name != 'detection':
        return count_complexity(task, config)
    height = config.INPUT.TEST_SHORT
    proposals, detections = config.MODEL.RPN.POST_NMS_TEST, config.MODEL.BOX.DETECTIONS
    return count_detector(config, height, round(height * 4 / 3), proposals, detections)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)
