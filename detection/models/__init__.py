"""Detectors from the config tree: `build_detector(config)`."""

from detection.models.build import build_detector

__all__ = ['build_detector']
