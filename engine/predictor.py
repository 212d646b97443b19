"""Load a trained network of any task for inference, from command-line flags."""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from yacs.config import CfgNode

from engine.checkpoint import CheckpointError, load_checkpoint, other_task
from engine.config_tree import add_options
from engine.distributed import choose_device
from engine.task import Task
from engine.weights import check_same_network, choose_weights, fit_weights, load_weights
from utils import available_cores, first_line, home_path, non_negative_int, positive_int, printable


class Predictor(NamedTuple):
    """A trained network, ready for inference."""

    config: CfgNode
    model: nn.Module
    class_names: list[str]
    device: torch.device


def prediction_parser(
    prog: str,
    description: str,
    epilog: str | None = None,
    stored: Mapping[str, Path] | None = None,
    backends: Sequence[str] = (),
    needs_images: bool = True,
) -> argparse.ArgumentParser:
    """A parser of images and of a trained network; read it with `parse_intermixed_args`.

    Args:
        prog: how the program is called: `python -m tools.predict`.
        description: of the program.
        epilog: examples, kept as they are written.
        stored: see `add_network_flags`.
        backends: see `add_network_flags`.
        needs_images: whether images must be named.
    """
    parser = argparse.ArgumentParser(
        prog, description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    images = 'files, folders, quoted patterns such as "photos/**/*.jpg", or - for a list of them on standard input'
    add('images', nargs='+' if needs_images else '*', type=home_path, metavar='IMAGES', help=images)
    add_network_flags(parser, stored, backends=backends)
    add('--limit', type=positive_int, metavar='N', help='use only N images, chosen at random but always the same')
    workers = min(available_cores(), 4)
    add(
        '--workers',
        type=non_negative_int,
        default=workers,
        metavar='N',
        help='DataLoader workers (default: one per core, at most 4)',
    )
    return parser


def add_network_flags(
    parser: argparse.ArgumentParser,
    stored: Mapping[str, Path] | None = None,
    is_required: bool = True,
    backends: Sequence[str] = (),
) -> None:
    """Add the flags that name a trained network, for `load_predictor`.

    Args:
        parser: gets the flags.
        stored: files of weights that are part of the project, by name; read as `resume` too.
        is_required: whether one must be named.
        backends: names of what runs exported files, for programs that take such a file in place of a checkpoint.
    """
    group, add = parser.add_mutually_exclusive_group(required=is_required), parser.add_argument
    group.add_argument('--resume', type=os.path.expanduser, metavar='FILE', help='checkpoint of the trained network')
    parser.set_defaults(stored=tuple(map(str, (stored or {}).values())))
    if stored:

        def file_of(name: str) -> str:
            if name not in stored:
                raise argparse.ArgumentTypeError(
                    f'no weights {name}: write one of {", ".join(stored)}, or --resume for a file'
                )
            return str(stored[name])

        names = ', '.join(stored)
        group.add_argument(
            '--weights',
            dest='resume',
            type=file_of,
            metavar='NAME',
            help=f'pretrained weights that come with the project: {names}',
        )
    if backends:
        group.add_argument(
            '--backend',
            nargs=2,
            metavar=('NAME', 'FILE'),
            help=f'in place of a checkpoint: a file of tools.export, and what runs it, {" or ".join(backends)}',
        )
    add('--cfg', metavar='FILE', help="YAML config whose keys override the checkpoint's")
    add_options(parser, "config keys and values that override the checkpoint's, such as DATA.EXIF True")
    add_weights_flag(parser)


def add_weights_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--pretrained-weights`, for `choose_weights`."""
    parser.add_argument(
        '--pretrained-weights',
        choices=('auto', 'raw', 'ema'),
        default='auto',
        help='weights to take; auto: the EMA weights unless the raw ones scored higher',
    )


def upright_images(saved: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Turn on `DATA.EXIF` in a checkpoint's config, unless it states the key.

    For weights that no run has evaluated with another setting: the project's pretrained weights, and random ones.
    Photographs are often upright only after their EXIF orientation is applied.
    """
    saved = dict(saved or {})
    return saved | {'DATA': {'EXIF': True} | dict(saved.get('DATA') or {})}


def network_args(
    path: str | Path, opts: Sequence[Any] = (), weights: str = 'auto', cfg: str | None = None
) -> argparse.Namespace:
    """The arguments of `load_predictor` for a checkpoint, without a command line.

    Args:
        path: the checkpoint; a leading ~ is expanded.
        opts: config keys and values.
        weights: auto, raw or ema.
        cfg: a config file.
    """
    return argparse.Namespace(
        resume=os.path.expanduser(path), cfg=cfg, opts=list(opts), stored=(), pretrained_weights=weights
    )


def load_predictor(
    args: argparse.Namespace,
    task: Task,
    build_network: Callable[[CfgNode], nn.Module] | None = None,
    checkpoint: dict[str, Any] | None = None,
    log: Callable[[str], None] | None = None,
) -> Predictor:
    """Load the trained network that the command line names, and log which weights are used.

    The config is the checkpoint's, in which `--cfg` and `--opts` override keys. Of the keys of the network, only image
    size and window size may change, to which weights are fitted. With another `MANIP_TYPE`, for example, the weights
    would still load, but the network would compute something else.

    Args:
        args: from a parser with `add_network_flags`, or `network_args`.
        task: the task of the network.
        build_network: builds the network from the config; None for `Task.build_network`.
        checkpoint: content of `--resume`; None reads it.
        log: gets the notes; None writes them to stderr.

    Raises:
        UserError: the config or the checkpoint cannot be used, the checkpoint is of another task, or it was trained
            with a different network from the config's.
    """
    if checkpoint is None:
        checkpoint = load_checkpoint(args.resume)
    if checkpoint['task'] != task.name:
        raise other_task(checkpoint, args.resume, task.name)
    saved = checkpoint.get('config')
    if args.cfg is None and not saved:
        raise CheckpointError(f'{args.resume} has no config: give the one of its network with --cfg')
    if args.resume in args.stored:
        saved = upright_images(saved)
    config = task.tree.load(args.cfg, args.opts, saved)
    check_same_network(config, checkpoint, args.resume, task.tree)
    device = choose_device(config.DEVICE, local_rank=config.LOCAL_RANK)
    weights, description = choose_weights(checkpoint, args.resume, args.pretrained_weights)
    _check_size(task, config, weights, args.resume)
    try:
        model = (build_network or task.build_network)(config)
    except (RuntimeError, TypeError, OverflowError, MemoryError) as error:  # sizes that no computer can hold
        raise CheckpointError(f'the network of {args.resume} cannot be built: {first_line(error)}') from error
    model = model.to(device)
    weights, notes = fit_weights(model, weights, args.resume)
    load_weights(model, {'model': weights}, args.resume)
    notes += [f'ignored, as they are not what a run writes: {", ".join(x)}' for x in [checkpoint.get('ignored')] if x]
    for note in (description, *notes):
        (log or _print_to_stderr)(printable(f'{args.resume}: {note}'))
    numbers = range(task.first_label, task.first_label + config.MODEL.NUM_CLASSES)
    class_names = list(checkpoint.get('classes') or [str(number) for number in numbers]) if numbers else []
    if len(class_names) != len(numbers):
        raise CheckpointError(
            f'{args.resume} has names of {len(class_names)} classes, but a network of {len(numbers)}: '
            f'take the checkpoint as its run wrote it'
        )
    return Predictor(config, model.eval(), class_names, device)


def _print_to_stderr(note: str) -> None:
    print(note, file=sys.stderr)


def _check_size(task: Task, config: CfgNode, weights: Mapping[str, torch.Tensor], path: str) -> None:
    """Check that a network is about as large as the weights for it, before memory is taken for it.

    Raises:
        CheckpointError: it is much larger.
    """
    try:
        with torch.device('meta'):
            parameters = sum(parameter.numel() for parameter in task.build_network(config).parameters())
    except Exception:  # such as networks of timm that compute values when they are built; its own errors come later
        return
    loaded = sum(value.numel() for value in weights.values())
    if parameters > 2 * loaded + 10_000_000:
        raise CheckpointError(
            f'{path} holds {loaded:,} weights, and the network of its config has {parameters:,}: '
            f'take the checkpoint as its run wrote it'
        )
