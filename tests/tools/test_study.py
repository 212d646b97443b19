"""`tools.study`: runs through main.py, where it goes on from, and the arithmetic of its table."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from engine.checkpoint import load_checkpoint, peek_checkpoint, save_checkpoint
from engine.experiment import PRETRAINED, origin_of_file
from tests.helpers.documents import code_blocks
from tests.helpers.paths import ROOT, TINY
from tests.helpers.processes import environment, run_here
from tests.helpers.shared import shared_folder
from tools.make_digits import make_digits
from tools.output_files import save_figure
from tools.study.__main__ import read_results
from tools.study.chart import chart
from tools.study.plan import StudyError, read_study
from tools.study.report import table
from tools.study.runs import finished_run
from tools.study.statistics import dunnett_differences, paired_difference, summarise

SHORT = ['--opts', 'TRAIN.EPOCHS', '1', 'TRAIN.WARMUP_EPOCHS', '0', 'MODEL.NUM_CLASSES', '2', 'LOCK_WAIT', '0']


def write_study(folder, **changes):
    content = {
        'config': str(TINY),
        'reference': 'msg',
        'further_references': ['bare'],
        'seeds': [0, 1],
        'variants': {
            'msg': {'label': 'MSG tokens'},
            'bare': {'label': 'no MSG tokens', 'options': {'MODEL.MSG.MSG_TOKENS': False}},
        },
    }
    path = folder / 'two.yaml'
    path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
    return path


def start_study(*arguments, **options):
    command = [sys.executable, '-m', 'tools.study', *map(str, arguments)]
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    return subprocess.Popen(command, cwd=ROOT, env=environment(**options), **pipes)


def study(*arguments):
    """The exit code, output and errors of a study in this process, whose runs have their own processes."""
    done = run_here('-m', 'tools.study', *arguments)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """Forty training and twenty validation images of two digits."""
    return shared_folder(tmp_path_factory, 'two_digits', write_digits)


def write_digits(folder):
    make_digits(folder)
    for split, count in (('train', 20), ('val', 10)):
        for path in (folder / split).iterdir():
            if path.name not in '01':
                for file in path.iterdir():
                    file.unlink()
                path.rmdir()
            else:
                for file in sorted(path.iterdir())[count:]:
                    file.unlink()


@pytest.fixture(scope='module')
def small(tmp_path_factory, digits):
    """A whole study in small: two variants, two seeds, one epoch."""

    def flags(folder):
        paths = ['--study', folder / 'two.yaml', '--data-path', digits, '--output', folder / 'out']
        return [*paths, '--jobs', '2', *SHORT]

    def fill(folder):
        write_study(folder)
        code, out, errors = study(*flags(folder))
        assert code == 0, errors
        (folder / 'printed.txt').write_text(out)

    folder = shared_folder(tmp_path_factory, 'study', fill)
    return folder / 'out', flags(folder), (folder / 'printed.txt').read_text()


def test_table_and_chart_are_those_of_the_runs(small):
    output, _, printed = small
    results = json.loads((output / 'study.json').read_text())
    assert [(run['variant'], run['seed']) for run in results['runs']] == [
        ('msg', 0), ('msg', 1), ('bare', 0), ('bare', 1)
    ]  # fmt: skip
    assert results['further_references'] == ['bare']
    final = {'msg': [], 'bare': []}
    for run in results['runs']:
        lines = (output / run['variant'] / f'seed{run["seed"]}' / 'metrics.jsonl').read_text().splitlines()
        (epoch,) = [record for record in map(json.loads, lines) if record['kind'] == 'epoch']
        assert run['epochs'] == [pytest.approx({key: epoch[key] for key in run['epochs'][0]}, abs=1e-5)]
        assert run['config']['SEED'] == run['seed']
        assert run['config']['MODEL']['MSG']['MSG_TOKENS'] == (run['variant'] == 'msg')
        assert run['data']['train']['images'] == 40
        assert run['environment'].keys() >= {'revision', 'processor', 'torch'}
        assert run['train_seconds'] > 0
        final[run['variant']].append(epoch['acc1'])
    rows = re.findall(
        r'^\| (no MSG tokens|MSG tokens) \| ([\d,]+) \|.*\| (.+?) \| (.+?) \|(.*)\|$', printed, re.MULTILINE
    )
    assert len(rows) == 2
    for (_, parameters, by_seed, spread, difference), (name, values) in zip(rows, final.items(), strict=True):
        assert by_seed == ', '.join(f'{value:.1f}' for value in values)
        assert spread == f'{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}'
        if name == 'msg':
            assert not difference.strip()
        else:
            differences = np.subtract(values, final['msg'])
            mean, low, high = differences.mean(), differences.min(), differences.max()  # of two pairs, it is the range
            assert difference.strip().startswith(f'{mean:+.1f} [{low:+.1f}, {high:+.1f}] (')
        assert int(parameters.replace(',', '')) == results['runs'][0 if name == 'msg' else 2]['parameters']
    assert 'width="504pt"' in (output / 'study.svg').read_text()  # 7 inches
    pdf = (output / 'study.pdf').read_bytes()
    assert b'/TrueType' in pdf or b'/CIDFontType2' in pdf
    assert b'/Type3' not in pdf  # which publishers refuse


def test_the_same_command_again_trains_nothing_and_results_print_the_same(small, tmp_path):
    output, flags, printed = small
    files = {path: path.stat().st_mtime_ns for path in output.glob('*/*/*')}
    code, again, errors = study(*flags)
    assert code == 0, errors
    assert again.count(' already') == 4
    assert {path: path.stat().st_mtime_ns for path in output.glob('*/*/*')} == files
    charts = [tmp_path / 'chart.svg', tmp_path / 'chart.pdf']
    code, reprinted, _ = study('--results', output / 'study.json', '--chart', *charts)
    assert code == 0
    assert reprinted.strip() == (output / 'study.md').read_text().strip()
    assert reprinted.strip() in again
    assert reprinted.strip() in printed
    for path in charts:
        assert path.read_bytes() == (output / f'study{path.suffix}').read_bytes()


def test_other_settings_or_data_in_the_same_folder_are_refused(small, tmp_path):
    _, flags, _ = small
    shutil.copytree(flags[3], tmp_path / 'fewer')
    next((tmp_path / 'fewer/train/0').glob('*.png')).unlink()
    code, _, errors = study(*flags[:3], tmp_path / 'fewer', *flags[4:])
    assert code == 1
    assert re.fullmatch(r'error: .*msg/seed0 holds another run \(train has 39 images, not 40\): .*\n', errors)
    code, _, errors = study(*flags, 'TRAIN.BASE_LR', '0.2')
    assert code == 1
    assert re.fullmatch(
        r'error: .*msg/seed0 holds another run \(TRAIN.BASE_LR has changed from 0.1 to 0.2\): '
        r'write another --output\n',
        errors,
    )


def test_a_run_is_finished_when_its_last_checkpoint_is_saved(small, tmp_path):
    """Its last metrics are written before."""
    output, flags, _ = small
    shutil.copytree(output / 'msg', tmp_path / 'msg')
    project, opts = read_study(flags[1]), [*SHORT[1:]]
    assert finished_run(project, tmp_path, 'msg', 0, opts)['epochs']
    (tmp_path / 'msg' / 'seed0' / 'ckpt_epoch_0.pth').unlink()
    assert finished_run(project, tmp_path, 'msg', 0, opts) is None
    early, opts_early = tmp_path / 'msg' / 'seed1', [*opts, 'TRAIN.EPOCHS', '4', 'TRAIN.PATIENCE', '1']
    program = (early / 'config.yaml').read_text()
    for before, now in (('EPOCHS: 1', 'EPOCHS: 4'), ('PATIENCE: 0', 'PATIENCE: 1')):
        program = program.replace(f'  {before}\n', f'  {now}\n')
    (early / 'config.yaml').write_text(program)
    assert finished_run(project, tmp_path, 'msg', 1, opts_early) is None
    metrics = (early / 'metrics.jsonl').read_text().splitlines()
    (early / 'metrics.jsonl').write_text('\n'.join([*metrics[:-1], metrics[-1][:-1] + ', "early_stop": 1}']) + '\n')
    assert len(finished_run(project, tmp_path, 'msg', 1, opts_early)['epochs']) == 1
    with pytest.raises(StudyError, match='TRAIN.EPOCHS has changed from 1 to 2'):
        finished_run(project, tmp_path, 'msg', 0, [*opts, 'TRAIN.EPOCHS', '2'])


def test_finished_runs_with_another_start_or_teacher_or_on_other_data_are_refused(small, tmp_path):
    output, flags, _ = small
    project, opts, run = read_study(flags[1]), SHORT[1:], output / 'msg/seed0/ckpt_epoch_0.pth'

    def finished(folder, *more, data=None):
        return finished_run(project, folder, 'msg', 0, [*opts, *map(str, more)], data)

    data = peek_checkpoint(run)['data']
    assert finished(output, data=data)['epochs']
    with pytest.raises(StudyError, match=r'msg/seed0 holds another run \(train has 7 images, not 40\)'):
        finished(output, data={**data, 'train': {**data['train'], 'images': 7}})
    for key in ('MODEL.PRETRAINED', 'DISTILL.TEACHER'):
        with pytest.raises(StudyError, match=f"{key} was '' and is '.*ckpt_epoch_0.pth'"):
            finished(output, key, run)

    shutil.copytree(output / 'msg', tmp_path / 'msg')
    weights, other = tmp_path / 'weights.pth', tmp_path / 'other.pth'
    shutil.copy(run, weights)
    shutil.copy(output / 'bare/seed0/ckpt_epoch_0.pth', other)
    copy, config = tmp_path / 'msg/seed0/ckpt_epoch_0.pth', tmp_path / 'msg/seed0/config.yaml'
    start = {**origin_of_file(PRETRAINED, str(weights)), 'weights': 'auto'}
    save_checkpoint(copy, {**load_checkpoint(copy), 'origin': start})
    saved = yaml.safe_load(config.read_text())
    saved['MODEL']['PRETRAINED'], saved['DISTILL']['TEACHER'] = str(weights), 'teacher.pth'
    config.write_text(yaml.safe_dump(saved))
    same = ('MODEL.PRETRAINED', weights, 'DISTILL.TEACHER', Path('teacher.pth').absolute())
    assert finished(tmp_path, *same)['epochs']
    saved['DISTILL']['TEACHER'] = 'timm:resnet18'
    config.write_text(yaml.safe_dump(saved))
    same = ('MODEL.PRETRAINED', weights, 'DISTILL.TEACHER', 'timm:resnet18')
    assert finished(tmp_path, *same)['epochs']
    assert finished(tmp_path, *same, 'MODEL.PRETRAINED', shutil.copy(weights, tmp_path / 'moved.pth'))['epochs']
    before_training = [
        (('MODEL.PRETRAINED', ''), "MODEL.PRETRAINED was '.*weights.pth' and is ''"),
        (('DISTILL.TEACHER', ''), "DISTILL.TEACHER was 'timm:resnet18' and is ''"),
        (('DISTILL.TEACHER_WEIGHTS', other), "DISTILL.TEACHER_WEIGHTS was '' and is '.*other.pth'"),
    ]
    after_training = [
        (('MODEL.PRETRAINED', other), 'it started from --pretrained .*weights.pth, not from .*other.pth'),
        (('MODEL.PRETRAINED_WEIGHTS', 'ema'), 'MODEL.PRETRAINED_WEIGHTS was auto and is ema'),
    ]
    for more, message in before_training + after_training:
        with pytest.raises(StudyError, match=message):
            finished(tmp_path, *same, *more)
    copy.unlink()
    for more, message in before_training:
        with pytest.raises(StudyError, match=message):
            finished(tmp_path, *same, *more)


@pytest.mark.slow
def test_a_stopped_study_goes_on_where_it_was(tmp_path, digits):
    flags = ['--study', write_study(tmp_path), '--data-path', digits, '--output', tmp_path, '--variants', 'msg']
    flags += ['--seeds', '0', '--opts', 'TRAIN.EPOCHS', '60', 'MODEL.NUM_CLASSES', '2']
    metrics = tmp_path / 'msg' / 'seed0' / 'metrics.jsonl'
    process = start_study(*flags)
    for _ in range(600):
        if metrics.exists() and metrics.read_text().count('"kind": "epoch"') > 2:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (1, 'stopped: run the same command again to resume\n')
    done = metrics.read_text().count('"kind": "epoch"')
    assert 2 < done < 60
    code, out, errors = study(*flags)
    assert code == 0, errors
    assert 'msg, seed 0: top-1 ' in out
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [record['epoch'] for record in records if record['kind'] == 'epoch'] == list(range(60))
    (run,) = json.loads((tmp_path / 'study.json').read_text())['runs']
    assert len(run['epochs']) == 60


def test_a_run_that_fails_says_why_in_a_line(tmp_path, digits):
    flags = ['--study', write_study(tmp_path), '--output', tmp_path, *SHORT]
    code, _, errors = study(*flags, '--data-path', tmp_path / 'nowhere')
    assert code == 1
    assert re.fullmatch(r'error: data folder .*nowhere.*\n', errors)
    code, _, errors = study(*flags, 'MODEL.PRETRAINED', 'none.pth', '--data-path', digits)
    assert code == 1
    assert re.fullmatch(r'error: (msg|bare), seed \d failed: .*none.pth.*\n', errors)
    code, _, errors = study(*flags, 'MODEL.MSG.EMBED_DIM', '7', '--data-path', digits)
    assert code == 1
    assert 'error: MODEL.MSG: ' in errors


def test_paired_difference_is_that_of_numpy():
    values, reference = [74.0, 75.5, 73.1, 76.0], [70.0, 72.5, 70.6, 70.9]
    pairs = dict(enumerate(values)), dict(enumerate(reference)) | {9: 0.0}
    difference = paired_difference(*pairs)
    differences = np.array(values) - np.array(reference)
    assert difference.mean == pytest.approx(differences.mean())
    assert [*difference.values.values()] == pytest.approx(differences)
    # All 4^4 resamples
    means = np.array(np.meshgrid(*[differences] * 4)).reshape(4, -1).mean(axis=0)
    assert difference.bootstrap == pytest.approx(np.percentile(means, [2.5, 97.5]))
    margin = 3.182446 * differences.std(ddof=1) / 2  # of Student's t with three degrees of freedom, from a table
    assert difference.student == pytest.approx((differences.mean() - margin, differences.mean() + margin))
    assert paired_difference({0: 5.0}, {0: 3.0}) == ({0: 2.0}, 2.0, None, None)
    assert paired_difference({0: 5.0}, {1: 3.0}) is None


def test_many_pairs_are_resampled_and_always_the_same():
    values = dict(enumerate(np.random.default_rng(1).normal(size=40)))
    difference = paired_difference(values, dict.fromkeys(values, 0.0))
    assert difference == paired_difference(values, dict.fromkeys(values, 0.0))
    assert difference.bootstrap == pytest.approx(difference.student, abs=0.05)


# Blood counts of Dunnett, 1955, doi:10.1080/01621459.1955.10501294, and intervals of R's multcomp::glht for them
BLOOD_COUNTS = {
    'control': [7.40, 8.50, 7.20, 8.24, 9.84, 8.32],
    'A': [9.76, 8.80, 7.68, 9.36],
    'B': [12.80, 9.68, 12.16, 9.20, 10.55],
}
BLOOD_INTERVALS = {'A': (0.65, -1.2564, 2.5564), 'B': (2.628, 0.8396, 4.4164)}


def test_dunnett_differences_are_those_of_a_worked_example_with_unequal_numbers():
    differences = dunnett_differences(BLOOD_COUNTS, 'control')
    assert differences == {name: pytest.approx(numbers, abs=0.01) for name, numbers in BLOOD_INTERVALS.items()}
    assert differences == dunnett_differences(BLOOD_COUNTS, 'control')  # its random numbers are fixed
    # One seed says nothing of the spread, so that it is left out.
    assert dunnett_differences(BLOOD_COUNTS | {'C': [9.0]}, 'control') == differences


@pytest.mark.parametrize(
    ('groups', 'size', 'critical'),
    [(2, 3, 2.86), (4, 3, 2.89), (5, 3, 2.90), (2, 6, 2.44)],  # Dunnett, 1964, two-sided, 5 %
)
def test_dunnett_intervals_have_the_critical_values_of_his_table(groups, size, critical):
    sample = np.linspace(-1, 1, size)
    differences = dunnett_differences({str(group): sample + group for group in range(groups + 1)}, '0')
    standard_error = sample.std(ddof=1) * (2 / size) ** 0.5
    for group in range(groups):
        mean, low, high = differences[str(group + 1)]
        assert mean == pytest.approx(group + 1)
        assert (high - low) / 2 / standard_error == pytest.approx(critical, abs=0.01)


@pytest.mark.parametrize(
    'values',
    [
        {'a': [1.0, 2.0], 'b': [2.0, 3.0], 'c': [4.0]},
        {'a': [1.0], 'b': [2.0, 3.0], 'c': [4.0, 5.0]},
        {'a': [1.0, 2.0], 'b': [2.0, 3.0], 'c': [4.0, np.nan]},
        {'a': [100.0, 100.0], 'b': [100.0, 100.0], 'c': [100.0, 100.0]},
        {'b': [2.0, 3.0], 'c': [4.0, 5.0]},
    ],
)
def test_there_is_no_dunnett_test_without_a_spread_of_three_variants(values):
    assert dunnett_differences(values, 'a') == {}


def results_of(accuracies):
    runs = [
        {'variant': name, 'seed': seed, 'parameters': 1, 'multiply_adds': 2, 'epochs': [{'acc1': 1.0}, epoch]}
        for name, seeds in accuracies.items()
        for seed, epoch in seeds.items()
    ]
    labels = {'a': 'A', 'b': 'B', 'c': 'C'}
    return {'study': 's', 'reference': 'a', 'labels': labels, 'metric': 'acc1', 'metric_name': 'top-1', 'runs': runs}


def test_pairs_are_seeds_of_both_and_ema_weights_count_where_there_are_any():
    accuracies = {'a': {0: 10.0, 1: 20.0, 2: 40.0}, 'b': {1: 25.0, 2: 41.0, 7: 90.0}}
    epochs = {name: {seed: {'acc1': x} for seed, x in seeds.items()} for name, seeds in accuracies.items()}
    epochs['b'][1] = {'acc1': 3.0, 'ema_acc1': 25.0}
    a, b = summarise(results_of(epochs))
    assert (a.mean, a.difference) == (pytest.approx(70 / 3), None)
    assert b.values == accuracies['b']
    assert b.difference.mean == pytest.approx(3.0)
    assert b.curves.tolist() == [[1.0, 25.0], [1.0, 41.0], [1.0, 90.0]]
    results = results_of(epochs)
    results['runs'][-1]['epochs'] = [{'acc1': 90.0}]  # stopped early
    assert summarise(results)[1].curves.tolist() == [[1.0, 25.0], [1.0, 41.0], [90.0, 90.0]]


def test_tables_have_both_intervals_and_the_comparisons():
    accuracies = {'a': (70.0, 71.0, 72.5), 'b': (73.0, 75.0, 74.5), 'c': (71.0, 71.5, 74.0)}
    results = results_of({name: {i: {'acc1': x} for i, x in enumerate(values)} for name, values in accuracies.items()})
    about = {'train_seconds': 3600.0, 'data': {'train': {'images': 1200}, 'val': {'images': 300}}}
    environment = {'processor': 'P', 'device': 'D', 'torch': '2', 'revision': '0123456789 (modified)'}
    runs = [run | about | {'environment': environment} for run in results['runs']]
    results |= {'runs': runs, 'comparisons': [['b', 'c'], ['c', 'missing']], 'further_references': ['c']}
    lines = table(results).splitlines()
    for line, pairs in ((lines[3], ('b', 'a')), (lines[8], ('b', 'c'))):
        differences = np.subtract(*(accuracies[name] for name in pairs))
        means = np.array(np.meshgrid(*[differences] * 3)).reshape(3, -1).mean(axis=0)
        margin = 4.302653 * differences.std(ddof=1) / 3**0.5  # two degrees of freedom
        low, high = np.percentile(means, [2.5, 97.5])
        mean = differences.mean()
        expected = f'{mean:+.1f} [{low:+.1f}, {high:+.1f}] ({mean - margin:+.1f} to {mean + margin:+.1f}) |'
        assert line.endswith(expected), (line, expected)
    assert lines[-1].endswith('; revision 0123456 (modified).')
    assert lines[8].startswith('| B, against C | +2.0, +3.5, +0.5 | ')
    assert lines[10:12] == ['| Dunnett\'s test | difference to "A" | difference to "C" |', '|---|---:|---:|']
    cells = {
        (name, other): '{:+.1f} [{:+.1f}, {:+.1f}]'.format(*dunnett_differences(accuracies, other)[name])
        for name in 'abc'
        for other in 'ac'
        if name != other
    }
    assert lines[12:15] == [
        f'| A |  | {cells["a", "c"]} |',
        f'| B | {cells["b", "a"]} | {cells["b", "c"]} |',
        f'| C | {cells["c", "a"]} |  |',
    ]
    assert len(lines) == 17
    assert lines[16].startswith('9 runs; 1,200 training and 300 validation images; epochs: 2, ')
    assert '9.0 run-hours' in lines[16]
    assert "Dunnett's test: [simultaneous 95 % intervals" in lines[16]
    del results['further_references']  # as in older files
    assert table(results).splitlines()[10] == '| Dunnett\'s test | difference to "A" |'


def drawn_texts(axes):
    """The texts of axes, without those of ticks outside their limits, which are not drawn."""
    texts = [*axes.texts, axes.title]
    if axes.axison:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            texts += [axis.label, *(tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high)]
    return [text for text in texts if text.get_text()]


@pytest.mark.parametrize('width', [3.3, 6.0, 7.0])
def test_texts_of_a_chart_lie_inside_it_and_apart(width):
    """Variants differ little, and their labels are long."""
    names = [f'v{i}' for i in range(10)]
    results = results_of({name: {j: {'acc1': 70 + i / 50 + j / 9} for j in (0, 1)} for i, name in enumerate(names)})
    labels = {name: f'the variant {name} of the network; head reads the tokens of all patches' for name in names}
    figure = chart(results | {'reference': 'v0', 'labels': labels}, width)
    figure.draw_without_rendering()
    texts = [text for axes in figure.axes for text in drawn_texts(axes)]
    assert sum('variant' in text.get_text() for text in texts) == (20 if width < 6 else 10)
    boxes = [text.get_window_extent() for text in texts]
    for i, (text, box) in enumerate(zip(texts, boxes, strict=True)):
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, text
        assert not [other for other, at in zip(texts[:i], boxes, strict=False) if box.overlaps(at)], text
        assert text.get_fontsize() == 8
    for axes in figure.axes:
        looks = [(line.get_color(), line.get_marker()) for line in axes.lines if line.get_marker() != 'None']
        assert len(looks) == len(set(looks))


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'reference': 'none'}, 'reference none is none of its variants'),
        ({'seeds': 3}, r'seeds is 3: write a list such as \[0, 1, 2\]'),
        ({'seeds': [True]}, r"seeds is \['true'\]: write a list"),
        ({'options': 3}, 'options is 3: write config keys and values'),
        ({'comparisons': [['msg', 'none']]}, 'write a list of pairs of variants'),
        ({'comparisons': [['msg', {}]]}, 'write a list of pairs of variants'),
        ({'comparisons': 7}, 'write a list of pairs of variants'),
        ({'further_references': ['none']}, 'write a list of variants, without the reference'),
        ({'further_references': ['msg']}, 'write a list of variants, without the reference'),
        ({'further_references': 'bare'}, 'write a list of variants, without the reference'),
        ({'variants': {'msg': {'label': 'x'}, '../b': {'label': 'y'}}}, 'write a name of letters, digits'),
        ({'variants': {'msg': {'options': {}}}}, 'variant msg: write its label'),
        ({'task': 'segmentation'}, 'task is segmentation: write classification or detection'),
        ({'extra': 1}, 'write the keys config, reference, seeds, variants'),
    ],
)
def test_a_study_file_that_cannot_work_says_what_to_write(tmp_path, changes, message):
    with pytest.raises(StudyError, match=message):
        read_study(write_study(tmp_path, **changes))


def test_a_study_takes_from_its_base_what_it_does_not_have(tmp_path):
    base = read_study(write_study(tmp_path, options={'TRAIN.EPOCHS': 4}))
    (tmp_path / 'own.yaml').write_text('base: two.yaml\nseeds: [7]\nvariants: {msg: {label: other}}\n')
    own = read_study(tmp_path / 'own.yaml')
    assert (own.name, own.seeds, list(own.variants)) == ('own', [7], ['msg', 'bare'])
    assert own.variants['bare'] == base.variants['bare']
    assert own.further_references == base.further_references == ['bare']
    assert own.variants['msg'].label == 'other'
    assert own.config('bare', 7).TRAIN.EPOCHS == 4
    assert own.config('bare', 7, ['TRAIN.EPOCHS', '5']).TRAIN.EPOCHS == 5
    (tmp_path / 'inner').mkdir()
    write_study(tmp_path / 'inner', config='../tiny.yaml')
    (tmp_path / 'own.yaml').write_text('base: inner/two.yaml\n')
    assert read_study(tmp_path / 'own.yaml').cfg_file.resolve() == tmp_path / 'tiny.yaml'
    (tmp_path / 'own.yaml').write_text('base: own.yaml\n')
    with pytest.raises(StudyError, match='own.yaml is its own base'):
        read_study(tmp_path / 'own.yaml')
    (tmp_path / 'own.yaml').write_text('base: none.yaml\n')
    with pytest.raises(StudyError, match='none.yaml: No such file'):
        read_study(tmp_path / 'own.yaml')


@pytest.mark.parametrize('path', sorted(ROOT.glob('configs/studies/*.yaml')), ids=lambda path: path.stem)
def test_studies_of_the_project_can_run(path):
    project = read_study(path)
    for variant in project.variants:
        assert variant == project.config(variant, 0).MODEL.NAME
    with pytest.raises(StudyError, match='no variant nothing in the study: write one of '):
        project.select_variants(['nothing'])


def test_a_chart_is_drawn_of_a_variant_whose_metric_is_undefined(tmp_path):
    epoch = {'acc1': np.nan}
    for runs in ({'a': {0: epoch}}, {'a': {0: epoch}, 'b': {0: {'acc1': 5.0}}}):
        save_figure(chart(results_of(runs)), tmp_path / 'chart.pdf', 100)


@pytest.mark.parametrize('width', ['abc', '1', 'nan', '21'])
def test_a_width_that_does_not_fit_a_page_is_refused(width):
    line = f'error: argument --width: {width} is not a width from 3 to 20 inches\n'
    assert study('--results', 'docs/study.json', '--chart', 'x.pdf', '--width', width)[2].endswith(line)


def test_the_study_file_of_the_documents_can_run(tmp_path):
    (content,) = code_blocks((ROOT / 'docs' / 'study.md').read_text(), 'yaml')
    path = tmp_path / 'my_study.yaml'
    path.write_text(content.replace('config: ..', f'config: {ROOT}/configs'))
    project = read_study(path)
    assert (project.further_references, project.comparisons) == (['none'], [('mean', 'none')])
    assert project.config('mean', 0).MODEL.MSG.MANIP_TYPE == 'mean'


def test_a_file_without_results_is_refused(tmp_path):
    path = tmp_path / 'study.json'
    for content, message in (
        ('{}', 'holds no results that this version reads: give a study.json'),
        ('[]', 'holds no results that this version reads: give a study.json'),
        ('{"runs": []}', 'no finished run'),
        ('{', 'is not JSON'),
    ):
        path.write_text(content)
        with pytest.raises(StudyError, match=message):
            read_results(path)
    with pytest.raises(StudyError, match='No such file'):
        read_results(tmp_path / 'none.json')


def test_a_variant_without_common_seeds_has_no_difference():
    results = results_of({'a': {0: {'acc1': 10.0}}, 'c': {1: {'acc1': 20.0}}})
    assert [summary.difference for summary in summarise(results)] == [None, None]
    about = {'train_seconds': 1.0, 'data': {'train': {'images': 2}, 'val': {'images': 1}}}
    about |= {'environment': {'processor': 'P', 'device': 'D', 'torch': '2', 'revision': 'abc'}}
    results['runs'] = [run | about for run in results['runs']]
    text = table(results | {'comparisons': []})
    assert text.splitlines()[3] == '| C | 1 | 0.0M | 20.0 | 20.0 |  |'
    assert 'intervals' not in text
