"""Time networks in turns in one process: ours, timm's and torchvision's, beside a plain product of matrices.

python -m tools.benchmark configs/msg_tiny_p4_win7_224.yaml swin_tiny_patch4_window7_224
python -m tools.benchmark configs/msg_tiny_p4_win7_224.yaml --best --batches 8

The last network is the peer the others are compared with. Writes a Markdown table, the figures as JSON, and a chart.
"""

import argparse
import copy
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torchvision
from torch import Tensor, nn

from config import ConfigError, load_config
from launcher import choose_device
from models import build_model
from timing import COMPILES, MODES, PRECISIONS, Product, Setting, Spread, Task, image_channels, in_turns, unavailable
from tools.arguments import positive
from tools.benchmark_chart import draw
from utils import environment, mistakes_in_one_line, writing_in


class Result(NamedTuple):
    """What was measured of one network under one setting.

    Attributes:
        network: its name.
        setting: how it was run.
        times: seconds a run, in each round.
        peer_times: the peer's under the same setting, in the same rounds; None where there is no peer.
        product_times: of a plain product of as many multiply-adds, in the same rounds.
        memory: most bytes at any time.
        multiply_adds: of a run, over the real operators.
    """

    network: str
    setting: Setting
    times: list[float]
    peer_times: list[float] | None
    product_times: list[float]
    memory: int
    multiply_adds: int

    @property
    def seconds(self) -> Spread:
        """Seconds a run."""
        return Spread.of(self.times)

    @property
    def ratio(self) -> Spread | None:
        """The peer's time over this one's, within a round."""
        return self.peer_times and ratio(self.peer_times, self.times)

    @property
    def limit(self) -> Spread:
        """The product's time over this one's, within a round."""
        return ratio(self.product_times, self.times)

    def record(self) -> dict[str, Any]:
        """The result as plain data."""
        spreads = {'seconds': self.seconds, 'ratio': self.ratio, 'limit': self.limit}
        told = {name: spread and spread._asdict() for name, spread in spreads.items()}
        counts = {'memory': self.memory, 'multiply_adds': self.multiply_adds}
        return {'network': self.network, 'setting': self.setting._asdict()} | told | counts


def ratio(times: Sequence[float], others: Sequence[float]) -> Spread:
    """Of times over others of the same rounds."""
    return Spread.of([a / b for a, b in zip(times, others, strict=True)])


def build_network(name: str, size: int) -> nn.Module:
    """A network with random weights, for images of this side, from a config file or by timm's or torchvision's name.

    Raises:
        ConfigError: nobody knows the name.
    """
    if name.endswith(('.yaml', '.yml')):
        return build_model(load_config(name, ['DATA.IMG_SIZE', str(size)]))
    library, _, plain = name.rpartition(':')
    if library in ('', 'timm') and timm.is_model(plain):
        try:
            return timm.create_model(plain, img_size=size)
        except TypeError:  # a convolutional one, which takes any size
            return timm.create_model(plain)
    if library in ('', 'torchvision') and plain in torchvision.models.list_models(torchvision.models):
        return torchvision.models.get_model(plain)
    raise ConfigError(f'no network {name!r}: give a config file, or a name that timm or torchvision lists')


def short(name: str) -> str:
    """A network's name in tables."""
    return Path(name).stem if name.endswith(('.yaml', '.yml')) else name


def compare(
    names: Sequence[str], settings: Sequence[Setting], rounds: int, device: torch.device
) -> Iterator[list[Result]]:
    """Measure all networks under settings that differ in `compile` alone, together; then under the next ones.

    Yields:
        The results of settings that were measured together, network by network.
    """
    groups: dict[Setting, list[Setting]] = {}
    for setting in settings:
        groups.setdefault(setting._replace(compile=''), []).append(setting)
    for group in groups.values():
        tasks = {
            (short(name), setting): Task(build_network(name, setting.size), setting, device)
            for name, setting in product(names, group)
        }
        for (name, setting), task in tasks.items():
            _progress(f'{name}: {_in_words(setting)}: first runs')
            task.warm_up()
        one_of_each = {name: task for (name, _), task in tasks.items()}  # however it is compiled
        counts = {name: task.multiply_adds() for name, task in one_of_each.items()}
        products = {name: Product(group[0].precision, device, count) for name, count in counts.items()}
        for plain in products.values():
            plain()
        _progress(f'{_in_words(group[0])}: {rounds} rounds')
        times = in_turns({**tasks, **products}, rounds, device)
        yield [
            Result(
                network=name,
                setting=setting,
                times=times[name, setting],
                peer_times=times[short(names[-1]), setting] if len(names) > 1 else None,
                product_times=[seconds * counts[name] / products[name].multiply_adds for seconds in times[name]],
                memory=task.peak_memory(),
                multiply_adds=counts[name],
            )
            for (name, setting), task in tasks.items()
        ]


