"""timm's augmentation operations on arrays: what PIL computes, several times as fast.

Policies, magnitudes, signs and probabilities stay timm's: `use_arrays` replaces only the function that each
operation of a policy applies to the image.
"""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
from PIL import Image
from timm.data.auto_augment import AugmentOp, AutoAugment, RandAugment

Pixels = np.ndarray  # (H, W, 3) or (H, W), uint8

_INTERPOLATIONS = {
    Image.Resampling.NEAREST: cv2.INTER_NEAREST,
    Image.Resampling.BILINEAR: cv2.INTER_LINEAR,
    Image.Resampling.BICUBIC: cv2.INTER_CUBIC,
}

# PIL's ImageFilter.SMOOTH
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13

_LEVELS = np.arange(256)


def use_arrays(policy: Callable) -> Callable[[Pixels], Pixels]:
    """Make one of timm's policies take and return arrays; it draws the same random numbers as before.

    Operations without an array form, those that are not timm's own functions, and AugMix go through PIL.

    Args:
        policy: from `timm.data`; a RandAugment or AutoAugment is changed in place.
    """
    if isinstance(policy, RandAugment):
        ops = policy.ops
    elif isinstance(policy, AutoAugment):
        ops = [op for sub_policy in policy.policy for op in sub_policy]
    else:
        return ThroughPil(policy)
    for op in ops:
        op.aug_fn = _array_form(op)
    return policy


class ThroughPil:
    """A function of a PIL image as a function of an array.

    Args:
        function: takes and returns a PIL image; further arguments are passed on.
    """

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, pixels: Pixels, *args: Any, **kwargs: Any) -> Pixels:
        """Apply it."""
        return np.array(self.function(Image.fromarray(pixels), *args, **kwargs))


def _array_form(op: AugmentOp) -> Callable[..., Pixels]:
    if getattr(op.aug_fn, '__module__', None) != AugmentOp.__module__:  # a user's, perhaps under the name of timm's
        return ThroughPil(op.aug_fn)
    if op.name in _GEOMETRIC:
        resamplings = op.kwargs['resample']
        resamplings = resamplings if isinstance(resamplings, tuple | list) else [resamplings]
        if not set(resamplings) <= _INTERPOLATIONS.keys():
            return ThroughPil(op.aug_fn)
    return _ARRAY_FORMS.get(op.name) or ThroughPil(op.aug_fn)


# Lookup tables: one value for each of the 256 levels, (256,) or per channel (256, C)


def _look_up(pixels: Pixels, table: np.ndarray) -> Pixels:
    table = table.clip(0, 255).astype(np.uint8)
    return cv2.LUT(pixels, table if table.ndim == 1 else table[None])


def _histograms(pixels: Pixels) -> np.ndarray:
    """Counts of the levels in each channel, (256, C)."""
    counts = [cv2.calcHist([x], [0], None, [256], [0, 256]).ravel() for x in _channels(pixels)]
    return np.stack(counts, 1).astype(int)


def _channels(pixels: Pixels) -> Sequence[Pixels]:
    return [pixels] if pixels.ndim == 2 else cv2.split(pixels)


def auto_contrast(pixels: Pixels, **_: Any) -> Pixels:
    """Stretch each channel to all levels."""
    extremes = [cv2.minMaxLoc(x)[:2] for x in _channels(pixels)]
    low, high = np.array(extremes, int).T
    scale = 255 / np.maximum(high - low, 1)
    table = ((_LEVELS[:, None] - low) * scale).astype(int)
    return _look_up(pixels, np.where(high > low, table, _LEVELS[:, None]).squeeze())


