"""Trackers of the project: what they keep of a run that was interrupted and resumed, offline."""

import re

import pytest

import main as program
from config import load_config
from tests.helpers.paths import TINY
from tests.helpers.runs import folder_of, records
from trackers import TRACKERS
from utils import UserError


def interrupted_run(tiny_config, image_tree, tracker):
    """The config of a run whose last epoch was trained twice."""
    config = tiny_config(DATA__DATA_PATH=str(image_tree), TRACKER=tracker)
    program.main(config)
    for name in ('ckpt_epoch_1.pth', 'ckpt_best.pth'):
        (folder_of(config) / name).unlink()
    program.main(config)
    assert 'failed' not in (folder_of(config) / 'log_rank0.txt').read_text()
    return config


@pytest.mark.slow
def test_wandb(tiny_config, image_tree, monkeypatch):
    pytest.importorskip('wandb')
    monkeypatch.delenv('WANDB_MODE', raising=False)
    config = interrupted_run(tiny_config, image_tree, 'tensorboard,wandb')
    assert (folder_of(config) / 'tensorboard').exists()
    files = sorted((folder_of(config) / 'wandb').glob('offline-run-*/*.wandb'))
    assert len(files) == 2
    assert len({path.name for path in files}) == 1  # one run, in two parts
    for path, start in zip(files, (0, 6), strict=True):  # the second process has repeated the last epoch
        epochs = [record for record in records(config, 'epoch') if record['updates'] > start]
        updates = [record['updates'] for record in records(config, 'train') if record['updates'] > start]
        content = path.read_bytes()
        assert logged(content, b'epoch/acc1') == {record['acc1'] for record in epochs}
        assert logged(content, b'epoch/val_loss') == {record['val_loss'] for record in epochs}
        assert logged(content, b'updates') == set(updates)


def logged(content, name):
    """The values of a metric in a file of Weights & Biases, which has no public reader."""
    lengths = re.finditer(name + rb'\x82\x01(.)', content, re.DOTALL)  # of the value's text, which follows
    return {float(content[match.end() : match.end() + match[1][0]]) for match in lengths}


@pytest.mark.slow
def test_mlflow(tiny_config, image_tree, monkeypatch):
    mlflow = pytest.importorskip('mlflow')
    monkeypatch.delenv('MLFLOW_TRACKING_URI', raising=False)
    config = interrupted_run(tiny_config, image_tree, 'mlflow')
    client = mlflow.MlflowClient(f'sqlite:///{config.OUTPUT}/mlflow.db')
    (run,) = client.search_runs([client.get_experiment_by_name('msg_transformer').experiment_id])
    assert run.info.status == 'FINISHED'
    assert run.info.run_name == 'tiny/default'
    assert run.data.params['TRAIN.EPOCHS'] == '2'
    written = {(m.step, m.value) for m in client.get_metric_history(run.info.run_id, 'epoch/acc1')}
    assert written == {(record['updates'], record['acc1']) for record in records(config, 'epoch')}


def test_a_missing_package_is_told_before_training(tiny_config, image_tree, monkeypatch):
    monkeypatch.setattr(TRACKERS['wandb'], 'package', 'no_such_package')
    with pytest.raises(UserError, match='TRACKER wandb needs the package no_such_package: pip install -r req'):
        program.main(tiny_config(DATA__DATA_PATH=str(image_tree), TRACKER='wandb'))


def test_the_key_of_earlier_versions_names_its_successor():
    with pytest.raises(
        UserError, match='config key TENSORBOARD does not exist: write TRACKER tensorboard or TRACKER none'
    ):
        load_config(TINY, ['TENSORBOARD', 'False'])
