"""Pixel differences of the fast pipeline and the published one: crops, evaluated images, operations.

Differences are means over an image of |fast - published|, in levels of 255.
"""

import numpy as np
from PIL import Image
from timm.data.auto_augment import LEVEL_TO_ARG, AugmentOp, RandAugment
from torchvision.transforms import Compose

from data.array_augment import use_arrays
from data.fast_transforms import FastEvalTransform, FastTrainTransform
from data.images import decode_image
from data.seeding import seeded
from data.transforms import build_transform, image_mode, mean_and_std, train_steps

# Options of the config for crops and flips alone
GEOMETRY_ALONE = ['AUG.AUTO_AUGMENT', 'none', 'AUG.COLOR_JITTER', '0', 'AUG.REPROB', '0']


def difference(fast, published):
    """Mean absolute difference of two images of 8 bits."""
    return float(np.abs(fast.astype(int) - published.astype(int)).mean())


def compare_crops(config, samples, crops):
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


def compare_evaluation(config, samples):
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


def compare_operations(config, samples):
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


def _always(name, policy):
    """An operation with the magnitude of a policy's, and probability 1."""
    op = policy.ops[0]
    return AugmentOp(name, 1.0, op.magnitude, op.hparams)
