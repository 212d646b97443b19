import json

import numpy as np
import pytest
import torch

from data.figure_style import INK, MUTED, PALETTE
from tests.helpers.paths import DETECTION_CONFIGS, TINY
from tests.helpers.runs import CPU
from tools.benchmark import __main__ as program
from tools.benchmark import best, classifiers, comparison, networks
from tools.benchmark.best import Variant, find_fastest, with_int8_linears
from tools.benchmark.cases import Setting
from tools.benchmark.chart import chart
from tools.benchmark.classifiers import ClassifierCase, build_network, with_other_forms
from tools.benchmark.comparison import Result, compare
from tools.benchmark.matmul import Peak
from tools.benchmark.report import compare_fastest, table
from tools.benchmark.timing import Quartiles


def call(monkeypatch, *arguments):
    monkeypatch.setattr('sys.argv', ['benchmark', *map(str, arguments), '--device', 'cpu'])
    program.main()


def build_case(name, setting):
    return ClassifierCase(build_network(name, setting.size), setting, CPU)


def result(name, compile_mode, seconds):
    """Three rounds, of which the last takes twice as long; the peer takes twice as long, the matmul half."""
    times = [seconds, seconds, 2 * seconds]
    twice, halves = [2 * x for x in times], [x / 2 for x in times]
    setting = Setting(compile_mode=compile_mode)
    return Result(name, setting, times, 8, None, twice, None, halves, Peak({'oneDNN': 8e9}), 3 * 2**20, 10**9)


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

    monkeypatch.setattr(comparison, 'time_interleaved', time_interleaved)
    names, settings = [str(TINY), 'test_resnet'], [Setting(batch=2, size=28)]
    ((ours, peer),) = compare(names, settings, build_case, 3, CPU)
    assert ours.speedup.median == 3.0  # of 2, 4 and 3
    assert peer.speedup == (1.0, 1.0, 1.0)
    assert ours.matmul_fraction.median == pytest.approx(0.5, rel=0.05)  # of 0.5, 1 and 0.25; a matmul of nearly as many
    assert peer.matmul_fraction.median == pytest.approx(1 / 8, rel=0.05)
    assert ours.seconds.median == 2.0
    assert ours.default_speedup is None


def test_the_peer_is_compared_in_its_fastest_form_and_out_of_the_box(monkeypatch):
    seconds = {str(TINY): 1.0, 'peer': 3.0, 'peer+fused': 4.0, 'peer+onednn': 2.0, 'peer+fused+onednn': 2.5}
    monkeypatch.setattr(comparison, 'time_interleaved', lambda cases, *_: {c: [seconds.get(c[0], 1.0)] for c in cases})
    settings = [Setting(batch=2, size=28)]
    (results,) = compare(list(seconds), settings, lambda name, setting: build_case(str(TINY), setting), 1, CPU)
    assert [result.speedup.median for result in results] == [2.0, 2 / 3, 0.5, 1.0, 0.8]
    assert [result.default_speedup.median for result in results] == [3.0, 1.0, 0.75, 1.5, 1.2]
    header, _, first, *_ = table(results).splitlines()
    cells = dict(zip(header.split(' | '), first.split(' | '), strict=True))
    assert cells['x peer'] == '2.00 (2.00 to 2.00)'
    assert cells['x peer out of the box'] == '3.00 (3.00 to 3.00)'


