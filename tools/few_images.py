"""Compare training from scratch, fine-tuning and frozen features on few images of new classes.

    python -m tools.few_images --data-path <imagenette> --jobs 2
    python -m tools.few_images --results docs/few_images.json

A small network is pretrained on half of the dataset's classes. The other classes are new, and are learned from only 5
to 200 training images each, in one of these ways:

- scratch: the network is trained from random weights;
- finetune: all weights are trained, starting from the pretrained weights;
- linear: a linear classifier is trained on features of the frozen pretrained network;
- knn: a k-nearest-neighbour classifier uses the same features.

The learning rate and the number of neighbours are chosen on 100 held-out training images of each new class, with an
extra subset whose accuracy is not reported. The validation images only give the reported accuracy. Every result is
written to `<output>/few_images.json` at once: run the same command again to resume. Design and results:
docs/small_data.md.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np
import torch

from engine.predictor import load_predictor
from main import TASK
from text_files import read_json
from tools.features import build_extractor, features_of_split, knn_accuracy, linear_accuracy
from tools.output_files import prepare_output, write_text
from tools.plot import read_run
from tools.study.statistics import Difference, paired_difference
from utils import UserError, environment, exit_on_user_error, home_path, positive_int

ROOT = Path(__file__).parent.parent
PRETRAINING = ROOT / 'configs/msg_nano_p4_win7_112_plain.yaml'
FINETUNING = ROOT / 'configs/finetune_msg_nano_p4_win7_112.yaml'

WAYS = {
    'scratch': 'from scratch',
    'finetune': 'fine-tuned',
    'linear': 'frozen, linear classifier',
    'knn': 'frozen, nearest neighbours',
}
COUNTS = (5, 20, 50, 200)  # training images of each new class
SEEDS = (0, 1, 2)  # of subsets and of runs
TUNING_SEED = 100
HELD_OUT = 100  # training images of each new class on which the settings below are chosen

# Settings to choose from: the peak learning rate at a batch of 16, or the number of neighbours
SETTINGS = {
    'scratch': (2.5e-4, 5e-4, 1e-3, 2e-3),
    'finetune': (2.5e-4, 5e-4, 1e-3, 2e-3),
    'linear': (None,),
    'knn': (1, 3, 5, 10, 20),
}
BATCH = 16
EPOCHS, UPDATES = 30, 500  # a run trains for at least this many epochs, and at least this many updates


class FewImagesError(UserError):
    """A run failed, or the data or results cannot be used."""


class Trial(NamedTuple):
    """One way to use the images of one subset.

    Attributes:
        way: a key of `WAYS`.
        count: training images of each new class.
        seed: seed of the subset and of the run. With `TUNING_SEED`, the trial is scored on the held-out images, and
            with other seeds on the validation images.
        setting: one of `SETTINGS[way]`.
    """

    way: str
    count: int
    seed: int
    setting: float | int | None


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser('python -m tools.few_images', description=__doc__.splitlines()[0])
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument('--data-path', type=home_path, metavar='DIR', help='dataset with train/ and val/')
    source.add_argument('--results', type=home_path, metavar='FILE', help='only print the table of a few_images.json')
    add('--jobs', type=positive_int, default=1, metavar='N', help='trials at a time; a training run has one thread (1)')
    add('--epochs', type=positive_int, default=40, metavar='N', help='epochs of pretraining (40)')
    add('--counts', nargs='+', type=positive_int, default=COUNTS, metavar='N', help='images per class (5 20 50 200)')
    add(
        '--output',
        type=home_path,
        default=Path('output/few_images'),
        metavar='DIR',
        help='folder of the runs and of few_images.json (output/few_images)',
    )
    return parser.parse_args()


def make_subset(data_path: Path, folder: Path, count: int, seed: int) -> Path:
    """Make a dataset with `count` training images of each new class, as symbolic links.

    Its evaluation images are the validation images or, with `TUNING_SEED`, the held-out training images.

    Returns:
        The folder of the dataset.

    Raises:
        FewImagesError: a class has too few images.
    """
    subset = folder / f'images_{count}_seed_{seed}'
    shutil.rmtree(subset, ignore_errors=True)
    for number, name in enumerate(classes_of(data_path)[1]):
        files = sorted((data_path / 'train' / name).iterdir())
        if len(files) < HELD_OUT + 2 * count:
            raise FewImagesError(
                f'{data_path}/train/{name} has {len(files)} images, and {HELD_OUT + 2 * count} are needed: '
                f'write smaller --counts'
            )
        files = np.random.default_rng(number).permutation(files)
        held_out, others = files[:HELD_OUT], files[HELD_OUT:]
        for_tuning, for_report = others[: len(others) // 2], others[len(others) // 2 :]
        pool = for_tuning if seed == TUNING_SEED else for_report
        chosen = np.random.default_rng([number, seed]).choice(pool, count, replace=False)
        scored = held_out if seed == TUNING_SEED else sorted((data_path / 'val' / name).iterdir())
        for split, images in (('train', chosen), ('val', scored)):
            link_images(subset / split / name, images)
    return subset


def link_images(folder: Path, images: Sequence[Path]) -> None:
    """Fill a new folder with links to images."""
    folder.mkdir(parents=True)
    for image in images:
        (folder / image.name).symlink_to(image.resolve())


def classes_of(data_path: Path) -> tuple[list[str], list[str]]:
    """Split the class names, sorted, into known classes (the first, third, ...) and new classes (the second, ...).

    Raises:
        FewImagesError: there are fewer than four classes.
    """
    names = sorted(path.name for path in (data_path / 'train').glob('*') if path.is_dir())
    if len(names) < 4:
        raise FewImagesError(f'{data_path}/train has {len(names)} class folders: give a dataset of four or more')
    return names[::2], names[1::2]


def train(cfg: Path, data_path: Path, output: Path, options: dict[str, Any]) -> Path:
    """Train a network with main.py, unless its last checkpoint exists, and return the folder of the run.

    Raises:
        FewImagesError: the run failed.
    """
    folder = output / options['MODEL.NAME'] / options['TAG']
    command = [sys.executable, 'main.py', '--cfg', str(cfg), '--data-path', str(data_path.resolve())]
    command += ['--output', str(output.resolve()), '--opts']
    command += [str(text) for item in options.items() for text in item]
    if not (folder / f'ckpt_epoch_{options["TRAIN.EPOCHS"] - 1}.pth').exists():
        variables = os.environ | {'OMP_NUM_THREADS': '1'}
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, errors='replace')
        if done.returncode:
            raise FewImagesError(f'{folder.name} failed: {(done.stderr.strip().splitlines() or ["no message"])[-1]}')
    return folder


def pretrain(data_path: Path, output: Path, epochs: int) -> Path:
    """Pretrain a network on the known classes, and return the path of its last checkpoint."""
    known, _ = classes_of(data_path)
    if not (output / 'known').exists():
        for split in ('train', 'val'):
            for name in known:
                link_images(output / 'known' / split / name, sorted((data_path / split / name).iterdir()))
    options = {
        'MODEL.NAME': 'pretrained', 'TAG': 'seed0', 'SEED': 0, 'MODEL.NUM_CLASSES': len(known), 'AMP_OPT_LEVEL': 'O1',
        **schedule(epochs, 1e-3, 64), 'SAVE_STEPS': 50,
    }  # fmt: skip
    return train(PRETRAINING, output / 'known', output, options) / f'ckpt_epoch_{epochs - 1}.pth'


def schedule(epochs: int, lr: float, batch: int) -> dict[str, Any]:
    """Config keys for a peak learning rate, warm-up in the first tenth of the epochs, and one evaluation at the end."""
    base = lr * 512 / batch  # main.py scales it back
    return {
        'TRAIN.EPOCHS': epochs, 'TRAIN.WARMUP_EPOCHS': epochs // 10, 'EVAL_FREQ': epochs, 'SAVE_FREQ': epochs,
        'TRAIN.BASE_LR': base, 'TRAIN.WARMUP_LR': base / 100, 'TRAIN.MIN_LR': base / 100, 'DATA.BATCH_SIZE': batch,
    }  # fmt: skip


def score(trial: Trial, subset: Path, pretrained: Path, output: Path) -> float:
    """Top-1 accuracy of a trial in percent, on the evaluation images of its subset."""
    if trial.way in ('linear', 'knn'):
        flags = Namespace(resume=str(pretrained), cfg=None, stored=(), pretrained_weights='raw')
        flags.opts = ['DATA.DATA_PATH', str(subset), 'DEVICE', 'cpu', 'AMP_OPT_LEVEL', 'O0', 'TEST.CROP', 'False']
        predictor = load_predictor(flags, TASK, log=lambda note: None)
        parts = [features_of_split(predictor, build_extractor(predictor.model), split) for split in ('train', 'val')]
        return 100 * (linear_accuracy(*parts) if trial.way == 'linear' else knn_accuracy(*parts, trial.setting))
    classes = len(list((subset / 'train').iterdir()))
    batch = min(BATCH, classes * trial.count)
    epochs = max(EPOCHS, -(-UPDATES // (classes * trial.count // batch)))
    options = {
        'MODEL.NAME': f'{trial.way}_{trial.count}', 'TAG': f'seed{trial.seed}_{trial.setting}', 'SEED': trial.seed,
        'MODEL.NUM_CLASSES': classes, 'AMP_OPT_LEVEL': 'O1', 'DATA.EXIF': False,
        **schedule(epochs, trial.setting, batch),
    }  # fmt: skip
    options |= {'MODEL.PRETRAINED': pretrained} if trial.way == 'finetune' else {'TRAIN.LAYER_DECAY': 1}
    folder = train(FINETUNING, subset, output, options)
    return read_run(folder, folder.name).epochs[-1]['acc1']


class Results:
    """Results of trials, stored in a few_images.json that is written after every trial.

    Args:
        path: path of the file; the results in an existing file are kept.
    """

    def __init__(self, path: Path):
        self.path = path
        self.content = read_results(path) if path.exists() else {'trials': []}

    def find(self, trial: Trial) -> float | None:
        """Accuracy of a trial, if it is known."""
        return next((x['top1'] for x in self.content['trials'] if _trial(x) == trial), None)

    def best_setting(self, way: str, count: int) -> float | int | None:
        """The setting with the best accuracy on the held-out images; the first of several that are equally good."""
        trials = [Trial(way, count, TUNING_SEED, setting) for setting in SETTINGS[way] if fits(way, count, setting)]
        return max(trials, key=self.find).setting

    def add(self, trial: Trial, accuracy: float) -> None:
        """Add a result and write the file."""
        self.content['environment'] = environment(torch.device('cpu'))
        self.content['trials'].append({**trial._asdict(), 'top1': round(accuracy, 3)})
        self.content['trials'].sort(
            key=lambda x: (list(WAYS).index(x['way']), x['count'], x['seed'], x['setting'] or 0)
        )
        trials = ',\n  '.join(map(json.dumps, self.content['trials']))
        head = json.dumps(self.content['environment'])
        write_text(self.path, ['{\n "environment": ', head, ',\n "trials": [\n  ', trials, '\n ]\n}\n'])
        print(f'{trial.way}, {trial.count} images, seed {trial.seed}, {trial.setting}: {accuracy:.1f} %', flush=True)


def _trial(entry: dict[str, Any]) -> Trial:
    return Trial(*(entry[name] for name in Trial._fields))


def fits(way: str, count: int, setting: float | int | None) -> bool:
    """Whether a setting can be used: `knn` has at most as many neighbours as there are images of a class."""
    return way != 'knn' or setting <= count


def read_results(path: Path) -> dict[str, Any]:
    """Read a `few_images.json`.

    Raises:
        FewImagesError: the file is not a `few_images.json`.
    """
    results = read_json(path, str(path), FewImagesError, 'give the few_images.json of this tool')
    try:
        table(results)
    except (KeyError, TypeError) as error:
        raise FewImagesError(f'{path} holds no results of tools.few_images') from error
    return results


def table(results: dict[str, Any]) -> str:
    """Write Markdown tables: the accuracy of each way, and its difference from fine-tuning, by number of images."""
    accuracies: dict[int, dict[str, dict[int, float]]] = {}
    for trial, top1 in ((_trial(x), x['top1']) for x in results['trials']):
        if trial.seed != TUNING_SEED:
            accuracies.setdefault(trial.count, {}).setdefault(trial.way, {})[trial.seed] = top1
    others = [way for way in WAYS if way != 'finetune']
    lines = [f'| images per class | {" | ".join(WAYS.values())} |', f'|---:|{"---:|" * len(WAYS)}']
    for count, ways in sorted(accuracies.items()):
        lines.append(f'| {count} | {" | ".join(_mean_and_spread([*ways.get(way, {}).values()]) for way in WAYS)} |')
    lines += ['', f'| images per class | fine-tuned, against {" | against ".join(WAYS[way] for way in others)} |']
    lines.append(f'|---:|{"---:|" * len(others)}')
    for count, ways in sorted(accuracies.items()):
        tuned = ways.get('finetune', {})
        cells = [_difference(paired_difference(tuned, ways.get(way, {}))) for way in others]
        lines.append(f'| {count} | {" | ".join(cells)} |')
    if 'environment' in results:
        known = results['environment']
        facts = [
            "Top-1 in percent, mean ± standard deviation over the seeds; differences with 95 % intervals by Student's t"
        ]
        facts += [f'processor {known["processor"]}', f'torch {known["torch"]}', f'revision {known["revision"][:7]}']
        lines += ['', '; '.join(facts) + '.']
    return '\n'.join(lines)


def _mean_and_spread(values: Sequence[float]) -> str:
    if not values:
        return ''
    return f'{mean(values):.1f}' + (f' ± {stdev(values):.1f}' if len(values) > 1 else '')


def _difference(difference: Difference | None) -> str:
    if difference is None:
        return ''
    return f'{difference.mean:+.1f}' + (
        ' ({:+.1f} to {:+.1f})'.format(*difference.student) if difference.student else ''
    )


def run_all(args: argparse.Namespace) -> None:
    """Pretrain, choose the settings, and score every way with every number of images and every seed."""
    data, output = args.data_path, args.output
    prepare_output(output / 'few_images.json')
    results, pretrained = Results(output / 'few_images.json'), pretrain(data, output, args.epochs)

    def do(trial: Trial) -> tuple[Trial, float]:
        return trial, score(trial, subsets[trial.count, trial.seed], pretrained, output)

    def do_all(trials: Sequence[Trial]) -> None:
        with ThreadPoolExecutor(args.jobs) as pool:
            futures = [pool.submit(do, trial) for trial in trials if results.find(trial) is None]
            try:
                for future in as_completed(futures):
                    results.add(*future.result())
            finally:
                for future in futures:
                    future.cancel()

    subsets = {(n, seed): make_subset(data, output, n, seed) for n in args.counts for seed in (TUNING_SEED, *SEEDS)}
    pairs = [(way, count) for count in args.counts for way in WAYS]
    do_all([Trial(*x, TUNING_SEED, setting) for x in pairs for setting in SETTINGS[x[0]] if fits(*x, setting)])
    do_all([Trial(*x, seed, results.best_setting(*x)) for x in pairs for seed in SEEDS])
    print(f'\n{table(results.content)}')


def main() -> None:
    """Read the command line; train and score, or print results."""
    args = parse_args()
    with exit_on_user_error():
        if args.results:
            print(table(read_results(args.results)))
        else:
            run_all(args)


if __name__ == '__main__':
    main()
