"""Choose a threshold for flagging images that show none of a classifier's classes, and measure its error rates.

    python -m tools.unknown_threshold --weights <name> --known <dataset>/val --unknown <images of other classes>

Three scores of the logits are compared: 1 - maximum softmax, the entropy of the softmax, and the energy. Both sets of
images are split into halves at random, but always in the same way. The first halves choose: the score with the highest
AUROC, and the threshold that keeps --keep percent of the known images. The second halves give the error rates.
--output writes a copy of the weights whose config has the score and the threshold, as tools.predict and tools.app read
them.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from data.file_loader import evaluation_loader, exit_if_unreadable
from data.images import DataError, find_images
from data.preprocess import Preprocess
from engine.checkpoint import CheckpointError, load_checkpoint, save_safetensors
from engine.predictor import Predictor, add_network_flags, load_predictor
from engine.weights import choose_weights
from main import TASK
from models.registry import stored_weights
from tools.output_files import prepare_output, refuse_overwriting
from tools.unknown import SCORES
from utils import UserError, available_cores, exit_on_user_error, home_path, non_negative_int, printable

EXAMPLES = """example:
  python -m tools.unknown_threshold --weights msg_transformer_nano --known <imagenette>/val --unknown <other images>
"""


@torch.inference_mode()
def compute_scores(predictor: Predictor, paths: Sequence[Path], workers: int) -> tuple[dict[str, np.ndarray], int]:
    """Compute the scores of images.

    Returns:
        Each score of the images that can be read, by name, and the number of images that cannot be read.

    Raises:
        CheckpointError: the outputs of the network are not finite.
    """
    images = evaluation_loader(predictor.config, paths, workers=workers)
    preprocess = Preprocess(predictor.config, predictor.device)
    batches, unreadable = [torch.empty(0, predictor.config.MODEL.NUM_CLASSES)], 0
    for batch in images:
        if batch.images is not None:
            batches.append(predictor.model(preprocess.prepare(batch.images)).float().cpu())
        unreadable += len(batch.errors)
    logits = torch.cat(batches)
    if not logits.isfinite().all():
        raise CheckpointError('the outputs of the network are not finite: its weights are broken, give others')
    return {name: score(logits).numpy() for name, score in SCORES.items()}, unreadable


def split_halves(scores: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two halves of scores, at random but always the same for as many scores.

    Raises:
        DataError: there are fewer than four.
    """
    _check_number(len(scores), 'readable images')
    order = np.random.default_rng(seed).permutation(len(scores))
    return scores[order[: len(scores) // 2]], scores[order[len(scores) // 2 :]]


def _check_number(count: int, kind: str) -> None:
    if count < 4:
        raise DataError(f'{count} {kind} are too few for two halves: give at least 4 of each kind')


def auroc(known: np.ndarray, unknown: np.ndarray) -> float:
    """The probability that an unknown image has a higher score than a known one; 0.5 is chance."""
    labels = np.repeat([0, 1], [len(known), len(unknown)])
    return float(roc_auc_score(labels, np.concatenate([known, unknown])))


def without_known_classes(paths: Sequence[Path], class_names: Sequence[str]) -> list[Path]:
    """The images whose folder is not named as a known class, and whose file name is not, up to an underscore."""
    starts = tuple(f'{name}_' for name in class_names)
    return [path for path in paths if path.parent.name not in class_names and not f'{path.stem}_'.startswith(starts)]


def choose_threshold(
    known: dict[str, np.ndarray], unknown: dict[str, np.ndarray], keep: float, chosen: str = ''
) -> tuple[str, float]:
    """Choose a score and its threshold on the first halves; print what the second halves say.

    Args:
        known: scores of images of known classes, by name.
        unknown: scores of other images.
        keep: percentage of the known images below the threshold.
        chosen: the score; '' takes the one with the highest AUROC.

    Returns:
        The score's name and the threshold.
    """
    halves = {name: (split_halves(known[name]), split_halves(unknown[name])) for name in SCORES}
    if not chosen:
        chosen = max(SCORES, key=lambda name: auroc(halves[name][0][0], halves[name][1][0]))
    print('| score | AUROC, choosing | AUROC, reporting | threshold | known flagged | unknown flagged |')
    print('|---|---:|---:|---:|---:|---:|')
    for name, (ours, theirs) in halves.items():
        threshold = float(f'{np.quantile(ours[0], keep / 100):.4g}')
        cells = [f'{auroc(ours[i], theirs[i]):.3f}' for i in (0, 1)]
        cells += [f'{threshold:g}', *(f'{(scores[1] > threshold).mean():.1%}' for scores in (ours, theirs))]
        print('|', ' | '.join([f'**{name}**' if name == chosen else name, *cells]), '|')
        if name == chosen:
            result = threshold
    (a, b), (c, d) = halves[chosen]
    print(f'\n{len(a)} known and {len(c)} unknown images to choose, {len(b)} and {len(d)} to report')
    print(f'TEST.UNKNOWN_SCORE {chosen} TEST.UNKNOWN_THRESHOLD {result:g}')
    return chosen, result


def save_threshold(source: str, target: Path, choice: str, score: str, threshold: float) -> None:
    """Write a copy of weights whose config has a score and a threshold.

    Raises:
        CheckpointError: the target cannot be written.
    """
    checkpoint = load_checkpoint(source)
    config = dict(checkpoint['config'])
    config['TEST'] = dict(config.get('TEST') or {}) | {'UNKNOWN_SCORE': score, 'UNKNOWN_THRESHOLD': threshold}
    names = {'classes': checkpoint['classes']} if 'classes' in checkpoint else {}
    save_safetensors(target, choose_weights(checkpoint, source, choice)[0], config=config, **names)


def _percentage(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 100:
        raise argparse.ArgumentTypeError(f'{text} is no percentage: write a number between 0 and 100, such as 90')
    return value


def parse_option() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        'python -m tools.unknown_threshold',
        description=__doc__.splitlines()[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_network_flags(parser, stored_weights())
    add, workers = parser.add_argument, min(available_cores(), 4)
    images = {'nargs': '+', 'type': home_path, 'required': True, 'metavar': 'IMAGES'}
    add('--known', **images, help='held-out images of the classes: files or folders')
    add('--unknown', **images, help='images of other classes: files or folders')
    add('--keep', type=_percentage, default=90.0, metavar='P', help='percentage of known images not to flag (90)')
    add('--score', choices=tuple(SCORES), default='', help='the score (default: the one with the highest AUROC)')
    add('--output', type=home_path, metavar='FILE', help='copy of the weights to write, .safetensors')
    add('--workers', type=non_negative_int, default=workers, metavar='N', help=f'DataLoader workers ({workers})')
    return parser.parse_args()


def run(args: argparse.Namespace) -> tuple[int, int]:
    """Choose, print and write.

    Returns:
        How many of how many images could not be read.

    Raises:
        UserError: something cannot be used or written.
    """
    if args.output:
        if args.output.suffix != '.safetensors':
            raise UserError(f'--output {args.output}: write a name that ends with .safetensors')
        prepare_output(args.output)
        if args.cfg or args.opts:
            raise UserError('--output keeps the config of the weights: leave out --cfg and --opts')
    predictor = load_predictor(args, TASK)
    if predictor.config.DATA.MULTI_LABEL or len(predictor.class_names) < 2:
        raise CheckpointError(f'{args.resume} is not a classifier of two or more classes, one per image: give another')
    known, unknown = find_images(args.known), find_images(args.unknown)
    others = without_known_classes(unknown, predictor.class_names)
    if len(others) < len(unknown):
        print(f'{len(unknown) - len(others)} of the unknown images left out: a known class', file=sys.stderr)
    for kind, paths in (('known', known), ('unknown', others)):
        _check_number(len(paths), f'{kind} images')
    if args.output:
        refuse_overwriting([args.output], args.resume, [*known, *unknown])
    known_scores, unreadable = compute_scores(predictor, known, args.workers)
    unknown_scores, more = compute_scores(predictor, others, args.workers)
    score, threshold = choose_threshold(known_scores, unknown_scores, args.keep, args.score)
    if args.output:
        save_threshold(args.resume, args.output, args.pretrained_weights, score, threshold)
        print(printable(args.output))
    return unreadable + more, len(known) + len(others)


def main() -> None:
    """Read the command line and choose."""
    args = parse_option()
    with exit_on_user_error():
        unreadable, count = run(args)
    exit_if_unreadable(unreadable, count)


if __name__ == '__main__':
    main()
