"""Compute features of images with a trained network; measure them by k-nearest neighbours and a linear classifier.

    python -m tools.features --resume <checkpoint> <images> --output features.npz
    python -m tools.features --resume <checkpoint> --data-path <dataset> --knn 20 --linear-probe

See docs/evaluation.md.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from tqdm import tqdm

from data.build import build_loader, open_for_evaluation
from data.dataset import IGNORED
from data.file_loader import evaluation_loader, exit_if_unreadable
from data.images import choose_images, find_images, report_other_files
from data.preprocess import Preprocess
from engine.predictor import Predictor, load_predictor, prediction_parser
from main import TASK
from models.registry import stored_weights
from tools.output_files import prepare_output, refuse_overwriting
from utils import (
    OutputError,
    UserError,
    atomic_write,
    exit_on_user_error,
    home_path,
    positive_int,
)

SPLITS = ('train', 'val')
TEMPERATURE = 0.07  # of the neighbours' votes, as in DINO (arXiv:2104.14294) and InstDisc (arXiv:1805.01978)
MAX_ITERATIONS = 1000  # of the linear probe
EPILOG = """
examples:
  python -m tools.features --resume ckpt_best.pth photos --output features.npz
  python -m tools.features --resume ckpt_best.pth --data-path data --knn 20 --linear-probe
  python -m tools.features --resume ckpt_best.pth --data-path data --stage 3 --tokens msg --knn 20
