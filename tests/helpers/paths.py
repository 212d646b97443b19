"""Paths of the project and of the tests' small configs."""

from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TINY = ROOT / 'tests' / 'fixtures' / 'tiny.yaml'
TINY_DETECTOR = ROOT / 'tests' / 'fixtures' / 'tiny_detector.yaml'
DETECTION_CONFIGS = ROOT / 'detection' / 'configs'
