"""Time classifiers with random weights, interleaved in one process.

The last network is the peer that the others are compared with, in its fastest form and as its library makes it ("out of
the box"). A network of timm whose fused attention is off by default is measured in both forms. Where the linear layers
of this project's networks are computed by oneDNN, so are those of the other networks, in a further form, "+onednn". The
word "networks" may be left out.
"""

import argparse
from itertools import product

import torch
from torch import Tensor

from engine.config_tree import ConfigError
from engine.distributed import choose_device
from tools.benchmark.best import find_fastest, variants_table
from tools.benchmark.cases import COMPILE_MODES, MODES, PRECISIONS, Setting, add_timing_flags
from tools.benchmark.classifiers import ClassifierCase, build_network, image_channels, with_other_forms
from tools.benchmark.comparison import available_settings, compare, require_distinct_names
from tools.benchmark.report import write_groups
from utils import positive_int


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `networks`."""
    add = parser.add_argument
    add('networks', nargs='+', metavar='NETWORK', help='config file, or name in timm or torchvision (timm:NAME)')
    add(
        '--modes',
        nargs='+',
        choices=MODES,
        default=['inference'],
        help='train is a training step: loss, backward, clipping and AdamW (default: inference)',
    )
    add(
        '--precisions',
        nargs='+',
        choices=PRECISIONS,
        default=['fp32'],
        help='bf16 and fp16 are autocast; bf16-weights converts weights and images once (default: fp32)',
    )
    add(
        '--compile',
        nargs='+',
        choices=COMPILE_MODES,
        default=['eager', 'compiled'],
        help='graphs adds CUDA graphs to torch.compile, freezing makes the weights constants (default: eager compiled)',
    )
    add('--batches', nargs='+', type=positive_int, default=[8], metavar='N', help='images per batch (default: 8)')
    add('--sizes', nargs='+', type=positive_int, default=[224], metavar='N', help='image size in pixels (default: 224)')
    add_timing_flags(parser, rounds=20)
    add(
        '--best',
        action='store_true',
        help='find the fastest precision and compile mode for inference of one network, and print the comparison',
    )
    add(
        '--max-error',
        type=float,
        default=0.02,
        metavar='X',
        help='with --best, the largest relative error of the logits against fp32 (default: 0.02)',
    )


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Stop where flags exclude each other."""
    if not args.best:
        return
    if len(args.networks) > 1:
        parser.error('--best is for one network')
    flags = ('modes', 'precisions', 'compile', 'output')
    unused = [name for name in flags if getattr(args, name) != parser.get_default(name)]
    if unused or max(len(args.batches), len(args.sizes), len(args.threads)) > 1:
        parser.error('--best tries every precision and compile mode of inference, and prints: give one batch and size')


def run(args: argparse.Namespace) -> None:
    """Measure the networks that the command line names."""
    device = choose_device(args.device)
    if args.best:
        print_fastest(args, device)
        return
    names = with_other_forms(args.networks)
    require_distinct_names(names)
    settings = [
        Setting(mode, precision, compile_mode, batch, size, threads)
        for mode, precision, threads, batch, size, compile_mode in product(
            args.modes, args.precisions, args.threads, args.batches, args.sizes, args.compile
        )
    ]
    settings = available_settings(settings, device)
    for name, mode, batch, size in product(names, args.modes, args.batches, args.sizes):
        check(name, Setting(mode, batch=batch, size=size), device)

    def build_case(name: str, setting: Setting) -> ClassifierCase:
        return ClassifierCase(build_network(name, setting.size), setting, device)

    write_groups(compare(names, settings, build_case, args.rounds, device), args.output, device)


def print_fastest(args: argparse.Namespace, device: torch.device) -> None:
    """Print the fastest way to run inference of the network that the command line names."""
    (name,), (batch,), (size,), (threads,) = args.networks, args.batches, args.sizes, args.threads
    setting = Setting(batch=batch, size=size)
    check(name, setting, device)
    if threads:
        torch.set_num_threads(threads)
    fastest, variants = find_fastest(build_network(name, size), setting, args.max_error, args.rounds, device)
    print(f'{variants_table(variants)}\nfastest with an error of at most {args.max_error:g}: {fastest}')


def check(name: str, setting: Setting, device: torch.device) -> None:
    """Run a network once, without gradients, to see whether it can be measured.

    Raises:
        ConfigError: it cannot.
    """
    network = build_network(name, setting.size).to(device).train(setting.mode == 'train')
    shape = (setting.batch, image_channels(network), setting.size, setting.size)
    label = f'{name} cannot be measured ({setting.mode}, batch {setting.batch}, {setting.size} px)'
    try:
        with torch.no_grad():
            logits = network(torch.zeros(shape, device=device))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(f'{label}: {" ".join(str(error).split())}') from error
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ConfigError(f'{label}: its output is not a (batch, classes) tensor of logits')