def find_best(
    name: str, setting: Setting, max_error: float, rounds: int, device: torch.device
) -> tuple[str | None, list[tuple[str, Spread, float]]]:
    """Find the fastest way to run inference of a network on a device.

    Args:
        name: of the network, as for `build_network`.
        setting: batch and size.
        max_error: largest norm of the difference from fp32's logits, over their norm.
        rounds: how often each way is timed.
        device: that it runs on.

    Returns:
        The fastest way within the error, and of every way its seconds and its error.
    """
    network = build_network(name, setting.size)
    reference = Task(copy.deepcopy(network), setting, device)
    exact = reference()
    ways: dict[str, Callable[[], Tensor]] = {}
    for precision, how in product(PRECISIONS, COMPILES):
        way = setting._replace(precision=precision, compile=how)
        if unavailable(way, device):
            continue
        task = ways[f'{precision}, {how}'] = Task(copy.deepcopy(network), way, device)
        task.images = reference.images
        _progress(f'{precision}, {how}: first runs')
        task.warm_up()
    if device.type == 'cpu':
        task = ways['int8 linears, eager'] = Task(_in_int8(network), setting, device)
        task.images = reference.images
    errors = {way: ((task().float() - exact).norm() / exact.norm()).item() for way, task in ways.items()}
    times = in_turns(ways, rounds, device)
    found = sorted(((way, Spread.of(times[way]), errors[way]) for way in ways), key=lambda way: way[1].median)
    return next((way for way, _, error in found if error <= max_error), None), found


def _in_int8(network: nn.Module) -> nn.Module:
    """A copy whose linears multiply in int8: weights rounded per channel once, activations per tensor as they come."""
    from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # PyTorch moves this to torchao, whose int8 is slower than fp32 on CPUs
        return quantize_dynamic(copy.deepcopy(network).eval(), {nn.Linear: per_channel_dynamic_qconfig})


def table(results: Sequence[Result]) -> str:
    """Results as a Markdown table."""
    lines = [
        '| network | run | ms (quartiles) | images/s | x peer | of the product limit | memory, MB | multiply-adds |',
        '|---|---|---|---|---|---|---|---|',
    ]
    for r in results:
        ms = [1e3 * value for value in r.seconds]
        ratio = f'{r.ratio.median:.2f} ({r.ratio.low:.2f} to {r.ratio.high:.2f})' if r.ratio else ''
        lines.append(
            f'| {r.network} | {_in_words(r.setting)} | {ms[0]:.1f} ({ms[1]:.1f} to {ms[2]:.1f}) | '
            f'{r.setting.batch / r.seconds.median:.1f} | {ratio} | {100 * r.limit.median:.0f} % | '
            f'{r.memory / 2**20:.0f} | {r.multiply_adds / 1e9:.2f}G |'
        )
    return '\n'.join(lines)


def best_of_each(results: Sequence[Result]) -> str:
    """Of results measured together: every network's fastest way to run, against the peer's fastest; one line each."""
    fastest: dict[str, Result] = {}
    for r in results:
        if r.network not in fastest or r.seconds.median < fastest[r.network].seconds.median:
            fastest[r.network] = r
    *others, peer = fastest.values()
    lines = []
    for r in others:
        of = ratio(peer.times, r.times)
        lines.append(
            f'{_in_words(r.setting._replace(compile="fastest of each"))}: {r.network} {r.setting.compile}, '
            f'{peer.network} {peer.setting.compile}: {of.median:.2f} ({of.low:.2f} to {of.high:.2f}) x'
        )
    return '\n'.join(lines)


