"""Compare training from scratch, fine-tuning and frozen features on few images of new classes.

    python -m tools.few_images --data-path <imagenette> --jobs 2
    python -m tools.few_images --results output/few_images/few_images.json

A small network is pretrained on half of the classes of the dataset. The other half are new classes, with only 5 to 200
training images each. Four methods are compared on the new classes:

- scratch: the network is trained from random weights;
- finetune: all weights are trained, starting from the pretrained weights;
- linear: a linear classifier is trained on features of the frozen pretrained network;
- knn: a k-nearest-neighbour classifier uses the same features.

The learning rate, the regularisation of the linear classifier and the number of neighbours are tuned first: each
candidate is trained on an extra subset and scored on a held-out set of 100 training images of each new class. The
validation images are used only for the reported accuracy. To resume, run the same command again. Design and results:
docs/small_data.md.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from data.formats import open_samples
from data.samples import Samples
from engine.experiment import describe_samples
from engine.predictor import load_predictor, network_args
from main import TASK
from tools.features import Features, build_extractor, features_of_split, knn_accuracy, linear_accuracy
from tools.output_files import prepare_output, read_records, write_records
from tools.study.plan import Study, Variant
from tools.study.runs import ROOT, StudyRuns, finished_run, stoppable
from tools.study.statistics import Difference, mean_and_deviation, metric_curve, paired_difference
from utils import UserError, environment, exit_on_user_error, home_path, positive_int, short_revision

PRETRAINING = ROOT / 'configs/msg_nano_p4_win7_112_plain.yaml'
FINETUNING = ROOT / 'configs/finetune_msg_nano_p4_win7_112.yaml'
# Of all networks here, pretrained or not
COMMON = {'AMP_OPT_LEVEL': 'O1', 'DEVICE': 'cpu'}

SPLITS = ('train', 'val')
METHODS = {
    'scratch': 'from scratch',
    'finetune': 'fine-tuned',
    'linear': 'frozen, linear classifier',
    'knn': 'frozen, nearest neighbours',
}
COUNTS = (5, 20, 50, 200)  # training images of each new class
SEEDS = (0, 1, 2)  # of subsets and of runs
TUNING_SEED = 100
HELD_OUT = 100  # training images of each new class on which the settings below are chosen

RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
# Settings to choose from: the peak learning rate at a batch of 16, the inverse regularisation strength C, or the number
# of neighbours
SETTINGS = {
    'scratch': RATES,
    'finetune': RATES,
    'linear': (1e-4, 1e-3, 1e-2, 1e-1, 1, 10),
    'knn': (1, 3, 5, 10, 20),
}
BATCH = 16
EPOCHS, UPDATES = 30, 500  # a run trains for at least this many epochs, and at least this many updates


EPILOG = """examples:
  python -m tools.few_images --data-path imagenette --jobs 2
  python -m tools.few_images --data-path imagenette --counts 30
  python -m tools.few_images --results output/few_images/few_images.json

Half of the dataset's classes are known, the other half are new. Design and results: docs/small_data.md.
"""


class FewImagesError(UserError):
    """The data or results cannot be used."""


class Trial(NamedTuple):
    """One method on one subset of the images.

    Attributes:
        method: a key of `METHODS`.
        count: training images of each new class.
        seed: seed of the subset and of the run. With `TUNING_SEED`, the trial is scored on the held-out images, and
            with other seeds on the validation images.
        setting: one of `SETTINGS[method]`.
    """

    method: str
    count: int
    seed: int
    setting: float | int


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        'python -m tools.few_images',
        description=__doc__.splitlines()[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument('--data-path', type=home_path, metavar='DIR', help='train/ and val/ with class folders')
    source.add_argument('--results', type=home_path, metavar='FILE', help='only print the tables of a few_images.json')
    add('--jobs', type=positive_int, default=1, metavar='N', help='parallel training runs; they share the cores (1)')
    add('--epochs', type=positive_int, default=40, metavar='N', help='epochs of pretraining (40)')
    add(
        '--counts',
        nargs='+',
        type=positive_int,
        default=COUNTS,
        metavar='N',
        help='training images per new class (5 20 50 200)',
    )
    add(
        '--output',
        type=home_path,
        default=Path('output/few_images'),
        metavar='DIR',
        help='folder of the runs and of few_images.json; finished runs are reused (output/few_images)',
    )
    return parser.parse_args()


def link_dataset(folder: Path, parts: Mapping[str, tuple[Samples, Sequence[int]]]) -> Path:
    """Make a dataset of links to images; one that is there already and has the same links is kept.

    Args:
        folder: of the dataset.
        parts: a dataset's split, and indices of images in it, by name of the new split.

    Returns:
        The folder.
    """
    links = {}
    for split, (samples, indices) in parts.items():
        for index in indices:
            path = Path(samples.describe(index)).resolve()
            links[f'{split}/{samples.classes[samples.targets[index]]}/{index:06d}_{path.name}'] = str(path)
    found = {str(link.relative_to(folder)): os.readlink(link) for link in folder.glob('*/*/*')}
    if found != links:
        part = folder.with_name(f'{folder.name}.part')
        shutil.rmtree(part, ignore_errors=True)
        for link, path in links.items():
            (part / link).parent.mkdir(parents=True, exist_ok=True)
            (part / link).symlink_to(path)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    return folder


def open_splits(folder: Path) -> list[Samples]:
    """Open the training and the validation images of a dataset.

    Raises:
        DataError: the dataset cannot be used.
    """
    return [open_samples('imagenet', folder, split) for split in SPLITS]


def describe_splits(splits: Sequence[Samples]) -> dict[str, Any]:
    """Number and hash of the images' names, by split, as checkpoints record them."""
    return {name: describe_samples(samples.sample_names()) for name, samples in zip(SPLITS, splits, strict=True)}


