"""Paths of the project and of the tests' small configs."""

import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TINY = ROOT / 'tests' / 'fixtures' / 'tiny.yaml'
TINY_DETECTOR = ROOT / 'tests' / 'fixtures' / 'tiny_detector.yaml'
DETECTION_CONFIGS = ROOT / 'detection' / 'configs'


def copy_sources(folder: Path) -> Path:
    """Copy the project's files to a new folder, without what tools and builds leave behind."""
    ignored = shutil.ignore_patterns('.*', '__pycache__', 'output', 'build', '*.egg-info')
    return shutil.copytree(ROOT, folder, ignore=ignored)
