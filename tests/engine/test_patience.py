"""Early stopping: when it stops, what it leaves, and how the run goes on."""

from types import SimpleNamespace

import main as program
from tests.helpers.images import write_images
from tests.helpers.runs import PLAIN, folder_of, log_of, records

# A network that does not change, so that only the first evaluation is better than none
STILL = {'TRAIN__BASE_LR': '0', 'TRAIN__WARMUP_EPOCHS': '0', 'TRAIN__MIN_LR': '0', 'TRAIN__EPOCHS': '12'}
STILL |= {'TRAIN__EMA_DECAY': '0.9', 'SAVE_FREQ': '50', 'DATA__BATCH_SIZE': '24', **PLAIN}


def last_epoch(config):
    return records(config, 'epoch')[-1]


def test_a_run_stops_when_its_metric_does_not_improve(tiny_config, image_tree, tmp_path):
    options = {'DATA__DATA_PATH': str(image_tree), 'EVAL_FREQ': '2', **STILL}
    config = tiny_config(TRAIN__PATIENCE='2', **options)
    program.main(config)
    assert [last_epoch(config)[name] for name in ('epoch', 'stale_evaluations', 'early_stop')] == [5, 2, 1]
    assert [record['early_stop'] for record in records(config, 'epoch')[:-1]] == [0] * 5
    reason = 'early stopping after 6 epochs, since 2 evaluations in a row have not improved the accuracy of '
    assert reason in log_of(config)
    names = {path.name for path in folder_of(config).glob('*.pth')}
    assert names == {'ckpt_best.pth', 'ckpt_epoch_5.pth'}
    program.main(config)
    assert f'the run is finished: {reason}' in log_of(config)
    assert 'write a larger TRAIN.PATIENCE, or 0 for no early stopping' in log_of(config)
    assert len(records(config, 'epoch')) == 6
    program.main(tiny_config(TRAIN__PATIENCE='3', **options))  # goes on with the count of the checkpoint
    assert (last_epoch(config)['epoch'], last_epoch(config)['stale_evaluations']) == (7, 3)
    resume = str(folder_of(config) / 'ckpt_epoch_5.pth')
    resumed = tiny_config(TAG='resumed', MODEL__RESUME=resume, TRAIN__PATIENCE='3', **options)
    program.main(resumed)
    assert last_epoch(resumed)['epoch'] == 7
    options['DATA__DATA_PATH'] = str(write_images(tmp_path / 'more', train=9))
    program.main(tiny_config(TAG='more', MODEL__RESUME=resume, TRAIN__PATIENCE='2', **options))
    assert last_epoch(tiny_config(TAG='more'))['epoch'] == 11  # the count starts again: first 7, then 9 and 11


def test_an_improvement_starts_the_count_again(tiny_config, image_tree, monkeypatch):
    accuracies = iter([10.0, 20.0, 20.0, 30.0, float('nan'), 25.0, 30.0, 40.0])
    monkeypatch.setattr(program, 'validate', lambda *_: SimpleNamespace(metrics={'acc1': next(accuracies)}))
    options = {'DATA__DATA_PATH': str(image_tree), **STILL, 'TRAIN__EMA_DECAY': '0'}
    config = tiny_config(TRAIN__PATIENCE='3', **options)
    program.main(config)
    stale = [record['stale_evaluations'] for record in records(config, 'epoch')]
    assert stale == [0, 0, 1, 0, 1, 2, 3]
