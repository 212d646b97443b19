"""`tools.speedrun`: runs of two processes, timed from nothing, and the table of their results."""

import json
import re

import pytest
import yaml

from tests.helpers.images import write_images
from tests.helpers.paths import TINY
from tests.helpers.processes import error_line, run_here

RUN = {
    'seconds': 90.0, 'parameters': 1_000_000, 'multiply_adds': 2_000_000, 'epochs': [{'acc1': 10.0}, {'acc1': 81.0}],
    'environment': {'processor': 'AMD', 'cpu': 'AVX512', 'torch': '2.11.0', 'revision': 'abc'},
}  # fmt: skip


def speedrun(*arguments):
    return run_here('-m', 'tools.speedrun', *arguments)


def write_results(folder, runs):
    path = folder / 'speedrun.json'
    path.write_text(json.dumps({'labels': {'msg': 'MSG', 'bare': 'bare', 'none': 'untrained'}, 'runs': runs}))
    return path


def test_table_has_accuracy_and_minutes_of_all_seeds(tmp_path):
    slower = RUN | {'seconds': 150.0, 'epochs': [{'acc1': 79.0, 'ema_acc1': 83.0}]}
    runs = [RUN | {'variant': 'msg', 'seed': 0}, slower | {'variant': 'msg', 'seed': 1}]
    path = write_results(tmp_path, [*runs, RUN | {'variant': 'bare', 'seed': 0}])
    lines = speedrun('--results', path).stdout.splitlines()
    assert lines[2] == '| MSG | 1,000,000 | 2M | 2 | 81.0, 83.0 | 82.0 ± 1.4 | **2.0** (1.5 to 2.5) |'
    assert lines[3] == '| bare | 1,000,000 | 2M | 2 | 81.0 | 81.0 | **1.5** (1.5 to 1.5) |'
    assert not any('untrained' in line for line in lines)
    assert 'processor: AMD' in lines


def test_results_of_something_else_are_one_line(tmp_path):
    path = tmp_path / 'other.json'
    path.write_text('{"runs": [3]}')
    assert error_line('-m', 'tools.speedrun', '--results', path).endswith(
        'holds no results that this version reads: give a speedrun.json'
    )


@pytest.mark.slow
def test_runs_are_timed_and_not_repeated(tmp_path):
    write_images(tmp_path / 'tree')
    options = {'TRAIN.EPOCHS': 1, 'TRAIN.WARMUP_EPOCHS': 0}
    variants = {
        'msg': {'label': 'MSG', 'options': options},
        'wrong': {'label': 'wrong', 'options': options | {'MODEL.NUM_CLASSES': 2}},
        'taught': {'label': 'taught', 'options': options | {'DISTILL.TEACHER': 'timm:resnet18'}},
    }
    study = tmp_path / 'two.yaml'
    study.write_text(yaml.safe_dump({'config': str(TINY), 'reference': 'msg', 'seeds': [0, 1], 'variants': variants}))
    flags = ['--study', study, '--data-path', tmp_path / 'tree', '--output', tmp_path / 'out']
    flags += ['--seeds', '1', '--networks']
    done = speedrun(*flags, 'msg')
    assert done.returncode == 0, done.stderr
    (run,) = json.loads((tmp_path / 'out/speedrun.json').read_text())['runs']
    assert (run['variant'], run['seed'], run['config']['SEED']) == ('msg', 1, 1)
    assert run['environment']['world_size'] == '2'
    assert run['seconds'] > run['train_seconds'] > 0
    assert re.search(r'^msg, seed 1: [\d.]+ % in ', done.stdout)
    again = speedrun(*flags, 'msg')
    assert ', seed 1:' not in again.stdout
    assert error_line('-m', 'tools.speedrun', *flags, 'msg', 'wrong').startswith('error: wrong, seed 1 failed: ')
    study.write_text(study.read_text().replace('TRAIN.EPOCHS: 1', 'TRAIN.EPOCHS: 2'))
    line = error_line('-m', 'tools.speedrun', *flags, 'msg')
    assert 'has another run of msg, seed 1 (TRAIN.EPOCHS has changed from 1 to 2): write another --output' in line
    write_images(tmp_path / 'more', train=9)
    study.write_text(study.read_text().replace('TRAIN.EPOCHS: 2', 'TRAIN.EPOCHS: 1'))
    flags[3] = tmp_path / 'more'
    assert ', seed 1 (train has ' in error_line('-m', 'tools.speedrun', *flags, 'msg')
    assert error_line('-m', 'tools.speedrun', *flags, 'taught').endswith('or a teacher: rule 1 allows neither')
    assert again.stdout.strip() == done.stdout.partition('\n\n')[2].strip()