def _in_words(setting: Setting) -> str:
    return f'{setting.mode}, {setting.precision}, {setting.compile}, batch {setting.batch}, {setting.size} px'


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse_option(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add('networks', nargs='+', metavar='NETWORK', help='config files, or names of timm or torchvision (timm:NAME)')
    add('--modes', nargs='+', choices=MODES, default=['inference'], help='train: forward, loss, backward, update')
    add('--precisions', nargs='+', choices=PRECISIONS, default=['fp32'], help='bf16 and fp16 are autocast')
    add('--compile', nargs='+', choices=COMPILES, default=['eager', 'compiled'], help='graphs: with CUDA graphs')
    add('--batches', nargs='+', type=positive, default=[8], metavar='N', help='images a run; 1 gives latency (8)')
    add('--sizes', nargs='+', type=positive, default=[224], metavar='N', help='side of the images, in pixels (224)')
    add('--rounds', type=positive, default=20, metavar='N', help='how often each is timed (20)')
    add('--device', choices=['auto', 'cuda', 'mps', 'cpu'], default='auto', help='auto takes a GPU if there is one')
    add('--best', action='store_true', help='find the fastest way to run inference of the one network; prints only')
    add('--max-error', type=float, default=0.02, metavar='X', help='of --best, relative to fp32 logits (0.02)')
    add('--output', type=Path, metavar='NAME', help='writes NAME.md, NAME.json and NAME.png (output/benchmark)')
    args = parser.parse_args(argv)
    if args.best and len(args.networks) > 1:
        parser.error('--best is of one network')
    finds = [
        name for name in ('modes', 'precisions', 'compile', 'output') if getattr(args, name) != parser.get_default(name)
    ]
    if args.best and (finds or len(args.batches) > 1 or len(args.sizes) > 1):
        parser.error('--best tries every precision and compilation of inference, and prints: give a batch and a size')
    return args


def main() -> None:
    """Measure, print, write."""
    args = parse_option()
    torch.manual_seed(0)
    with mistakes_in_one_line():
        measure(args)


def measure(args: argparse.Namespace) -> None:
    """Do what the command line says.

    Raises:
        ConfigError: a network or a setting that cannot be measured; before any is.
    """
    device = choose_device(args.device, None, 0)
    if len({short(name) for name in args.networks}) < len(args.networks):
        raise ConfigError('two of the networks have the same name: rename a config file')
    settings = []
    for values in product(args.modes, args.precisions, args.batches, args.sizes, args.compile):
        mode, precision, batch, size, how = values
        setting = Setting(mode, precision, how, batch, size)
        reason = unavailable(setting, device)
        if reason:
            print(f'{_in_words(setting)}: not run: {reason}')
        else:
            settings.append(setting)
    if not settings:
        raise ConfigError('nothing of this can be run here: write other --precisions, --modes or --compile')
    for name, mode, batch, size in product(args.networks, args.modes, args.batches, args.sizes):
        check(name, Setting(mode, batch=batch, size=size), device)
    if args.best:
        print_best(args.networks[0], settings[0], args.max_error, args.rounds, device)
        return
    output = args.output or Path('output') / 'benchmark'
    with writing_in(output.parent):
        output.parent.mkdir(parents=True, exist_ok=True)
        write([], [], output, device)
    results, lines = [], []
    for group in compare(args.networks, settings, args.rounds, device):
        results += group
        if len(args.networks) > 1:
            lines.append(best_of_each(group))
        with writing_in(output.parent):  # after each group, since the next may not come to its end
            text = write(results, lines, output, device)
            draw(results, Path(f'{output}.png'))
    print(f'{text}\nwrote {output}.md, {output}.json, {output}.png')


def check(name: str, setting: Setting, device: torch.device) -> None:
    """Run a network once on the device, without gradients, to see whether it can be measured.

    Raises:
        ConfigError: it cannot.
    """
    network = build_network(name, setting.size).to(device).train(setting.mode == 'train')
    shape = setting.batch, image_channels(network), setting.size, setting.size
    where = f'{name} cannot be measured ({setting.mode}, batch {setting.batch}, {setting.size} px)'
    try:
        with torch.no_grad():
            logits = network(torch.zeros(shape, device=device))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(f'{where}: {" ".join(str(error).split())}') from error
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ConfigError(f'{where}: it gives no logits (batch, classes)')


def print_best(name: str, setting: Setting, max_error: float, rounds: int, device: torch.device) -> None:
    """Print what `find_best` finds, as a Markdown table."""
    best, found = find_best(name, setting, max_error, rounds, device)
    print('| way | ms (quartiles) | error |\n|---|---|---|')
    for way, seconds, error in found:
        median, low, high = (1e3 * value for value in seconds)
        print(f'| {way} | {median:.1f} ({low:.1f} to {high:.1f}) | {error:.2g} |')
    print(f'fastest with an error of at most {max_error:g}: {best}')


def write(results: Sequence[Result], lines: Sequence[str], output: Path, device: torch.device) -> str:
    """Write the results, as a Markdown table with lines below it and as JSON; gives the Markdown."""
    where = environment(device)
    text = '\n\n'.join([table(results), '\n'.join(lines), ' | '.join(f'{k} {v}' for k, v in where.items())]) + '\n'
    Path(f'{output}.md').write_text(text)
    records = {'environment': where, 'results': [result.record() for result in results]}
    Path(f'{output}.json').write_text(json.dumps(records, indent=1) + '\n')
    return text


if __name__ == '__main__':
    main()
