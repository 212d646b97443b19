import json

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from engine.config_tree import ConfigError
from engine.timing import Quartiles
from tests.helpers.paths import TINY
from tests.helpers.runs import CPU
from tools.benchmark import __main__ as program
from tools.benchmark import timing
from tools.benchmark.cases import Setting, build_network
from tools.benchmark.chart import draw
from tools.benchmark.report import compare_fastest, table
from tools.benchmark.timing import Result, Variant, compare, find_fastest


def test_networks_come_from_a_config_timm_and_torchvision():
    assert build_network(str(TINY), 56).img_size == (56, 56)
    assert build_network('timm:test_vit', 32).patch_embed.img_size == (32, 32)
    assert type(build_network('test_resnet', 64)).__module__ == 'timm.models.resnet'  # has no image size
    assert type(build_network('resnet18', 64)).__module__ == 'timm.models.resnet'  # timm has priority
    assert type(build_network('torchvision:resnet18', 64)).__module__ == 'torchvision.models.resnet'
    for name in ('swin_giant', 'torchvision:test_vit'):
        with pytest.raises(ConfigError, match=f'no network .{name}.: give a config file, or a name'):
            build_network(name, 224)


def result(network, compile_mode, seconds):
    """Three rounds, of which the last takes twice as long; the peer takes twice as long, the matmul half."""
    times = [seconds, seconds, 2 * seconds]
    halves = [x / 2 for x in times]
    return Result(network, Setting(compile_mode=compile_mode), times, [2 * x for x in times], halves, 3 * 2**20, 10**9)


def test_fastest_compile_modes_are_compared():
    results = [result('a', 'eager', 0.2), result('a', 'compiled', 0.1)]
    results += [result('b', 'eager', 0.12)._replace(times=[0.12, 0.11, 0.15]), result('b', 'compiled', 0.15)]
    expected = 'inference, fp32, fastest of each, batch 8, 224 px: a compiled, b eager: 1.10 (0.92 to 1.15) x'
    assert compare_fastest(results) == expected
    cells = [cell.strip() for cell in table(results).splitlines()[2].strip('|').split('|')]
    assert cells[:4] == ['a', 'inference, fp32, eager, batch 8, 224 px', '200.0 (200.0 to 300.0)', '40.0']
    assert cells[4:] == ['2.00 (2.00 to 2.00)', '50', '3', '1.00G']


def test_ratios_are_within_rounds(monkeypatch):
    def time_interleaved(cases, rounds, device):
        times = iter(([1.0, 2.0, 3.0], [2.0, 8.0, 9.0], [0.5, 2.0, 0.75], [1.0, 1.0, 1.0]))
        return {name: next(times) for name in cases}

    monkeypatch.setattr(timing, 'time_interleaved', time_interleaved)
    ((ours, peer),) = compare([str(TINY), 'test_resnet'], [Setting(batch=2, size=28)], 3, CPU)
    assert ours.speedup.median == 3.0  # of 2, 4 and 3
    assert peer.speedup == (1.0, 1.0, 1.0)
    assert ours.matmul_fraction.median == pytest.approx(0.5, rel=0.05)  # of 0.5, 1 and 0.25; a matmul of nearly as many
    assert peer.matmul_fraction.median == pytest.approx(1 / 8, rel=0.05)
    assert ours.seconds.median == 2.0


def test_writes_table_json_and_chart(tmp_path, monkeypatch, capsys):
    arguments = [str(TINY), 'test_convnext', '--modes', 'inference', 'train', '--precisions', 'fp32', 'tf32']
    arguments += ['--compile', 'eager', '--batches', '1', '2', '--sizes', '56', '--rounds', '2', '--device', 'cpu']
    arguments += ['--output', str(tmp_path / 'new' / 'all')]
    monkeypatch.setattr('sys.argv', ['benchmark', *arguments])
    program.main()
    out = capsys.readouterr().out
    assert out.count('not run: tf32, eager: for NVIDIA GPUs only') == 4
    assert 'train, fp32, fastest of each, batch 2, 56 px: tiny eager, test_convnext eager: ' in out
    assert (tmp_path / 'new' / 'all.md').read_text().strip() in out
    report = json.loads((tmp_path / 'new' / 'all.json').read_text())
    assert report['environment']['torch'] == torch.__version__
    assert len(report['results']) == 8
    for record in report['results']:
        assert record['seconds']['low'] <= record['seconds']['median'] <= record['seconds']['high']
        assert record['memory'] > 0
    train, inference = (
        next(r for r in report['results'] if r['setting']['mode'] == mode and r['network'] == 'tiny')
        for mode in ('train', 'inference')
    )
    assert train['memory'] > inference['memory']
    assert train['multiply_adds'] > 2 * inference['multiply_adds']
    assert (tmp_path / 'new' / 'all.png').read_bytes().startswith(b'\x89PNG')