def equalize(pixels: Pixels, **_: Any) -> Pixels:
    """Give each channel a flat histogram."""
    counts = _histograms(pixels)
    last = 255 - (counts[::-1] > 0).argmax(0)
    step = (counts.sum(0) - counts[last, np.arange(len(last))]) // 255
    below = counts.cumsum(0) - counts
    table = (step // 2 + below) // np.maximum(step, 1)
    return _look_up(pixels, np.where(step > 0, table, _LEVELS[:, None]).squeeze())


def invert(pixels: Pixels, **_: Any) -> Pixels:
    """The negative."""
    return cv2.bitwise_not(pixels)


def posterize(pixels: Pixels, bits_to_keep: int, **_: Any) -> Pixels:
    """Keep the upper bits."""
    return pixels if bits_to_keep >= 8 else pixels & np.uint8(256 - 2 ** (8 - max(bits_to_keep, 0)))


def solarize(pixels: Pixels, thresh: int, **_: Any) -> Pixels:
    """Invert the levels from `thresh` on."""
    return pixels ^ np.negative((pixels >= thresh).view(np.uint8))  # with 255, where it is true


def solarize_add(pixels: Pixels, add: int, thresh: int = 128, **_: Any) -> Pixels:
    """Add to the levels below `thresh`."""
    return _look_up(pixels, np.where(thresh > _LEVELS, _LEVELS + add, _LEVELS))


def brightness(pixels: Pixels, factor: float, **_: Any) -> Pixels:
    """Blend with black."""
    return _look_up(pixels, _LEVELS * factor)


def contrast(pixels: Pixels, factor: float, **_: Any) -> Pixels:
    """Blend with the mean grey."""
    mean = int(cv2.mean(_grey(pixels))[0] + 0.5)
    return _look_up(pixels, mean + factor * (_LEVELS - mean))


# Blends with a changed image


def color(pixels: Pixels, factor: float, **_: Any) -> Pixels:
    """Blend with the grey image."""
    if pixels.ndim == 2:
        return pixels
    return cv2.addWeighted(pixels, factor, cv2.cvtColor(_grey(pixels), cv2.COLOR_GRAY2RGB), 1 - factor, 0)


def desaturate(pixels: Pixels, factor: float, **_: Any) -> Pixels:
    """Blend with the grey image, the more the larger the factor."""
    return color(pixels, min(1.0, max(0.0, 1.0 - factor)))


def sharpness(pixels: Pixels, factor: float, **_: Any) -> Pixels:
    """Blend with the smoothed image; the outermost pixels stay."""
    sharpened = cv2.addWeighted(pixels, factor, cv2.filter2D(pixels, -1, _SMOOTH), 1 - factor, 0)
    result = pixels.copy()
    result[1:-1, 1:-1] = sharpened[1:-1, 1:-1]
    return result


def _grey(pixels: Pixels) -> Pixels:
    return pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)


# Affine maps, from the result's coordinates to the image's


def shear_x(pixels: Pixels, factor: float, **kwargs: Any) -> Pixels:
    """Shift each row in proportion to its height."""
    return _transform(pixels, (1, factor, 0, 0, 1, 0), **kwargs)


def shear_y(pixels: Pixels, factor: float, **kwargs: Any) -> Pixels:
    """Shift each column in proportion to its distance from the left."""
    return _transform(pixels, (1, 0, 0, factor, 1, 0), **kwargs)


def translate_x_abs(pixels: Pixels, shift: float, **kwargs: Any) -> Pixels:
    """Shift to the left, in pixels."""
    return _transform(pixels, (1, 0, shift, 0, 1, 0), **kwargs)


def translate_y_abs(pixels: Pixels, shift: float, **kwargs: Any) -> Pixels:
    """Shift up, in pixels."""
    return _transform(pixels, (1, 0, 0, 0, 1, shift), **kwargs)


def translate_x_rel(pixels: Pixels, fraction: float, **kwargs: Any) -> Pixels:
    """Shift to the left, as a fraction of the width."""
    return translate_x_abs(pixels, fraction * pixels.shape[1], **kwargs)


def translate_y_rel(pixels: Pixels, fraction: float, **kwargs: Any) -> Pixels:
    """Shift up, as a fraction of the height."""
    return translate_y_abs(pixels, fraction * pixels.shape[0], **kwargs)


def rotate(pixels: Pixels, degrees: float, **kwargs: Any) -> Pixels:
    """Rotate about the centre, counterclockwise."""
    height, width = pixels.shape[:2]
    cos, sin = math.cos(math.radians(degrees)), -math.sin(math.radians(degrees))
    x, y = width / 2, height / 2
    return _transform(pixels, (cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y), **kwargs)


def _transform(pixels: Pixels, matrix: tuple[float, ...], resample: Any, fillcolor: tuple[int, ...]) -> Pixels:
    """Sample the image at `(a x + b y + c, d x + e y + f)`; PIL's centre of a pixel is at (0.5, 0.5), OpenCV's at 0."""
    a, b, c, d, e, f = matrix
    if isinstance(resample, tuple | list):
        resample = random.choice(resample)
    centred = np.array([[a, b, c + (a + b - 1) / 2], [d, e, f + (d + e - 1) / 2]])
    return cv2.warpAffine(
        pixels,
        centred,
        pixels.shape[1::-1],
        flags=_INTERPOLATIONS[resample] | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=fillcolor,
    )


_GEOMETRIC = {
    'Rotate': rotate,
    'ShearX': shear_x,
    'ShearY': shear_y,
    'TranslateX': translate_x_abs,
    'TranslateY': translate_y_abs,
    'TranslateXRel': translate_x_rel,
    'TranslateYRel': translate_y_rel,
}

_ARRAY_FORMS = _GEOMETRIC | {
    'AutoContrast': auto_contrast,
    'Equalize': equalize,
    'Invert': invert,
    'Posterize': posterize,
    'PosterizeIncreasing': posterize,
    'PosterizeOriginal': posterize,
    'Solarize': solarize,
    'SolarizeIncreasing': solarize,
    'SolarizeAdd': solarize_add,
    'Color': color,
    'ColorIncreasing': color,
    'Contrast': contrast,
    'ContrastIncreasing': contrast,
    'Brightness': brightness,
    'BrightnessIncreasing': brightness,
    'Sharpness': sharpness,
    'SharpnessIncreasing': sharpness,
    'Desaturate': desaturate,
}