"""


class Features(NamedTuple):
    """Features of images.

    Attributes:
        names: of the images: paths, or names in a dataset.
        classes: their names; of image files, names of their folders.
        features: (images, channels), float32.
    """

    names: list[str]
    classes: list[str]
    features: np.ndarray


def build_extractor(network: nn.Module, stage: int | None = None, tokens: str | None = None) -> Callable:
    """A function from images (B, C, height, width) to features (B, channels).

    Args:
        network: an MSG-Transformer or a network of timm.
        stage: from 1: mean over the tokens of this stage's output, before patch merging; after the final norm in the
            last one, and in networks of timm that can apply it anywhere. None is the classifier's input or, with
            `tokens`, the last stage.
        tokens: `patches` or `msg`; None is `patches`.

    Raises:
        UserError: the network has no such stage or tokens.
    """
    if stage is None and tokens is None:
        return lambda images: network.forward_head(network.forward_features(images), pre_logits=True)
    if not hasattr(network, 'forward_intermediates'):
        raise UserError(f'{type(network).__name__} has no forward_intermediates: leave out --stage and --tokens')
    count = len(network.feature_info)
    stage = stage or count
    if stage > count:
        raise UserError(f'--stage is {stage}: the network has {count} stages: write at most {count}')
    if tokens == 'msg':
        if not getattr(network, 'head_reads_msg', False):
            raise UserError('--tokens is msg, but MSG tokens are not the classifier input: write --tokens patches')

        def msg_tokens(images: Tensor) -> Tensor:
            features, _ = network.forward_intermediates(images, indices=[stage - 1], stop_early=True)
            return features.mean(dim=(1, 2))  # of (B, nH, nW, C)

        return msg_tokens

    def patches(images: Tensor) -> Tensor:
        (feature_map,) = network.forward_intermediates(
            images, indices=[stage - 1], norm=True, stop_early=True, intermediates_only=True
        )
        return feature_map.mean(dim=(2, 3))  # of (B, C, H, W)

    return patches


@torch.inference_mode()
def _compute(predictor: Predictor, extract: Callable, batches: Iterator[Tensor]) -> np.ndarray:
    """Features of batches of images, prepared as for evaluation.

    Raises:
        UserError: they are not finite, or not one vector for an image.
    """
    preprocess = Preprocess(predictor.config, predictor.device)
    computed = [np.zeros((0, 0), dtype=np.float32)]
    for images in batches:
        features = extract(preprocess.prepare(images)).float().cpu()
        if features.ndim != 2 or not features.isfinite().all():
            problem = f'have the shape {tuple(features.shape)}' if features.ndim != 2 else 'are not finite'
            raise UserError(f'the features of the network {problem}: give another checkpoint, or another --stage')
        computed.append(features.numpy())
    return np.concatenate(computed[1:] or computed)


def features_of_files(
    predictor: Predictor, extract: Callable, paths: Sequence[Path], batch_size: int = 64, workers: int = 0
) -> tuple[Features, int]:
    """Features of image files; those that cannot be read are left out, and named on stderr.

    Returns:
        The features, and the number of files that cannot be read.
    """
    images, kept = evaluation_loader(predictor.config, paths, batch_size, workers), []

    def batches() -> Iterator[Tensor]:
        for batch in images:
            kept.extend(paths[index] for index in batch.indices)
            if batch.images is not None:
                yield batch.images

    features = _compute(predictor, extract, batches())
    return Features(list(map(str, kept)), [path.absolute().parent.name for path in kept], features), images.unreadable


def features_of_split(
    predictor: Predictor,
    extract: Callable,
    split: str,
    batch_size: int = 64,
    workers: int = 0,
    limit: int | None = None,
    needs_one_class: bool = False,
) -> Features:
    """Features of a split of `DATA.DATA_PATH`, prepared as for evaluation.

    Args:
        predictor: the network, in whose config the data are named.
        extract: see `build_extractor`.
        split: `train` or `val`.
        batch_size: images at a time.
        workers: DataLoader workers.
        limit: use only so many images, a random but fixed choice.
        needs_one_class: refuse images of several classes.

    Raises:
        UserError: the data cannot be used.
    """
    dataset, targets, kept = open_for_evaluation(predictor.config, split), [], []
    if dataset.multi_label and needs_one_class:
        raise UserError(f'--knn and --linear-probe need one class per image, and {dataset.samples.where} has several')
    indices = choose_images(range(len(dataset)), limit)
    loader = build_loader(predictor.config, dataset, indices, batch_size, workers=workers)

    def batches() -> Iterator[Tensor]:
        position = 0
        for batch in tqdm(loader, desc=split, unit=' batches', leave=False, disable=None):
            known = (
                batch.target.reshape(len(batch.target), -1)[:, 0] != IGNORED
            )  # with DATA.ON_ERROR skip, bad images are left out
            kept.extend(indices[position + i] for i in known.nonzero().flatten().tolist())
            targets.extend(batch.target[known].tolist())
            position += len(known)
            yield batch.image[known]

    features = _compute(predictor, extract, batches())
    names = dataset.samples.names
    shown = [f'{split}/{index if names is None else names[index]}' for index in kept]
    return Features(shown, [_class_text(dataset.classes, target) for target in targets], features)


def _class_text(classes: Sequence[str], target: int | list[float]) -> str:
    """The class of an image, or its classes with | between them."""
    if isinstance(target, int):
        return classes[target]
    return '|'.join(name for name, is_shown in zip(classes, target, strict=True) if is_shown)


def knn_accuracy(train: Features, val: Features, neighbours: int) -> float:
    """Top-1 accuracy, as a fraction, of weighted k-NN with cosine similarity and vote weights exp(similarity / 0.07).

    Raises:
        UserError: there are fewer training images.
    """
    if len(train.classes) < neighbours:
        raise UserError(f'--knn is {neighbours}, but train/ has {len(train.classes)} images: write at most as many')
    # Distances are 1 - cosine; the constant factor is the same for all votes.
    classifier = KNeighborsClassifier(neighbours, metric='cosine', weights=lambda d: np.exp(-d / TEMPERATURE))
    return float(classifier.fit(train.features, train.classes).score(val.features, val.classes))


def linear_accuracy(train: Features, val: Features, c: float = 1) -> float:
    """Top-1 accuracy, as a fraction, of logistic regression on standardised features.

    Args:
        train: features to fit.
        val: features to score.
        c: inverse strength of the L2 regularisation, scikit-learn's `C`.

    Raises:
        UserError: there are fewer than two classes.
    """
    if len(set(train.classes)) < 2:
        raise UserError('--linear-probe needs images of two classes or more in train/')
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=MAX_ITERATIONS))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', ConvergenceWarning)
        probe.fit(train.features, train.classes)
    if probe[-1].n_iter_.max() == MAX_ITERATIONS:
        print(f'the linear probe has not converged after {MAX_ITERATIONS} iterations', file=sys.stderr)
    return float(probe.score(val.features, val.classes))


def check_output(path: Path) -> None:
    """Find out before the work whether the features can be written.

    Raises:
        OutputError: they cannot.
    """
    if path.suffix not in ('.npz', '.parquet'):
        raise OutputError(f'{path} has no suffix of features: write .npz or .parquet')
    if path.suffix == '.parquet' and importlib.util.find_spec('pyarrow') is None:
        raise OutputError(f'{path} needs pyarrow: pip install pyarrow, or write .npz')
    prepare_output(path)


def write_features(path: Path, features: Features) -> None:
    """Write features as NumPy's .npz or as .parquet, with the columns or arrays `name`, `class` and `features`.

    Raises:
        OutputError: they cannot be written.
    """
    names, classes, values = features
    try:
        if path.suffix == '.npz':
            arrays = {'name': np.array(names, dtype=str), 'class': np.array(classes, dtype=str), 'features': values}
            atomic_write(path, lambda file: np.savez(file, **arrays))
            return
        import pyarrow
        import pyarrow.parquet

        columns = {
            # Parquet has Unicode only, and names of files need not be
            'name': [name.encode(errors='backslashreplace').decode() for name in names],
            'class': [name.encode(errors='backslashreplace').decode() for name in classes],
            'features': pyarrow.FixedSizeListArray.from_arrays(values.ravel(), values.shape[1]),
        }
        atomic_write(path, lambda file: pyarrow.parquet.write_table(pyarrow.table(columns), file))
    except OSError as error:
        raise OutputError(f'{path}: {error.strerror}: write to another folder, or make room') from error


def parse_option() -> argparse.Namespace:
    """Read the command line."""
    parser = prediction_parser(
        'python -m tools.features', __doc__.splitlines()[0], EPILOG, stored_weights(), needs_images=False
    )
    add = parser.add_argument
    add('--data-path', type=home_path, metavar='DIR', help='in place of images: a dataset with train/ and val/')
    add('--output', type=home_path, metavar='FILE', help='features to write, .npz or .parquet')
    add('--stage', type=positive_int, metavar='N', help="stage, from 1 (default: the classifier's input)")
    add('--tokens', choices=('patches', 'msg'), help='tokens to average: patches or msg (default: patches)')
    add('--knn', type=positive_int, metavar='K', help='print the accuracy of K nearest neighbours, such as 20')
    add('--linear-probe', action='store_true', help='print the accuracy of logistic regression')
    add('--batch-size', type=positive_int, default=64, metavar='N', help='batch size (64)')
    args = parser.parse_intermixed_args()
    if bool(args.images) == bool(args.data_path):
        parser.error('give either images, or --data-path and a dataset')
    if (args.knn or args.linear_probe) and not args.data_path:
        parser.error('--knn and --linear-probe need --data-path and a dataset with train/ and val/')
    if not (args.output or args.knn or args.linear_probe):
        parser.error('nothing to do: give --output, --knn or --linear-probe')
    return args


def run(args: argparse.Namespace) -> tuple[int, int]:
    """Compute features, write them, and print their k-NN and linear-probe accuracy.

    Returns:
        Numbers of image files that cannot be read, and of all.

    Raises:
        UserError: something cannot be used or written.
    """
    if args.output:
        check_output(args.output)
    if args.data_path:
        args.opts = [*(args.opts or ()), 'DATA.DATA_PATH', str(args.data_path)]
    predictor = load_predictor(args, TASK)
    extract = build_extractor(predictor.model, args.stage, args.tokens)
    unreadable = files = 0
    if args.data_path:
        sizes = args.batch_size, args.workers, args.limit, bool(args.knn or args.linear_probe)
        splits = [features_of_split(predictor, extract, split, *sizes) for split in SPLITS]
        names, classes = ([x for part in splits for x in part[i]] for i in (0, 1))
        features = Features(names, classes, np.concatenate([part.features for part in splits]))
    else:
        paths = choose_images(find_images(args.images), args.limit)
        refuse_overwriting([args.output], args.resume, paths)
        report_other_files(args.images)
        features, unreadable = features_of_files(predictor, extract, paths, args.batch_size, args.workers)
        files = len(paths)
    if args.output and len(features.names):
        write_features(args.output, features)
        print(f'{args.output}: {" x ".join(map(str, features.features.shape))} features', file=sys.stderr)
    if args.knn:
        accuracy = knn_accuracy(*splits, args.knn)
        print(f'{args.knn} nearest neighbours: {100 * accuracy:.2f}% of {len(splits[1].names)} images of val')
    if args.linear_probe:
        accuracy = linear_accuracy(*splits)
        print(f'linear probe: {100 * accuracy:.2f}% of {len(splits[1].names)} images of val')
    return unreadable, files


def main() -> None:
    """Compute; the exit code says whether all images could be read."""
    args = parse_option()
    with exit_on_user_error():
        unreadable, files = run(args)
    exit_if_unreadable(unreadable, files)


if __name__ == '__main__':
    main()
