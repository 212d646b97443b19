"""Images of inference in any form: files, and images in memory."""

import os

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from data.images import DataError, kind_of_value, load_image, to_image

# A path, the content of a file, a PIL image, an array (H, W, 3) or (H, W), or a tensor (3, H, W); colours are RGB
ImageInput = str | os.PathLike | bytes | Image.Image | np.ndarray | Tensor

TOLERANCE = 1e-3  # around [0, 1], for images that were resized

FORMS = 'give a path, a PIL image, an array (H, W, 3) or (H, W), or a tensor (3, H, W), of uint8 or of floats in [0, 1]'


def read_pixels(image: ImageInput, name: str | int = 0, upright: bool = True) -> Tensor:
    """Pixels (3, H, W) of an image of any form, uint8 or, of floats, in [0, 1].

    Args:
        image: see `ImageInput`; arrays and tensors hold uint8, or floats in [0, 1].
        name: name or number of the image, for errors; a file has its path.
        upright: turn files and PIL images as their EXIF orientation says.

    Raises:
        DataError: it cannot be read, or is of another form.
    """
    if isinstance(image, str | os.PathLike):
        if os.path.isdir(image):
            raise DataError(f'{image} is a folder: give its images, such as sorted(Path({str(image)!r}).glob("*.jpg"))')
        return pil_to_tensor(load_image(image, upright=upright))
    if isinstance(image, Image.Image) and not min(image.size):
        raise DataError(f'image {name} has no pixels: {FORMS}')
    if isinstance(image, bytes | Image.Image):
        return pil_to_tensor(to_image(image, name, upright=upright))
    pixels = image
    if isinstance(image, np.ndarray) and image.dtype.kind in 'uif' and image.ndim in (2, 3):
        array = np.array(image if image.ndim == 3 else np.stack([image] * 3, axis=2))  # contiguous, and may be written
        array = array.astype(np.float64 if array.dtype == np.longdouble else array.dtype.newbyteorder('='), copy=False)
        pixels = torch.from_numpy(array).permute(2, 0, 1)
    if not isinstance(pixels, Tensor) or pixels.ndim != 3 or len(pixels) != 3 or not pixels.numel():
        raise DataError(f'image {name} is {kind_of_value(image)}: {FORMS}')
    if pixels.dtype != torch.uint8 and not (
        pixels.is_floating_point() and ((pixels > -TOLERANCE) & (pixels < 1 + TOLERANCE)).all()
    ):
        low, high = (x.item() for x in pixels.double().aminmax())
        raise DataError(f'image {name} is {kind_of_value(image)}, with values from {low:.4g} to {high:.4g}: {FORMS}')
    return pixels.clamp(0, 1) if pixels.is_floating_point() else pixels
