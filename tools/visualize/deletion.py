"""Compare attention rollout and Grad-CAM by a deletion score: which finds the patches that the network relies on?

    python -m tools.visualize.deletion <images> --weights msg_transformer_nano --limit 400

The most important patches of an image are removed step by step, and the network is asked each time for the probability
of the class that it predicted for the whole image. The score is the mean of this probability, from the whole image to
the empty one: the area under the curve of Petsiuk et al. (RISE, arXiv:1806.07421). A map that finds what the network
relies on makes the probability fall early, so lower is better. Removing patches in random order is the baseline.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm

from data.file_loader import exit_if_unreadable
from data.images import DataError, choose_images, find_images, read_file, report_other_files
from data.multi_label import class_probabilities
from engine.predictor import Predictor, add_network_flags, load_predictor
from main import TASK
from models.registry import stored_weights
from tools.msg_network import build_with_msg_tokens
from tools.visualize.explain import grad_cam, trace_blocks, traced_logits
from tools.visualize.rollout import class_rollout
from tools.visualize.view import NarrowImageError, VisualizeError, prepare
from utils import exit_on_user_error, home_path, positive_int, printable

ROLLOUT, GRADCAM, RANDOM = 'attention rollout', 'Grad-CAM', 'random'
REMOVALS = ('mean', 'blur')
RESAMPLES = 10_000
BATCH = 32  # partly removed images at a time
EXAMPLES = """example:
  python -m tools.visualize.deletion <imagenette>/val --weights msg_transformer_nano --limit 400
