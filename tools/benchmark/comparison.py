"""Comparison of networks: all of them interleaved, with a peer and a plain matmul as references."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from engine.config_tree import ConfigError
from tools.benchmark.cases import BenchmarkCase, Setting, unavailable
from tools.benchmark.matmul import MatmulReference, Peak, measure_peak
from tools.benchmark.timing import Quartiles, time_interleaved

# After the name of a network that is not ours: with fused attention, where timm's default is not to use it; with linear
# layers by oneDNN, as ours have them on some processors (see models/linear.py)
FUSED, ONEDNN_LINEAR = FORMS = ('+fused', '+onednn')

BuildCase = Callable[[str, Setting], BenchmarkCase]


class Result(NamedTuple):
    """Measurements of one case: a network, or a pipeline of the loader, under one setting.

    Attributes:
        name: of the case.
        setting: how it was run.
        times: seconds per call, in each round.
        images: images per call.
        pixels: of the images of a call, where results differ in them.
        peer_times: times of the peer's fastest form under the same setting, in the same rounds; None without a peer.
        default_peer_times: the same of the peer as its library makes it, where it has other forms too.
        matmul_times: seconds of a plain matmul of as many multiply-adds, in the same rounds; None where they are not
            counted.
        peak: rates of plain matmuls when the measurement began.
        memory: peak bytes, if measured.
        multiply_adds: multiply-adds of a call over the real operators, if counted.
    """

    name: str
    setting: Setting | str
    times: list[float]
    images: int = 1
    pixels: int | None = None
    peer_times: list[float] | None = None
    default_peer_times: list[float] | None = None
    matmul_times: list[float] | None = None
    peak: Peak | None = None
    memory: int | None = None
    multiply_adds: int | None = None

    @property
    def seconds(self) -> Quartiles:
        """Seconds per call."""
        return Quartiles.from_values(self.times)

    @property
    def speedup(self) -> Quartiles | None:
        """The peer's time divided by this one's, within a round."""
        return self.peer_times and Quartiles.of_ratios(self.peer_times, self.times)

    @property
    def default_speedup(self) -> Quartiles | None:
        """The default peer's time divided by this one's, within a round."""
        return self.default_peer_times and Quartiles.of_ratios(self.default_peer_times, self.times)

    @property
    def matmul_fraction(self) -> Quartiles | None:
        """The matmul's time divided by this one's, within a round: the fraction of the matmul peak."""
        return self.matmul_times and Quartiles.of_ratios(self.matmul_times, self.times)

    def as_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        setting = self.setting if isinstance(self.setting, str) else self.setting._asdict()
        entry: dict[str, Any] = {'name': self.name, 'setting': setting, 'images': self.images}
        quartiles = {
            'seconds': self.seconds,
            'speedup': self.speedup,
            'default_speedup': self.default_speedup,
            'matmul_fraction': self.matmul_fraction,
        }
        entry |= {name: value._asdict() for name, value in quartiles.items() if value is not None}
        others = {
            'matmul_rates': self.peak and self.peak.rates,
            'memory': self.memory,
            'multiply_adds': self.multiply_adds,
        }
        return entry | {name: value for name, value in others.items() if value is not None}


def short_name(name: str) -> str:
    """A network's name in tables: without the folder and suffix of a config file."""
    return Path(name).stem if is_config(name) else name


def is_config(name: str) -> bool:
    """Whether a network's name is the path of a config file."""
    return name.endswith(('.yaml', '.yml'))


def without_form(name: str) -> str:
    """A network's name in any of its forms."""
    return name.removesuffix(ONEDNN_LINEAR).removesuffix(FUSED)


def require_distinct_names(names: Sequence[str]) -> None:
    """Check that tables can tell networks apart.

    Raises:
        ConfigError: two have the same name.
    """
    if len({short_name(name) for name in names}) < len(names):
        raise ConfigError('two of the networks have the same name: rename a config file')


def available_settings(settings: Sequence[Setting], device: torch.device) -> list[Setting]:
    """The settings that a device can run; prints why it cannot run the others.

    Raises:
        ConfigError: it can run none.
    """
    available = []
    for setting in settings:
        if reason := unavailable(setting, device):
            print(f'{setting}: not run: {reason}')
        else:
            available.append(setting)
    if not available:
        raise ConfigError('nothing can be run here: write other --precisions, --modes or --compile')
    return available


def compare(
    names: Sequence[str], settings: Sequence[Setting], build_case: BuildCase, rounds: int, device: torch.device
) -> Iterator[list[Result]]:
    """Measure all networks, interleaved, under settings that differ in `compile_mode` only; then under the next ones.

    Args:
        names: networks to compare; the last one is the peer; its other forms may come before it.
        settings: how to run them.
        build_case: builds the case of a network under a setting.
        rounds: how often each is timed.
        device: device to run on.

    Yields:
        The results of settings that were measured together.
    """
    groups: dict[Setting, list[Setting]] = {}
    for setting in settings:
        groups.setdefault(setting._replace(compile_mode=''), []).append(setting)
    threads = torch.get_num_threads()
    for group in groups.values():
        torch.set_num_threads(group[0].threads or threads)
        cases = {(name, setting): build_case(name, setting) for name, setting in product(names, group)}
        for (name, setting), case in cases.items():
            show_progress(f'{short_name(name)}: {setting}: warm-up')
            case.warm_up()
        show_progress(f'{group[0]}: {rounds} rounds')
        yield _measure_together(names, cases, rounds, device)
    torch.set_num_threads(threads)


def _measure_together(
    names: Sequence[str], cases: Mapping[tuple[str, Setting], BenchmarkCase], rounds: int, device: torch.device
) -> list[Result]:
    """Results of cases, by network and setting, interleaved with a matmul for each network."""
    case_of_network = {name: case for (name, _), case in cases.items()}  # in any compile mode
    counts = {name: case.multiply_adds() for name, case in case_of_network.items()}
    counted = {name: count for name, count in counts.items() if count is not None}
    precision, peak, matmuls = case_of_network[names[0]].setting.precision, None, {}
    if counted:
        peak = measure_peak(precision, device, max(counted.values()))
        show_progress(str(peak))
        matmuls = {name: MatmulReference(precision, device, count, peak.library) for name, count in counted.items()}
    for matmul in matmuls.values():
        matmul()
    times = time_interleaved({**cases, **matmuls}, rounds, device)
    peers = [name for name in names if without_form(name) == without_form(names[-1])]
    has_others = len(peers) < len(names)
    results = []
    for (name, setting), case in cases.items():
        peer_times = default_times = matmul_times = None
        if has_others:
            peer_times = min((times[peer, setting] for peer in peers), key=np.median)
            if len(peers) > 1 and without_form(names[-1]) in peers:
                default_times = times[without_form(names[-1]), setting]
        if name in matmuls:
            matmul_times = [seconds * counts[name] / matmuls[name].multiply_adds for seconds in times[name]]
        results.append(
            Result(
                name=short_name(name),
                setting=setting,
                times=times[name, setting],
                images=setting.batch,
                pixels=setting.pixels,
                peer_times=peer_times,
                default_peer_times=default_times,
                matmul_times=matmul_times,
                peak=peak,
                memory=case.peak_memory(),
                multiply_adds=counts[name],
            )
        )
    return results


def show_progress(text: str) -> None:
    """Print to standard error."""
    print(text, file=sys.stderr, flush=True)
