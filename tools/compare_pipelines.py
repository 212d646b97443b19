"""Compare the fast pipeline with the published one: pixel differences of crops, evaluated images and operations.

    python -m tools.compare_pipelines --data-path <imagenet>

Differences are means over an image of |fast - published|, in levels of 255. Crops have the same box and flip, and no
operations on colours. Without --data-path, images are cut from photographs that ship with scikit-learn.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data.auto_augment import LEVEL_TO_ARG, AugmentOp, RandAugment
from torchvision.transforms import Compose
from yacs.config import CfgNode

from config import load_config
from data.array_augment import use_arrays
from data.fast_transforms import FastEvalTransform, FastTrainTransform
from data.images import decode_image
from data.samples import Samples
from data.seeding import seeded
from data.transforms import build_transform, image_mode, mean_and_std, train_steps
from tools.sample_images import find_samples
from utils import exit_on_user_error, positive_int

# Options of the config for crops and flips alone
GEOMETRY_ALONE = ['AUG.AUTO_AUGMENT', 'none', 'AUG.COLOR_JITTER', '0', 'AUG.REPROB', '0']


def difference(fast: np.ndarray, published: np.ndarray) -> float:
    """Mean absolute difference of two images of 8 bits."""
    return float(np.abs(fast.astype(int) - published.astype(int)).mean())


def compare_crops(config: CfgNode, samples: Samples, crops: int) -> list[float]:
    """Differences of random crops and flips, several per image."""
    mode, fast = image_mode(config), FastTrainTransform(config)
    crop_and_flip = Compose(train_steps(config)[0])
    differences = []
    for index in range(len(samples)):
        data = samples.read(index)
        for number in range(crops):
            with seeded(index, number):
                ours = fast.augment(fast.decode(data, samples.describe(index)))
            with seeded(index, number):
                theirs = crop_and_flip(decode_image(data, samples.describe(index), mode))
            differences.append(difference(ours, np.asarray(theirs)))
    return differences


def compare_evaluation(config: CfgNode, samples: Samples) -> list[float]:
    """Differences of the images that an evaluation sees."""
    mode, fast, published = image_mode(config), FastEvalTransform(config), build_transform(config, is_train=False)
    mean, std = (np.reshape(x, (-1, 1, 1)) for x in mean_and_std(config))
    differences = []
    for index in range(len(samples)):
        data, name = samples.read(index), samples.describe(index)
        image = published(decode_image(data, name, mode)).numpy()
        pixels = np.rint((image * std + mean) * 255).transpose(1, 2, 0)
        ours = fast.decode(data, name)
        differences.append(difference(ours.reshape(pixels.shape), pixels))
    return differences


def compare_operations(config: CfgNode, samples: Samples) -> dict[str, list[float]]:
    """Differences of each of timm's operations, at the policy's magnitude, on the images that an evaluation sees."""
    _, [policy], _ = train_steps(config)
    resize, differences = FastEvalTransform(config), {}
    images = [resize.decode(samples.read(index), samples.describe(index)) for index in range(len(samples))]
    for name in LEVEL_TO_ARG:
        published, fast = (_always(name, policy) for _ in range(2))
        use_arrays(RandAugment([fast]))
        differences[name] = []
        for seed, pixels in enumerate(images):
            with seeded(seed):
                theirs = np.asarray(published(Image.fromarray(pixels)))
            with seeded(seed):
                differences[name].append(difference(fast(pixels), theirs))
    return differences


def _always(name: str, policy: RandAugment) -> AugmentOp:
    """An operation with the magnitude of a policy's, and probability 1."""
    op = policy.ops[0]
    return AugmentOp(name, 1.0, op.magnitude, op.hparams)


def report(name: str, differences: Sequence[float]) -> str:
    """A row of the table."""
    figures = (np.mean(differences), *np.quantile(differences, (0.5, 0.95, 1)))
    return f'| {name} | {len(differences)} | ' + ' | '.join(f'{figure:.3f}' for figure in figures) + ' |'


def rows(config_file: str, samples: Samples, crops: int) -> Iterator[str]:
    """The table, as lines of Markdown."""
    config = load_config(config_file)
    yield '| | images | mean | median | 95 % | largest |'
    yield '|---|---|---|---|---|---|'
    yield report('training crop', compare_crops(load_config(config_file, GEOMETRY_ALONE), samples, crops))
    yield report('evaluation', compare_evaluation(config, samples))
    for name, differences in compare_operations(config, samples).items():
        yield report(name, differences)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument('--data-path', type=Path, metavar='DIR', help='a dataset, or any folder of images')
    parser.add_argument('--cfg', default='configs/msg_tiny_p4_win7_224.yaml', metavar='FILE', help='config')
    parser.add_argument('--images', type=positive_int, default=125, metavar='N', help='how many images (125)')
    parser.add_argument('--crops', type=positive_int, default=4, metavar='N', help='random crops per image (4)')
    args = parser.parse_args()
    with exit_on_user_error(), tempfile.TemporaryDirectory() as folder:
        samples = find_samples(args.data_path, args.images, Path(folder))
        for row in rows(args.cfg, samples, args.crops):
            print(row, flush=True)


if __name__ == '__main__':
    main()