def test_peers_have_the_forms_that_ours_has(monkeypatch):
    monkeypatch.setattr(classifiers.linear, 'LIBRARY', 'pytorch')
    assert with_other_forms([str(TINY), 'test_convnext']) == [str(TINY), 'test_convnext']
    monkeypatch.setattr(classifiers.linear, 'LIBRARY', 'onednn')
    names = with_other_forms([str(TINY), 'msg_transformer_nano', 'test_convnext', 'swin_tiny_patch4_window7_224'])
    assert names[:4] == [str(TINY), 'msg_transformer_nano', 'test_convnext', 'test_convnext+onednn']
    assert [name.removeprefix('swin_tiny_patch4_window7_224') for name in names[4:]] == [
        '',
        '+fused',
        '+onednn',
        '+fused+onednn',
    ]
    monkeypatch.setattr(classifiers.linear, 'MIN_MULTIPLY_ADDS', 1)
    network = build_network('test_convnext+onednn', 32)
    with torch.profiler.profile(acc_events=True) as profile:
        network(torch.zeros(1, 3, 32, 32))
    assert 'mkldnn::_linear_pointwise' in {event.key for event in profile.key_averages()}


def test_writes_table_json_and_chart(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(classifiers.linear, 'LIBRARY', 'pytorch')  # with oneDNN, the peer has another form
    arguments = [str(TINY), 'test_convnext', '--modes', 'inference', 'train', '--precisions', 'fp32', 'tf32']
    arguments += ['--compile', 'eager', '--batches', '2', '--sizes', '56', '--rounds', '2']
    call(monkeypatch, *arguments, '--output', tmp_path / 'new' / 'all')
    out = capsys.readouterr().out
    assert out.count('not run: tf32, eager: for NVIDIA GPUs only') == 2
    assert 'train, fp32, fastest of each, batch 2, 56 px: tiny eager, test_convnext eager: ' in out
    assert (tmp_path / 'new' / 'all.md').read_text().strip() in out
    report = json.loads((tmp_path / 'new' / 'all.json').read_text())
    assert report['environment']['torch'] == torch.__version__
    assert len(report['results']) == 4
    for record in report['results']:
        assert record['seconds']['low'] <= record['seconds']['median'] <= record['seconds']['high']
        assert record['memory'] > 0
    train, inference = (
        next(r for r in report['results'] if r['setting']['mode'] == mode and r['name'] == 'tiny')
        for mode in ('train', 'inference')
    )
    assert train['memory'] > inference['memory']
    assert train['multiply_adds'] > 2 * inference['multiply_adds']
    assert (tmp_path / 'new' / 'all.png').read_bytes().startswith(b'\x89PNG')


def test_threads_are_compared_and_set_back(tmp_path, monkeypatch):
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(
        comparison,
        'time_interleaved',
        lambda cases, *_: seen.append(torch.get_num_threads()) or {name: [1.0] for name in cases},
    )
    flags = ['--compile', 'eager', '--sizes', '28', '--threads', '1', '3', '--output', tmp_path / 'threads']
    call(monkeypatch, 'networks', TINY, *flags)
    assert (seen, torch.get_num_threads()) == ([1, 3], before)
    assert 'eager, 3 thread(s), batch 8, 28 px |' in (tmp_path / 'threads.md').read_text()


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['swin_giant'], "error: no network 'swin_giant': give a config file"),
        (
            [str(DETECTION_CONFIGS / 'digits.yaml')],
            'is not a classifier: time it with python -m tools.benchmark detectors',
        ),
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
        ([str(TINY), '--sizes', '28', '--output', '/proc/new'], 'error: /proc/new.json: '),
        ([str(TINY), '--sizes', '28', '--output', '/dev/null/new'], 'error: /dev/null/new.json: '),
    ],
)
def test_mistakes_are_reported_before_anything_is_measured(monkeypatch, capsys, tmp_path, flags, message):
    monkeypatch.chdir(tmp_path)  # where `output` is made
    monkeypatch.setattr(comparison, 'time_interleaved', lambda *_: pytest.fail('measures'))
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, *flags)
    assert message in f'{stopped.value} {capsys.readouterr().err}'