def test_threads_are_compared_and_set_back(tmp_path, monkeypatch):
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(
        timing,
        'time_interleaved',
        lambda cases, *_: seen.append(torch.get_num_threads()) or {name: [1.0] for name in cases},
    )
    monkeypatch.setattr('sys.argv', [
        'benchmark', str(TINY), '--compile', 'eager', '--sizes', '28', '--threads', '1', '3', '--device', 'cpu',
        '--output', str(tmp_path / 'threads'),
    ])  # fmt: skip
    program.main()
    assert (seen, torch.get_num_threads()) == ([1, 3], before)
    assert 'eager, batch 8, 28 px, 3 thread(s) |' in (tmp_path / 'threads.md').read_text()


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['swin_giant'], "error: no network 'swin_giant': give a config file"),
        ([str(TINY), '--sizes', '28', '1'], 'error: DATA.IMG_SIZE is 1: write at least'),
        ([str(TINY), '--modes', 'train', '--compile', 'freezing', '--sizes', '28'], 'error: nothing can be run here'),
        ([str(TINY), str(TINY), '--sizes', '28'], 'error: two of the networks have the same name'),
        ([str(TINY), '--rounds', '0'], 'argument --rounds: 0 is not a positive integer'),
        ([str(TINY), 'test_vit', '--best'], 'error: --best is for one network'),
        ([str(TINY), '--best', '--sizes', '28', '56'], 'error: --best tries every precision'),
        ([str(TINY), '--best', '--sizes', '28', '--modes', 'train'], 'error: --best tries every precision'),
        (
            ['torchvision:vit_b_32', '--sizes', '64'],
            'error: torchvision:vit_b_32 cannot be measured (inference, batch 8',
        ),
        (
            ['torchvision:googlenet', '--modes', 'train', '--sizes', '64'],
            'px): its output is not a (batch, classes) tensor of logits',
        ),
        (['torchvision:resnet18', '--modes', 'train', '--sizes', '32', '--batches', '1'], 'Expected more than 1 value'),
        ([str(TINY), '--sizes', '28', '--output', '/proc/new'], 'error: output folder /proc: '),
        ([str(TINY), '--sizes', '28', '--output', '/dev/null/new'], 'error: output folder /dev/null: '),
    ],
)
def test_mistakes_are_reported_before_anything_is_measured(monkeypatch, capsys, flags, message):
    monkeypatch.setattr('sys.argv', ['benchmark', *flags, '--device', 'cpu'])
    monkeypatch.setattr(timing, 'time_interleaved', lambda *_: pytest.fail('measures'))
    with pytest.raises(SystemExit) as stopped:
        program.main()
    assert message in f'{stopped.value} {capsys.readouterr().err}'


def test_best_prints_every_variant(monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['benchmark', str(TINY), '--best', '--sizes', '28', '--device', 'cpu'])
    variants = [Variant('int8', Quartiles(1, 1, 1), 0.5), Variant('fp32', Quartiles(2, 2, 2), 0.0)]
    monkeypatch.setattr(program, 'find_fastest', lambda name, setting, error, rounds, device: ('fp32', variants))
    program.main()
    assert capsys.readouterr().out.splitlines()[2:] == [
        '| int8 | 1000.0 (1000.0 to 1000.0) | 0.5 |',
        '| fp32 | 2000.0 (2000.0 to 2000.0) | 0 |',
        'fastest with an error of at most 0.02: fp32',
    ]


def test_chart_of_one_size_has_bars(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, 'savefig', lambda figure, path, dpi: figures.append(figure))
    draw([result('a', 'eager', 0.2), result('b', 'eager', 0.1)], tmp_path / 'bars.png')
    time, memory = figures[0].axes
    assert [bar.get_width() for bar in time.patches] == [200, 100]
    assert [bar.get_width() for bar in memory.patches] == [3, 3]


def test_best_is_the_fastest_within_the_error(monkeypatch):
    class Case:
        def __init__(self, network, setting, device):
            self.off = 0.1 if isinstance(network, str) else {'fp32': 0.0, 'bf16': 0.01}[setting.precision]
            self.images = torch.zeros(2, 3)

        def warm_up(self):
            pass

        def __call__(self):
            return torch.ones(2, 5) * (1 + self.off)

    seconds = {'fp32, eager': 3.0, 'bf16, eager': 2.0, 'int8 linears, eager': 1.0}
    monkeypatch.setattr(timing, 'BenchmarkCase', Case)
    monkeypatch.setattr(timing, '_in_int8', lambda network: 'int8')
    monkeypatch.setattr(
        timing, 'unavailable', lambda s, device: s.compile_mode != 'eager' or s.precision not in ('fp32', 'bf16')
    )
    monkeypatch.setattr(timing, 'time_interleaved', lambda variants, *_: {name: [seconds[name]] for name in variants})
    setting = Setting(batch=2, size=28)
    for max_error, expected in ((0.2, 'int8 linears, eager'), (0.02, 'bf16, eager'), (0.001, 'fp32, eager')):
        best, variants = find_fastest(str(TINY), setting, max_error, 1, CPU)
        assert best == expected
        assert [variant.name for variant in variants] == ['int8 linears, eager', 'bf16, eager', 'fp32, eager']
    assert [round(variant.error, 3) for variant in variants] == [0.1, 0.01, 0.0]


def test_int8_linears_are_near_fp32():
    network = build_network(str(TINY), 28).eval()
    quantized = timing._in_int8(network)
    assert not any(type(module) is nn.Linear for module in quantized.modules())
    images = torch.randn(4, 3, 28, 28)
    with torch.no_grad():
        exact, rounded = network(images), quantized(images)
    assert 0 < (exact - rounded).norm() / exact.norm() < 0.2
