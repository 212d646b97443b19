"""Images and video frames for prediction, in batches, and their detections."""

import math
import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import tee
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from data.file_loader import InferenceLoader
from detection.detections import Detections
from detection.detector import ImageDetector
from utils import UserError, report_write_errors

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


def is_video(path: Path) -> bool:
    """Whether this is a file with the suffix of a video."""
    return path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()


def frames_of_images(images: InferenceLoader) -> Iterator[Frame]:
    """The images of a loader with `read_pixels`, one at a time, that can be read."""
    for batch in images:
        if batch.images is not None:
            yield Frame(images.paths[batch.indices[0]], None, batch.images[0])


class Video:
    """The frames of a video file, turned upright as it says; none if it cannot be read.

    Args:
        path: the file.

    Attributes:
        fps: frames per second; 25 where the file does not say.
    """

    def __init__(self, path: Path):
        self.path = path
        self.capture = cv2.VideoCapture(os.fsencode(path))  # a name need not be Unicode
        fps = self.capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if math.isfinite(fps) and fps > 0 else 25.0

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


def import_av() -> ModuleType:
    """PyAV, which brings FFmpeg's libraries and an encoder of H.264; OpenCV's wheel has none.

    Raises:
        UserError: it is not installed.
    """
    try:
        import av
    except ImportError:
        raise UserError('drawing videos needs PyAV: pip install av, or leave out --output') from None
    return av


class VideoWriter:
    """Writes frames to a video that browsers play: H.264 in MP4, with its index in front. There is no sound.

    The first frame sets the size. Where its width or height is odd, the last column or row is repeated, because H.264
    has the colours of two by two pixels together.

    Args:
        path: the file, .mp4.
        fps: frames per second.
    """

    def __init__(self, path: Path, fps: float):
        self.path, self.fps = path, Fraction(fps).limit_denominator(1001)  # 29.97 is 30000 / 1001
        self.av, self.container = import_av(), None

    def write(self, pixels: np.ndarray) -> None:
        """Write a frame (H, W, 3), RGB.

        Raises:
            OutputError: the file cannot be written.
        """
        height, width = pixels.shape[:2]
        pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode='edge')
        with report_write_errors(self.path.parent):
            if self.container is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.container = self.av.open(self.path, 'w', format='mp4', options={'movflags': 'faststart'})
                self.stream = self.container.add_stream('libx264', rate=self.fps)
                self.stream.height, self.stream.width = pixels.shape[:2]
                self.stream.pix_fmt = 'yuv420p'
            self.container.mux(self.stream.encode(self.av.VideoFrame.from_ndarray(pixels, format='rgb24')))

    def close(self) -> None:
        """Finish the file.

        Raises:
            OutputError: it cannot be written.
        """
        if self.container is not None:
            with report_write_errors(self.path.parent):
                self.container.mux(self.stream.encode())
                self.container.close()


def detect_frames(detector: ImageDetector, frames: Iterable[Frame]) -> Iterator[tuple[Frame, Detections]]:
    """Each frame with its detections; only a batch of frames is kept at a time."""
    frames, copies = tee(frames)
    return zip(frames, detector.stream(frame.pixels for frame in copies), strict=True)
