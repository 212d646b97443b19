"""Decode and resize images in the fast pipeline, as arrays, with no more pixels than a crop needs.

JPEGs are decoded by libjpeg-turbo through simplejpeg, whatever it refuses and all other formats by Pillow. Crops are
resized by PyTorch, whose kernel for 8 bits computes what Pillow's does, in a quarter of the time.
"""

import math
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import pil_modes_mapping

from data.images import AnyImage, read_header, to_image

# A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if its crop is then still this many times as large as the resized
# crop. With a factor of 1.5, evaluation images from photographs of four megapixels differ from those of the published
# pipeline by 2.0 to 2.8 of 255; with a factor of 2, by 0.9 to 1.1.
MIN_OVERSAMPLING = 2

# If the resized image would have this many times the pixels of its window, as for a strip of 20,000 x 1 pixels, only
# the window is computed.
_MAX_RESIZED = 32

_JPEG_START = b'\xff\xd8'
_COLORSPACES = {'RGB': 'RGB', 'L': 'GRAY'}  # simplejpeg's by PIL's mode


class Box(NamedTuple):
    """A rectangle, in pixels; it may begin and end within one."""

    left: float
    top: float
    width: float
    height: float


class Crop(NamedTuple):
    """A crop of an image: a box, which is resized, and a window of the result.

    Attributes:
        box: part of the image, in whole pixels.
        size: width and height to which it is resized.
        window: part of the resized box, in whole pixels.
    """

    box: Box
    size: tuple[int, int]
    window: Box

    def source(self) -> Box:
        """The window in the image's pixels."""
        x, y = self.box.width / self.size[0], self.box.height / self.size[1]
        left, top, width, height = self.window
        return Box(self.box.left + left * x, self.box.top + top * y, width * x, height * y)


class EncodedImage:
    """An image that is decoded when it is cropped; of a JPEG file, only the header is read at first.

    Args:
        data: content of an image file, or a decoded image.
        name: of the image, for errors.
        mode: PIL mode: RGB, or L for one grey channel.
        upright: turn it as its EXIF orientation says.

    Attributes:
        size: width and height, after it is turned.

    Raises:
        DataError: it cannot be decoded.
    """

    def __init__(self, data: AnyImage, name: str, mode: str, upright: bool = False):
        self.data, self.name, self.mode, self.upright = data, name, mode, upright
        self._pixels, self._orientation = None, 1
        size = _jpeg_size(data)
        if size is None:
            self._pixels = self._decode_with_pillow()
            size = self._pixels.shape[1::-1]
        elif upright and _has_metadata(data):
            self._orientation = read_header(name, data).orientation
        self.size = size[::-1] if self._orientation >= 5 else size

    def crop(self, crop: Crop, interpolation: InterpolationMode) -> np.ndarray:
        """The crop's pixels (H, W, 3) or (H, W), uint8.

        Raises:
            DataError: the image cannot be decoded.
        """
        source = crop.source()
        reduction = min(source.width / crop.window.width, source.height / crop.window.height) / MIN_OVERSAMPLING
        pixels = self._decode(reduction)
        is_strip = math.prod(crop.size) > _MAX_RESIZED * crop.window.width * crop.window.height
        if pixels.shape[1] == self.size[0] and not is_strip:
            return _resize(pixels, crop, interpolation)
        x, y = pixels.shape[1] / self.size[0], pixels.shape[0] / self.size[1]
        box = (source.left * x, source.top * y, (source.left + source.width) * x, (source.top + source.height) * y)
        size = int(crop.window.width), int(crop.window.height)
        return np.array(Image.fromarray(pixels).resize(size, pil_modes_mapping[interpolation], box))

    def _decode(self, reduction: float) -> np.ndarray:
        """Pixels, turned, at 1/2, 1/4 or 1/8 of the size where this is no less than 1 / reduction."""
        if self._pixels is not None:
            return self._pixels
        factor = next((factor for factor in (8, 4, 2) if factor <= reduction), 1)
        width, height = self.size[::-1] if self._orientation >= 5 else self.size  # as stored
        limits = {'min_width': width // factor, 'min_height': height // factor, 'min_factor': factor}
        try:
            pixels = simplejpeg.decode_jpeg(self.data, _COLORSPACES[self.mode], **limits)
        except ValueError:
            return self._decode_with_pillow()
        pixels = _turn(pixels, self._orientation)
        return pixels if self.mode == 'RGB' else pixels[:, :, 0]

    def _decode_with_pillow(self) -> np.ndarray:
        return np.array(to_image(self.data, self.name, self.mode, self.upright))


def _jpeg_size(data: AnyImage) -> tuple[int, int] | None:
    """Width and height of a JPEG that simplejpeg can decode safely; None for other images."""
    if not (isinstance(data, bytes) and data.startswith(_JPEG_START)):
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    is_supported = colorspace in ('YCbCr', 'RGB', 'Gray')
    return (width, height) if is_supported and width * height <= Image.MAX_IMAGE_PIXELS else None


def _has_metadata(data: bytes) -> bool:
    """Whether a JPEG may have an APP1 segment, where EXIF and XMP are: much faster than Pillow's parser."""
    position = len(_JPEG_START)
    while data[position : position + 1] == b'\xff':
        marker = data[position + 1 : position + 2]
        if marker == b'\xda':  # the pixels follow
            return False
        if marker in (b'\xe1', b'\xff'):  # APP1; padding, which is for Pillow to read
            return True
        position += 2 + int.from_bytes(data[position + 2 : position + 4])
    return True


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """A view of stored pixels (H, W, channels) that is upright."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _resize(pixels: np.ndarray, crop: Crop, interpolation: InterpolationMode) -> np.ndarray:
    left, top, width, height = map(int, crop.box)
    pixels = pixels[top : top + height, left : left + width]
    if pixels.strides[0] < pixels.strides[1] or min(pixels.strides) < 0:  # of a turned image
        pixels = np.ascontiguousarray(pixels)
    if not pixels.size:  # a random crop of an image of 1 x 1, which Pillow resizes to black
        return np.zeros((*crop.size[::-1], *pixels.shape[2:]), np.uint8)
    if interpolation in (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC):
        images = torch.from_numpy(pixels.reshape(1, height, width, -1)).permute(0, 3, 1, 2)
        resized = F.interpolate(images, crop.size[::-1], mode=interpolation.value, antialias=True)
        pixels = resized[0].permute(1, 2, 0).numpy().reshape(*crop.size[::-1], *pixels.shape[2:])
    else:
        pixels = np.array(Image.fromarray(pixels).resize(crop.size, pil_modes_mapping[interpolation]))
    left, top, width, height = map(int, crop.window)
    return pixels[top : top + height, left : left + width]
