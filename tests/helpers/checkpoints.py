"""Checkpoints for tools, as a run writes them."""

from pathlib import Path

import torch
import yaml
from yacs.config import CfgNode

from models import build_model
from tests.helpers.golden import fill_


def write_checkpoint(path: Path, config: CfgNode, names: list[str]) -> Path:
    """Write a network's checkpoint, with its config and as many of these class names as it has classes."""
    state = fill_(build_model(config)).state_dict()
    names = names[: config.MODEL.NUM_CLASSES]
    torch.save({'model': state, 'config': yaml.safe_load(config.dump()), 'classes': names}, path)
    return path