def test_best_prints_every_variant(monkeypatch, capsys):
    variants = [Variant('int8', Quartiles(1, 1, 1), 0.5), Variant('fp32', Quartiles(2, 2, 2), 0.0)]
    monkeypatch.setattr(networks, 'find_fastest', lambda network, setting, error, rounds, device: ('fp32', variants))
    call(monkeypatch, TINY, '--best', '--sizes', '28')
    assert capsys.readouterr().out.splitlines()[2:] == [
        '| int8 | 1000.0 (1000.0 to 1000.0) | 0.5 |',
        '| fp32 | 2000.0 (2000.0 to 2000.0) | 0 |',
        'fastest with an error of at most 0.02: fp32',
    ]


def test_chart_of_one_size_has_bars_and_of_several_has_curves():
    time, memory = chart([result('a', 'eager', 0.2), result('b', 'eager', 0.1)]).axes
    assert [bar.get_width() for bar in time.patches] == [200, 100]
    assert [bar.get_width() for bar in memory.patches] == [3, 3]
    sizes = [result('a', 'eager', 0.1 * n)._replace(pixels=n * 10**6) for n in (1, 2)]
    curve = chart(sizes).axes[0].lines[0]
    assert curve.get_xydata().tolist() == [[10**6, 100], [2 * 10**6, 200]]
    threads = [
        Result(name, Setting(compile_mode='eager', size=size, threads=n), [seconds / n], pixels=size**2, memory=2**30)
        for name, seconds in (('a', 1.0), ('b', 2.0), ('peer', 2.1))
        for size in (224, 448)
        for n in (1, 2)
    ]
    figure = chart(threads)
    for axes in figure.axes:
        looks = [(line.get_color(), line.get_linestyle(), line.get_linewidth()) for line in axes.lines]
        assert looks == [
            (PALETTE[0], '-', 1.2),
            (PALETTE[0], '--', 1.2),
            (PALETTE[1], '-', 1.2),
            (PALETTE[1], '--', 1.2),
            (INK, '-', 4),
            (INK, '--', 4),
            (MUTED, ':', 0.8),
        ]
        assert [text.get_text() for text in axes.texts] == ['a', 'b', 'peer']
        assert [label.get_text() for label in axes.get_xticklabels()] == ['224', '448']
        heights = [text.xy[1] for text in axes.texts]
        assert np.diff(np.log10(heights) / np.diff(np.log10(axes.get_ylim()))).min() > 0.05  # labels do not touch
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ['1 thread(s)', '2 thread(s)', 'proportional to pixels']
    (time,) = chart([Result('fast', 'train, files', [0.001])]).axes
    assert [label.get_text() for label in time.get_yticklabels()] == ['train, files']


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
    monkeypatch.setattr(best, 'ClassifierCase', Case)
    monkeypatch.setattr(best, 'with_int8_linears', lambda network: 'int8')
    monkeypatch.setattr(
        best, 'unavailable', lambda s, device: s.compile_mode != 'eager' or s.precision not in ('fp32', 'bf16')
    )
    monkeypatch.setattr(best, 'time_interleaved', lambda variants, *_: {name: [seconds[name]] for name in variants})
    network, setting = build_network(str(TINY), 28), Setting(batch=2, size=28)
    for max_error, expected in ((0.2, 'int8 linears, eager'), (0.02, 'bf16, eager'), (0.001, 'fp32, eager')):
        fastest, variants = find_fastest(network, setting, max_error, 1, CPU)
        assert fastest == expected
        assert [variant.name for variant in variants] == ['int8 linears, eager', 'bf16, eager', 'fp32, eager']
    assert [round(variant.error, 3) for variant in variants] == [0.1, 0.01, 0.0]


def test_int8_linears_are_near_fp32():
    network = build_network(str(TINY), 28).eval()
    quantized = with_int8_linears(network)
    assert not any(type(module) is torch.nn.Linear for module in quantized.modules())
    images = torch.randn(4, 3, 28, 28)
    with torch.no_grad():
        exact, rounded = network(images), quantized(images)
    assert 0 < (exact - rounded).norm() / exact.norm() < 0.2