class Experiment:
    """The datasets and runs of the comparison, all in one folder.

    Args:
        data_path: dataset with class folders; its first, third, ... classes are known, and the others are new.
        output: folder.
        epochs: epochs of pretraining.
        jobs: training runs at a time.

    Attributes:
        data: number and hash of the images' names, by split.

    Raises:
        UserError: the dataset cannot be used.
    """

    def __init__(self, data_path: Path, output: Path, epochs: int, jobs: int):
        self.output, self.epochs, self.jobs = output, epochs, jobs
        self.train, self.val = open_splits(data_path)
        if len(self.train.classes) < 4:
            raise FewImagesError(f'{data_path} has {len(self.train.classes)} classes: give a dataset of four or more')
        self.data = describe_splits([self.train, self.val])
        self.studies: list[StudyRuns] = []
        self.lock, self.is_stopped = threading.Lock(), False

    def of_classes(self, samples: Samples, first: int) -> np.ndarray:
        """Indices of a split's images of the known classes (`first` 0), or of the new classes (1)."""
        return np.flatnonzero(samples.targets % 2 == first)

    def known(self) -> Path:
        """Make the dataset of the known classes."""
        splits = {'train': self.train, 'val': self.val}
        return link_dataset(self.output / 'data/known', {x: (y, self.of_classes(y, 0)) for x, y in splits.items()})

    def subset(self, count: int, seed: int) -> Path:
        """Make a dataset with `count` training images of each new class.

        Its evaluation images are the validation images or, with `TUNING_SEED`, the held-out training images.

        Raises:
            FewImagesError: a class has too few images.
        """
        chosen, held_out = [], []
        for number in range(1, len(self.train.classes), 2):
            indices = np.flatnonzero(self.train.targets == number)
            if len(indices) < HELD_OUT + 2 * count:
                raise FewImagesError(
                    f'class {self.train.classes[number]} has {len(indices)} training images, and '
                    f'{HELD_OUT + 2 * count} are needed: write smaller --counts'
                )
            indices = np.random.default_rng(number).permutation(indices)
            held_out += indices[:HELD_OUT].tolist()
            for_tuning, for_report = np.array_split(indices[HELD_OUT:], 2)
            pool = for_tuning if seed == TUNING_SEED else for_report
            chosen += np.random.default_rng([number, seed]).choice(pool, count, replace=False).tolist()
        scored = (self.train, held_out) if seed == TUNING_SEED else (self.val, self.of_classes(self.val, 1))
        folder = self.output / 'data' / f'images_{count}_seed_{seed}'
        return link_dataset(folder, {'train': (self.train, chosen), 'val': scored})

    def run(self, name: str, cfg: Path, data: Path, seed: int, options: dict[str, Any]) -> dict[str, Any] | None:
        """Train a network from where its run stands; its result, or None if all runs were stopped.

        Raises:
            UserError: it failed, or its folder holds another run.
        """
        study = Study(
            name='few_images',
            cfg_file=cfg,
            reference=name,
            seeds=[seed],
            variants={name: Variant(name, options)},
            comparisons=[],
            further_references=[],
            task=TASK,
        )
        done = finished_run(study, self.output, name, seed, data=describe_splits(open_splits(data)))
        if done is not None:
            return done
        runs = StudyRuns(study, data, self.output, [], self.jobs)
        with self.lock:
            if self.is_stopped:
                return None
            self.studies.append(runs)
        return runs.train(name, seed)

    def stop(self) -> None:
        """Let all running runs save and end, and start no more."""
        with self.lock:
            self.is_stopped = True
        for runs in self.studies:
            runs.stop()

    def pretrain(self) -> Path | None:
        """Pretrain a network on the known classes; its last checkpoint, or None if all runs were stopped."""
        classes = len(self.train.classes[::2])
        options = {'MODEL.NUM_CLASSES': classes, 'SAVE_STEPS': 50, **schedule(self.epochs, 4e-3, 64), **COMMON}
        if self.run('pretrained', PRETRAINING, self.known(), 0, options) is None:
            return None
        return self.output / 'pretrained/seed0' / f'ckpt_epoch_{self.epochs - 1}.pth'

    def train_network(self, trial: Trial, data: Path, pretraining: Future[Path | None]) -> dict[str, Any] | None:
        """Train a network on a subset; its result, or None if all runs were stopped.

        Only fine-tuning waits for the end of pretraining.
        """
        classes = len(self.train.classes[1::2])
        batch = min(BATCH, classes * trial.count)
        epochs = max(EPOCHS, -(-UPDATES // (classes * trial.count // batch)))
        options = {'MODEL.NUM_CLASSES': classes, **schedule(epochs, trial.setting, batch), **COMMON}
        if trial.method == 'scratch':
            options['TRAIN.LAYER_DECAY'] = 1
        elif (pretrained := pretraining.result()) is not None:
            options['MODEL.PRETRAINED'] = pretrained.resolve()
        else:
            return None
        name = f'{trial.method}_{trial.count}_lr_{trial.setting}'.replace('.', '_')
        return self.run(name, FINETUNING, data, trial.seed, options)


def schedule(epochs: int, lr: float, batch: int) -> dict[str, Any]:
    """Config keys for a peak learning rate, warm-up in the first tenth of the epochs, and one evaluation at the end."""
    base = lr * 512 / batch  # main.py scales it back
    return {
        'TRAIN.EPOCHS': epochs, 'TRAIN.WARMUP_EPOCHS': epochs // 10, 'EVAL_FREQ': epochs, 'SAVE_FREQ': epochs,
        'TRAIN.BASE_LR': base, 'TRAIN.WARMUP_LR': base / 100, 'TRAIN.MIN_LR': base / 100, 'DATA.BATCH_SIZE': batch,
    }  # fmt: skip


def frozen_features(data: Path, pretrained: Path) -> list[Features]:
    """Features of a subset's training and evaluation images, by the pretrained network."""
    opts = ['DATA.DATA_PATH', str(data), 'DEVICE', 'cpu', 'AMP_OPT_LEVEL', 'O0', 'TEST.CROP', 'False']
    predictor = load_predictor(network_args(pretrained, opts, 'raw'), TASK, log=lambda note: None)
    return [features_of_split(predictor, build_extractor(predictor.model), split) for split in ('train', 'val')]


def choices(method: str, count: int) -> list[float | int]:
    """Settings to choose from: `knn` has at most as many neighbours as there are images of a class."""
    return [setting for setting in SETTINGS[method] if method != 'knn' or setting <= count]


def compare(experiment: Experiment, counts: Sequence[int]) -> dict[str, Any]:
    """Pretrain, choose the settings, and score every method with every number of images and every seed.

    Returns:
        The content of few_images.json, which is written after each result. Trials in it with other numbers of images
        are kept.

    Raises:
        FewImagesError: the file has results on other data, or with other epochs of pretraining.
    """
    path = experiment.output / 'few_images.json'
    head = {'data': experiment.data, 'pretraining_epochs': experiment.epochs}
    before = read_results(path) if path.exists() else {**head, 'trials': []}
    if any(before[key] != value for key, value in head.items()):
        raise FewImagesError(f'{path} has results on other data or with other --epochs: write another --output')
    results = {**head, 'trials': [x for x in before['trials'] if x['count'] not in counts]}
    here = {key: environment(torch.device('cpu'))[key] for key in ('processor', 'revision')}
    subsets = {(n, seed): experiment.subset(n, seed) for n in counts for seed in (TUNING_SEED, *SEEDS)}
    features: dict[tuple[int, int], list[Features]] = {}
    accuracies: dict[Trial, float] = {}

    def add(trial: Trial, accuracy: float, where: Mapping[str, str]) -> None:
        accuracies[trial] = accuracy
        facts = {key: where[key] for key in here}
        results['trials'].append({**trial._asdict(), 'top1': round(accuracy, 3), **facts})
        write_records(path, results, 'trials')
        print(f'{trial.method}, {trial.count} images, seed {trial.seed}, {trial.setting}: {accuracy:.1f} %', flush=True)

    def score_all(trials: Sequence[Trial]) -> None:
        networks = {
            pool.submit(experiment.train_network, trial, subsets[trial.count, trial.seed], pretraining): trial
            for trial in trials
            if trial.method in ('scratch', 'finetune')
        }
        for future in as_completed([pretraining, *networks]):
            run = future.result()
            if future in networks and run is not None:
                add(networks[future], metric_curve(run, 'acc1')[-1], run['environment'])
        for trial in trials:
            if trial.method in ('linear', 'knn'):
                key = trial.count, trial.seed
                if key not in features:
                    features[key] = frozen_features(subsets[key], pretraining.result())
                if trial.method == 'linear':
                    accuracy = linear_accuracy(*features[key], c=trial.setting)
                else:
                    accuracy = knn_accuracy(*features[key], neighbours=trial.setting)
                add(trial, 100 * accuracy, here)

    # In this order, training from scratch fills the cores while the network is pretrained
    pairs = [(method, count) for method in METHODS for count in counts]
    tuning = {x: [Trial(*x, TUNING_SEED, setting) for setting in choices(*x)] for x in pairs}
    with ThreadPoolExecutor(experiment.jobs) as pool:
        try:
            pretraining = pool.submit(experiment.pretrain)
            score_all([trial for trials in tuning.values() for trial in trials])
            best = {x: max(trials, key=accuracies.get).setting for x, trials in tuning.items()}
            score_all([Trial(*x, seed, best[x]) for x in pairs for seed in SEEDS])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            experiment.stop()
    return results


def read_results(path: Path) -> dict[str, Any]:
    """Read a few_images.json.

    Raises:
        FewImagesError: the file is not a few_images.json.
    """
    return read_records(path, tables, 'few_images.json', FewImagesError)


def tables(results: dict[str, Any]) -> str:
    """Write Markdown tables by number of images: accuracies, differences from fine-tuning, and chosen settings."""
    accuracies: dict[int, dict[str, dict[int, float]]] = {}
    chosen: dict[tuple[int, str], float | int] = {}
    candidates: dict[tuple[int, str], list[float | int]] = {}
    for x in results['trials']:
        if x['seed'] == TUNING_SEED:
            candidates.setdefault((x['count'], x['method']), []).append(x['setting'])
        else:
            accuracies.setdefault(x['count'], {}).setdefault(x['method'], {})[x['seed']] = x['top1']
            chosen[x['count'], x['method']] = x['setting']

    def setting(count: int, method: str) -> str:
        value, tried = chosen.get((count, method)), candidates.get((count, method), [])
        return '' if value is None else f'{value:g}' + ' *' * (len(tried) > 1 and value in (min(tried), max(tried)))

    others = [method for method in METHODS if method != 'finetune']
    head = f'| images per class | {" | ".join(METHODS.values())} |', f'|---:|{"---:|" * len(METHODS)}'
    lines = list(head)
    for count, methods in sorted(accuracies.items()):
        cells = [mean_and_deviation(methods.get(method, {}).values()) for method in METHODS]
        lines.append(f'| {count} | {" | ".join(cells)} |')
    lines += ['', f'| images per class | fine-tuned, against {" | against ".join(METHODS[x] for x in others)} |']
    lines.append(f'|---:|{"---:|" * len(others)}')
    for count, methods in sorted(accuracies.items()):
        tuned = methods.get('finetune', {})
        cells = [_difference(paired_difference(tuned, methods.get(method, {}))) for method in others]
        lines.append(f'| {count} | {" | ".join(cells)} |')
    lines += ['', *head]
    lines += [f'| {count} | {" | ".join(setting(count, x) for x in METHODS)} |' for count in sorted(accuracies)]
    processors, revisions = ({x[key] for x in results['trials']} for key in ('processor', 'revision'))
    train, val = (results['data'][split]['images'] for split in SPLITS)
    facts = [
        f'{train:,} training and {val:,} validation images, half of the classes known',
        f'{results["pretraining_epochs"]} epochs of pretraining',
        'first table: top-1 in percent, mean ± standard deviation over the seeds',
        "second: differences with 95 % intervals by Student's t",
        'third: peak learning rate (trained networks), C (linear classifier) or neighbours; * marks the smallest or '
        'largest value tried',
        f'processor {" and ".join(sorted(processors))}',
        f'revision {", ".join(sorted(map(short_revision, revisions)))}',
    ]
    return '\n'.join([*lines, '', f'{"; ".join(facts)}.'])


def _difference(difference: Difference | None) -> str:
    if difference is None:
        return ''
    interval = ' ({:+.1f} to {:+.1f})'.format(*difference.student) if difference.student else ''
    return f'{difference.mean:+.1f}{interval}'


def main() -> None:
    """Read the command line; train and score, or print results."""
    args = parse_args()
    with exit_on_user_error():
        if args.results:
            print(tables(read_results(args.results)))
            return
        prepare_output(args.output / 'few_images.json')
        experiment = Experiment(args.data_path, args.output, args.epochs, args.jobs)
        with stoppable():
            results = compare(experiment, list(dict.fromkeys(args.counts)))
        print(f'\n{tables(results)}')


if __name__ == '__main__':
    main()
