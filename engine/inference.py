"""Inference with a trained network of any task: flags, loading."""

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from yacs.config import CfgNode

from engine.checkpoint import CheckpointError, choose_weights, fit_weights, load_checkpoint, load_weights
from engine.config_tree import ConfigTree
from engine.distributed import choose_device
from utils import available_cores, non_negative_int, positive_int


class Predictor(NamedTuple):
    """A trained network, ready for inference."""

    config: CfgNode
    model: nn.Module
    class_names: list[str]
    device: torch.device


def prediction_parser(
    description: str, epilog: str | None = None, stored: Mapping[str, Path] | None = None
) -> argparse.ArgumentParser:
    """A parser of images and of a trained network; read it with `parse_intermixed_args`.

    Args:
        description: of the program.
        epilog: examples, kept as they are written.
        stored: see `add_network_flags`.
    """
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    images = 'files, folders, quoted patterns such as "photos/**/*.jpg", or - for a list of them on standard input'
    add('images', nargs='+', type=Path, metavar='IMAGES', help=images)
    add_network_flags(parser, stored)
    add('--limit', type=positive_int, metavar='N', help='take N of the images, a random but fixed choice')
    workers = min(available_cores(), 4)
    add('--workers', type=non_negative_int, default=workers, metavar='N', help='loader processes (cores, up to 4)')
    return parser


def add_network_flags(
    parser: argparse.ArgumentParser, stored: Mapping[str, Path] | None = None, is_required: bool = True
) -> None:
    """Add the flags that name a trained network, for `load_predictor`.

    Args:
        parser: gets the flags.
        stored: files of weights that are part of the project, by name; read as `resume` too.
        is_required: whether one must be named.
    """
    group, add = parser.add_mutually_exclusive_group(required=is_required), parser.add_argument
    group.add_argument('--resume', metavar='FILE', help='checkpoint of the network')
    if stored:

        def file_of(name: str) -> str:
            if name not in stored:
                raise argparse.ArgumentTypeError(f'no weights {name}: write one of {", ".join(stored)}')
            return str(stored[name])

        names = ', '.join(stored)
        group.add_argument(
            '--weights', dest='resume', type=file_of, metavar='NAME', help=f"the project's own weights: {names}"
        )
    add('--cfg', metavar='FILE', help="YAML config whose keys override the checkpoint's")
    add('--opts', nargs='+', action='extend', default=[], metavar='KEY VALUE', help='config keys and values')
    add_weights_flags(parser)


def add_weights_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--raw` and `--ema`, read as `choice`, for `choose_weights`."""
    group = parser.add_mutually_exclusive_group()
    add = group.add_argument
    add('--raw', dest='choice', action='store_const', const='raw', default='', help='take the raw weights')
    add(
        '--ema',
        dest='choice',
        action='store_const',
        const='ema',
        help='take the EMA weights (default: the better)',
    )


def load_predictor(
    args: argparse.Namespace,
    tree: ConfigTree,
    build: Callable[[CfgNode], nn.Module],
    first_label: int,
    checkpoint: dict[str, Any] | None = None,
) -> Predictor:
    """Load the network that the command line names; say on stderr which of its weights.

    Args:
        args: from a parser with `add_network_flags`.
        tree: the task's keys.
        build: builds the task's network from the config.
        first_label: names classes where the checkpoint has no names: by number from here on.
        checkpoint: content of `--resume`; None reads it.

    Raises:
        UserError: a config or checkpoint that cannot be used.
    """
    if checkpoint is None:
        checkpoint = load_checkpoint(args.resume)
    saved = checkpoint.get('config')
    if args.cfg is None and not saved:
        raise CheckpointError(f'{args.resume} has no config: give the one of its network with --cfg')
    config = tree.load(args.cfg, args.opts, saved)
    device = choose_device(config.DEVICE, local_rank=config.LOCAL_RANK)
    model = build(config).to(device)
    weights, description = choose_weights(checkpoint, args.resume, args.choice)
    weights, notes = fit_weights(model, weights, args.resume)
    load_weights(model, {'model': weights}, args.resume)
    for note in (description, *notes):
        print(f'{args.resume}: {note}', file=sys.stderr)
    numbers = range(first_label, first_label + config.MODEL.NUM_CLASSES)
    class_names = checkpoint.get('classes') or [str(number) for number in numbers]
    return Predictor(config, model.eval(), class_names, device)
