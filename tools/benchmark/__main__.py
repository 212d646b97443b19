"""Time networks, interleaved in one process, with a plain matmul as reference.

    python -m tools.benchmark configs/msg_tiny_p4_win7_224.yaml swin_tiny_patch4_window7_224
    python -m tools.benchmark configs/msg_tiny_p4_win7_224.yaml --best --batches 8

The last network is the peer that the others are compared with. A network of timm whose fused attention is off by
default is measured in both forms, and counts with the faster. Writes a Markdown table, JSON and a chart.
"""

import argparse
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from engine.config_tree import ConfigError
from engine.distributed import choose_device
from tools.benchmark.cases import (
    COMPILE_MODES,
    MODES,
    PRECISIONS,
    Setting,
    build_network,
    image_channels,
    short_name,
    unavailable,
    with_fused_attention,
)
from tools.benchmark.chart import draw
from tools.benchmark.report import compare_fastest, variants_table, write
from tools.benchmark.timing import Result, compare, find_fastest, network_name
from utils import exit_on_user_error, positive_int, report_write_errors


def parse_option(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        'python -m tools.benchmark', description=__doc__.splitlines()[0], allow_abbrev=False
    )
    add = parser.add_argument
    add('networks', nargs='+', metavar='NETWORK', help='config files, or names in timm or torchvision (timm:NAME)')
    add('--modes', nargs='+', choices=MODES, default=['inference'], help='train: forward, loss, backward, update')
    add('--precisions', nargs='+', choices=PRECISIONS, default=['fp32'], help='bf16 and fp16 are autocast')
    add('--compile', nargs='+', choices=COMPILE_MODES, default=['eager', 'compiled'], help='graphs: with CUDA graphs')
    add('--batches', nargs='+', type=positive_int, default=[8], metavar='N', help='images per run; 1 is latency (8)')
    add('--sizes', nargs='+', type=positive_int, default=[224], metavar='N', help='image size, in pixels (224)')
    add('--threads', nargs='+', type=positive_int, default=[0], metavar='N', help='of the CPU (as PyTorch chooses)')
    add('--rounds', type=positive_int, default=20, metavar='N', help='how often each is timed (20)')
    add('--device', choices=['auto', 'cuda', 'mps', 'cpu'], default='auto', help='auto: a GPU if there is one')
    add('--best', action='store_true', help='find the fastest way to run inference of one network; prints only')
    add('--max-error', type=float, default=0.02, metavar='X', help='for --best, relative to fp32 logits (0.02)')
    add('--output', type=Path, metavar='NAME', help='writes NAME.md, NAME.json and NAME.png (output/benchmark)')
    args = parser.parse_args(argv)
    if args.best and len(args.networks) > 1:
        parser.error('--best is for one network')
    changed = [
        name for name in ('modes', 'precisions', 'compile', 'output') if getattr(args, name) != parser.get_default(name)
    ]
    if args.best and (changed or len(args.batches) > 1 or len(args.sizes) > 1 or len(args.threads) > 1):
        parser.error('--best tries every precision and compile mode of inference, and prints: give a batch and a size')
    return args


def main() -> None:
    """Measure, print, write."""
    args = parse_option()
    torch.manual_seed(0)
    with exit_on_user_error():
        device = choose_device(args.device)
        if not args.best:
            args.networks = with_fused_attention(args.networks)
        settings = check_all(args, device)
        if args.best:
            fastest, variants = find_fastest(args.networks[0], settings[0], args.max_error, args.rounds, device)
            print(f'{variants_table(variants)}\nfastest with an error of at most {args.max_error:g}: {fastest}')
        else:
            measure(args, settings, device)


def check_all(args: argparse.Namespace, device: torch.device) -> list[Setting]:
    """The settings to measure, after running every network once.

    Raises:
        ConfigError: a network or setting that cannot be measured.
    """
    if len({short_name(name) for name in args.networks}) < len(args.networks):
        raise ConfigError('two of the networks have the same name: rename a config file')
    settings = []
    for mode, precision, threads, batch, size, compile_mode in product(
        args.modes, args.precisions, args.threads, args.batches, args.sizes, args.compile
    ):
        setting = Setting(mode, precision, compile_mode, batch, size, threads)
        if reason := unavailable(setting, device):
            print(f'{setting}: not run: {reason}')
        else:
            settings.append(setting)
    if not settings:
        raise ConfigError('nothing can be run here: write other --precisions, --modes or --compile')
    for name, mode, batch, size in product(args.networks, args.modes, args.batches, args.sizes):
        check(name, Setting(mode, batch=batch, size=size), device)
    return settings


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


def measure(args: argparse.Namespace, settings: Sequence[Setting], device: torch.device) -> None:
    """Measure the networks under all settings, and write after each group of them."""
    output = args.output or Path('output') / 'benchmark'
    with report_write_errors(output.parent):
        output.parent.mkdir(parents=True, exist_ok=True)
        write([], [], output, device)
    results: list[Result] = []
    summary, text = [], ''
    for group in compare(args.networks, settings, args.rounds, device):
        results += group
        if len({network_name(name) for name in args.networks}) > 1:
            summary.append(compare_fastest(group))
        with report_write_errors(output.parent):  # after each group, since the next may fail
            text = write(results, summary, output, device)
            draw(results, Path(f'{output}.png'))
    print(f'{text}\nwrote {output}.md, {output}.json, {output}.png')


if __name__ == '__main__':
    main()
