"""Command-line options of tools that read a dataset without a detector."""

import argparse

from yacs.config import CfgNode

from detection.config import TREE
from detection.data import with_classes_of_data
from engine.config_tree import add_options


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add `--cfg`, `--opts` and `--data-path`."""
    parser.add_argument('--cfg', metavar='FILE', help='YAML config (the defaults)')
    add_options(parser)
    parser.add_argument('--data-path', required=True, metavar='DIR', help='the dataset (DATA.DATA_PATH)')


def load_data_config(args: argparse.Namespace, split: str, **values: object) -> CfgNode:
    """The config of these options; without `--cfg`, it has as many classes as the split.

    Args:
        args: the command line.
        split: `TRAIN` or `VAL`.
        **values: of keys, with `__` for dots, which `--opts` override.

    Raises:
        ConfigError, DataError: the config or the annotation file cannot be used.
    """
    values['DATA__DATA_PATH'] = args.data_path
    if args.cfg is None:
        values['MODEL__NUM_CLASSES'] = None
    options = [text for key, value in values.items() for text in (key.replace('__', '.'), str(value))]
    return with_classes_of_data(TREE.load(args.cfg, [*options, *args.opts]), split)
