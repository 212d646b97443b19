"""Images and video frames for prediction, in batches, and their detections."""

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import cv2
import torch
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from data.file_loader import InferenceLoader
from data.images import decode_image
from detection.tta import Detections, build_detect_fn
from engine.predictor import Predictor

VIDEO_SUFFIXES = ('.mp4', '.avi', '.mov', '.mkv', '.webm', '.m4v')


class Frame(NamedTuple):
    """An image, or a frame of a video.

    Attributes:
        path: of the image or video.
        number: of the frame, from 0; None for an image.
        pixels: (3, H, W), uint8.
    """

    path: Path
    number: int | None
    pixels: Tensor


def decode(data: bytes, name: str, upright: bool = True) -> Tensor:
    """Pixels (3, H, W) of an encoded image, uint8, perhaps turned as its EXIF orientation says."""
    return pil_to_tensor(decode_image(data, name, upright=upright))


def frames_of_images(images: InferenceLoader) -> Iterator[Frame]:
    """The images of a loader with `decode`, one at a time, that can be read."""
    for batch in images:
        if batch.images is not None:
            yield Frame(images.paths[batch.indices[0]], None, batch.images[0])


class Video:
    """The frames of a video file; none if it cannot be read.

    Args:
        path: the file.

    Attributes:
        fps: frames per second.
    """

    def __init__(self, path: Path):
        self.path = path
        self.capture = cv2.VideoCapture(os.fsencode(path))  # a name need not be Unicode
        self.fps = self.capture.get(cv2.CAP_PROP_FPS) or 25.0

    def __iter__(self) -> Iterator[Frame]:
        number = 0
        while True:
            is_frame, pixels = self.capture.read()
            if not is_frame:
                break
            rgb = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
            yield Frame(self.path, number, torch.from_numpy(rgb).permute(2, 0, 1))
            number += 1
        self.capture.release()


class FrameDetector:
    """Finds objects in frames.

    Args:
        predictor: the network, with its config.
        batch_size: frames at a time; their detections do not depend on it, see `build_detect_fn`.
    """

    def __init__(self, predictor: Predictor, batch_size: int = 1):
        self.device, self.batch_size = predictor.device, batch_size
        self.detect: Callable[[list[Tensor]], list[Detections]] = build_detect_fn(predictor.config, predictor.model)

    @torch.inference_mode()
    def __call__(self, frames: Iterable[Frame]) -> Iterator[tuple[Frame, Detections]]:
        """Each frame with its detections, highest scores first, on the CPU."""
        frames = iter(frames)
        while batch := list(islice(frames, self.batch_size)):
            images = [frame.pixels.to(self.device).float() / 255 for frame in batch]
            for frame, detections in zip(batch, self.detect(images), strict=True):
                yield frame, {key: x.cpu() for key, x in detections.items()}