"""


def importance_maps(predictor: Predictor, image: Tensor, generator: torch.Generator) -> tuple[int, dict[str, Tensor]]:
    """The maps to compare, by name, for the predicted class of an image.

    Args:
        predictor: the network.
        image: (1, in_chans, height, width), normalised.
        generator: of the random order.

    Returns:
        The predicted class, and the maps (H, W) on the patch grid of the first stage. Those of later stages are
        interpolated to it.
    """
    model = predictor.model
    stages = trace_blocks(model, image)
    class_index = int(traced_logits(model, stages).argmax())
    grid = stages[0].grid
    count = range(len(stages))
    maps = {f'{ROLLOUT}, stage {i + 1}': class_rollout(model, stages, i) for i in count}
    maps |= {f'{GRADCAM}, stage {i + 1}': grad_cam(model, stages, class_index, i).detach() for i in count}
    maps[RANDOM] = torch.rand(grid, generator=generator)
    return class_index, {
        name: F.interpolate(values[None, None], grid, mode='bilinear')[0, 0] for name, values in maps.items()
    }


@torch.inference_mode()
def deletion_score(
    predictor: Predictor, image: Tensor, empty: Tensor, importance: Tensor, class_index: int, steps: int, ties: Tensor
) -> float:
    """Mean probability of a class while the most important patches are replaced, first to last.

    Args:
        predictor: the network.
        image: (1, in_chans, height, width), normalised.
        empty: what replaces its patches, of the same shape.
        importance: of the patches, (H, W).
        class_index: of the class.
        steps: in how many equal steps all patches are replaced; at most one for each patch.
        ties: a permutation of the H * W patches, which orders patches of the same importance.

    Returns:
        The area under the probability over the share of replaced patches, by the trapezoidal rule.
    """
    steps = min(steps, len(ties))
    order = ties[importance.flatten().cpu()[ties].argsort(descending=True, stable=True)]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    removed = torch.linspace(0, len(order), steps + 1).round()  # patches removed at each step
    is_removed = rank.view(1, 1, *importance.shape) < removed.view(-1, 1, 1, 1)  # (steps + 1, 1, H, W)
    patch = predictor.model.patch_embed.patch_size
    height, width = image.shape[-2:]
    pixels = is_removed.repeat_interleave(patch, 2).repeat_interleave(patch, 3)[..., :height, :width].to(image.device)
    batches = torch.where(pixels, empty, image).split(BATCH)
    probabilities = torch.cat(
        [class_probabilities(predictor.model(batch), predictor.config)[:, class_index] for batch in batches]
    )
    return float(torch.trapezoid(probabilities) / steps)


def empty_image(image: Tensor, removal: str) -> Tensor:
    """What replaces removed patches: the mean colour of the training images, or the heavily blurred image."""
    if removal == 'mean':
        return torch.zeros_like(image)  # images are normalised
    sigma = min(image.shape[-2:]) / 10
    kernel = min(2 * round(2 * sigma) + 1, 2 * min(image.shape[-2:]) - 1)
    return gaussian_blur(image, kernel, sigma)


def mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """The mean over images, and its 95 % interval by the percentile bootstrap."""
    interval = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, batch=1000, method='percentile', random_state=0
    ).confidence_interval
    return float(values.mean()), float(interval.low), float(interval.high)


def table(scores: dict[str, np.ndarray]) -> list[str]:
    """Lines of a Markdown table: the mean score of each map, and differences, which are paired by image.

    Args:
        scores: of the images, (images,), by name of the map.
    """
    lines = ['| order of removal | deletion score | minus random | minus Grad-CAM of the stage |', '|---|---|---|---|']
    for name, values in scores.items():
        columns = ['{:.3f} [{:.3f}, {:.3f}]'.format(*mean_interval(values))]
        for other in (RANDOM, name.replace(ROLLOUT, GRADCAM)):
            is_reference = other == name or other not in scores
            difference = () if is_reference else mean_interval(values - scores[other])
            columns.append('{:+.3f} [{:+.3f}, {:+.3f}]'.format(*difference) if difference else '')
        lines.append(f'| {name} | {" | ".join(columns)} |')
    return lines


def score_images(
    predictor: Predictor, images: Sequence[Path], removal: str, steps: int
) -> tuple[dict[str, np.ndarray], int]:
    """Deletion scores of all maps.

    Args:
        predictor: the network.
        images: files.
        removal: see `empty_image`.
        steps: see `deletion_score`.

    Returns:
        The scores by name of the map, (images,), and how many images cannot be read; they are named on stderr.
    """
    generator, scores, unreadable = torch.Generator().manual_seed(0), defaultdict(list), 0
    for path in tqdm(images, unit='image', disable=None):
        try:
            image = prepare(predictor, read_file(path), str(path)).image
        except (DataError, NarrowImageError) as error:
            tqdm.write(f'error: {printable(error)}', file=sys.stderr)
            unreadable += 1
            continue
        class_index, maps = importance_maps(predictor, image, generator)
        empty = empty_image(image, removal)
        ties = torch.randperm(maps[RANDOM].numel(), generator=generator)
        for name, importance in maps.items():
            score = deletion_score(predictor, image, empty, importance, class_index, steps, ties)
            scores[name].append(score)
    return {name: np.array(values) for name, values in scores.items()}, unreadable


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        'python -m tools.visualize.deletion',
        description=__doc__.splitlines()[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('images', nargs='+', type=home_path, metavar='IMAGES', help='image files or folders')
    add_network_flags(parser, stored_weights())
    add('--limit', type=positive_int, metavar='N', help='use only N images, chosen at random but always the same')
    add('--steps', type=positive_int, default=14, metavar='N', help='steps in which all patches are removed (14)')
    add(
        '--removal',
        choices=REMOVALS,
        default=REMOVALS[0],
        help='what replaces a removed patch: the mean colour of the training images, or the blurred image (mean)',
    )
    return parser.parse_intermixed_args()


def main() -> None:
    """Read the command line, score and print the table."""
    args = parse_args()
    with exit_on_user_error():
        images = choose_images(find_images(args.images), args.limit)
        if len(images) < 2:
            raise VisualizeError('one image has no interval: give two or more')
        predictor = load_predictor(args, TASK, build_with_msg_tokens)
        if not predictor.class_names:
            raise VisualizeError('the deletion score needs the probability of a class, and the network has no classes')
        report_other_files(args.images)
        scores, unreadable = score_images(predictor, images, args.removal, args.steps)
        count = len(images) - unreadable
        if count < 2:
            raise VisualizeError(f'{unreadable} of {len(images)} images cannot be read: see above')
        print(f'{count} images, patches replaced by: {args.removal}; mean [95 % interval], lower is better\n')
        print('\n'.join(table(scores)))
    exit_if_unreadable(unreadable, len(images))


if __name__ == '__main__':
    main()
