"""Images and video frames for prediction, in batches, and their detections."""

import os
from collections.abc import Iterable, Iterator
from itertools import tee
from pathlib import Path
from typing import NamedTuple

import cv2
import torch
from torch import Tensor

from data.file_loader import InferenceLoader
from detection.detections import Detections
from detection.detector import ImageDetector

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


def frames_of_images(images: InferenceLoader) -> Iterator[Frame]:
    """The images of a loader with `read_pixels`, one at a time, that can be read."""
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


def detect_frames(detector: ImageDetector, frames: Iterable[Frame]) -> Iterator[tuple[Frame, Detections]]:
    """Each frame with its detections; only a batch of frames is kept at a time."""
    frames, copies = tee(frames)
    return zip(frames, detector.stream(frame.pixels for frame in copies), strict=True)
