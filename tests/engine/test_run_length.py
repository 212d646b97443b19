"""Settings that do not take effect within a run: refused, or told in the log."""

import logging
from types import SimpleNamespace

import pytest

import detection.main
import main as program
from config import TREE
from engine.config_tree import ConfigError
from engine.run_task import check_run_length
from tests.helpers.detectors import tiny_detector
from tests.helpers.runs import build_run, log_of

NEW, RESUMED = SimpleNamespace(resumes=False), SimpleNamespace(resumes=True)


def check(config, batches=None, start=NEW, task=program.TASK):
    return check_run_length(build_run(config), task, start, batches)


def check_detector(*options, batches=None, start=NEW):
    return check(tiny_detector(*options), batches, start, detection.main.TASK)


@pytest.mark.parametrize(
    ('options', 'batches', 'message'),
    [
        (
            {'TRAIN__LR_SCHEDULER__NAME': 'step'},
            None,
            'DECAY_EPOCHS is 30, so that .* never drops: write less than .*2',
        ),
        ({'TRAIN__START_EPOCH': '2'}, None, 'TRAIN.START_EPOCH is 2: write less than TRAIN.EPOCHS, 2'),
        ({'TRAIN__PATIENCE': '1'}, None, 'PATIENCE is 1, and the run has 2 evaluations, .* never stops early: write'),
        ({'TRAIN__ACCUMULATION_STEPS': '5'}, 4, 'STEPS is 5, and an epoch has 4 batches, .* 20 images .* at most 4'),
    ],
)
def test_classification(tiny_config, options, batches, message):
    config = tiny_config(DATA__BATCH_SIZE='4', **options)
    with pytest.raises(ConfigError, match=message):
        check(config, batches)
    check(tiny_config(DATA__BATCH_SIZE='4'), 4)


def test_detection():
    with pytest.raises(ConfigError, match=r'DECAY_EPOCHS is \[1, 2\], and the run ends after 2 epochs: .* or \[\]'):
        check_detector('TRAIN.LR_SCHEDULER.DECAY_EPOCHS', '[1, 2]')
    with pytest.raises(ConfigError, match=r'WARMUP_STEPS is 500, and the run has 6 updates \(3 per epoch\)'):
        check_detector('TRAIN.WARMUP_STEPS', '500', batches=3)
    with pytest.raises(ConfigError, match='WARMUP_STEPS is 4, and the run has 4 updates'):
        check_detector('TRAIN.WARMUP_STEPS', '4', 'TRAIN.ACCUMULATION_STEPS', '2', batches=3)
    check_detector('TRAIN.WARMUP_STEPS', '500')  # the data are not open yet
    check_detector('TRAIN.WARMUP_STEPS', '5', batches=3)


def test_a_run_that_resumes_gets_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        check_detector('TRAIN.WARMUP_STEPS', '500', batches=3, start=RESUMED)
    assert 'TRAIN.WARMUP_STEPS is 500' in caplog.text


def test_unused_keys_are_those_that_differ_from_their_defaults(tiny_config):
    assert TREE.unused(tiny_config()) == []
    config = tiny_config(TRAIN__OPTIMIZER__MOMENTUM='0.5', TRAIN__WARMUP_EPOCHS='0', TRAIN__WARMUP_LR='0.1')
    assert TREE.unused(config) == [
        "TRAIN.OPTIMIZER.MOMENTUM has no effect: TRAIN.OPTIMIZER.NAME is 'adamw', not sgd, adafactorbv, "
        'adafactorbvc, ...',
        'TRAIN.WARMUP_LR has no effect: TRAIN.WARMUP_EPOCHS is 0',
    ]
    assert TREE.unused(tiny_config(TRAIN__OPTIMIZER__MOMENTUM='0.5', TRAIN__OPTIMIZER__NAME='sgd')) == []


def test_every_key_that_another_needs_exists():
    for tree in (TREE, detection.main.TREE):
        for key in tree.keys.values():
            other, _, value = key.used_with.partition(' ')
            assert not other or other in tree.keys
            texts = ('AUG.AUTO_AUGMENT', 'TRAIN.OPTIMIZER.NAME')
            assert not value or value in tree.keys[other].choices or other in texts


def test_the_log_has_the_keys_that_differ_and_no_dump(tiny_config, image_tree):
    short = {'DATA__BATCH_SIZE': '12', 'TRAIN__EPOCHS': '1', 'TRAIN__WARMUP_EPOCHS': '0', 'SAVE_STEPS': '99'}
    program.main(config := tiny_config(DATA__DATA_PATH=str(image_tree), AUG__REPROB='0.5', **short))
    log = log_of(config)
    [line] = [line for line in log.splitlines() if 'differs from the defaults in: ' in line]
    assert 'config.yaml; differs' in line
    assert 'AUG.REPROB 0.5' in line
    assert 'AUG.REMODE' not in log
    assert 'SAVE_STEPS has no effect: an epoch has 2 updates' in log
