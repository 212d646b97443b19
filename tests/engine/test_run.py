"""How a run starts, resumes and ends."""

import contextlib

import pytest
import torch

import main as program
from config import load_config
from engine import run
from engine.checkpoint import CheckpointError
from engine.distributed import Process
from models import build_model
from tests.helpers.golden import fill_
from tests.helpers.runs import CPU, PLAIN, assert_same_weights, folder_of, log_of, one_thread, records, weights


def test_saved_config_reproduces_the_run(tiny_config, image_tree, tmp_path):
    config = tiny_config(DATA__DATA_PATH=str(image_tree))
    with one_thread():
        program.main(config)
        again = load_config(folder_of(config) / 'config.yaml', ['OUTPUT', str(tmp_path / 'again')])
        program.main(again)
    assert_same_weights(weights(config), weights(again), rtol=0, atol=0)


def test_explicit_checkpoint_overrides_automatic_resuming(tiny_config, image_tree):
    """Without random augmentation, two halves equal the whole; --resume overrides the newest checkpoint."""
    data = {'DATA__DATA_PATH': str(image_tree), 'TRAIN__EPOCHS': '3', **PLAIN}
    whole = tiny_config(TAG='whole', **data)
    with one_thread():
        program.main(whole)
        first = folder_of(whole) / 'ckpt_epoch_0.pth'
        explicit = tiny_config(TAG='explicit', MODEL__RESUME=str(first), **data)
        program.main(explicit)
        assert [record['epoch'] for record in records(explicit, 'epoch')] == [1, 2]
        assert_same_weights(weights(whole, 'ckpt_epoch_2.pth'), weights(explicit, 'ckpt_epoch_2.pth'), rtol=0, atol=0)

        (folder_of(whole) / 'ckpt_epoch_2.pth').unlink()
        program.main(whole)  # automatic: from epoch 1
        assert [record['epoch'] for record in records(whole, 'epoch')] == [0, 1, 2]
        assert_same_weights(weights(whole, 'ckpt_epoch_2.pth'), weights(explicit, 'ckpt_epoch_2.pth'), rtol=0, atol=0)

        again = tiny_config(TAG='whole', MODEL__RESUME=str(first), **data)
        program.main(again)  # the folder has a newer one
        assert [record['epoch'] for record in records(whole, 'epoch')] == [0, 1, 2]
        assert 'resuming at epoch 1, update 0' in log_of(whole)


def test_finished_run_has_nothing_to_train(tiny_config, image_tree):
    config = tiny_config(DATA__DATA_PATH=str(image_tree))
    program.main(config)
    program.main(config)
    assert len(records(config, 'epoch')) == 2
    assert 'nothing to train: epoch 2 of TRAIN.EPOCHS 2' in log_of(config)


def test_auto_resume_off_and_start_epoch(tiny_config, image_tree):
    data = {'DATA__DATA_PATH': str(image_tree)}
    config = tiny_config(**data, TRAIN__AUTO_RESUME='False', TRAIN__START_EPOCH='1')
    program.main(tiny_config(**data))
    first = records(config, 'train')[6]
    program.main(config)
    assert [record['epoch'] for record in records(config, 'epoch')] == [0, 1]
    assert records(config, 'train')[6:][0]['lr'] == first['lr']  # the schedule starts in the middle too


def test_pretrained_starts_a_new_run_with_a_new_head(tiny_config, image_tree, tmp_path):
    source = tiny_config(MODEL__NUM_CLASSES='9')
    torch.save({'model': fill_(build_model(source)).state_dict()}, tmp_path / 'weights.pth')
    no_updates = {
        'TRAIN__BASE_LR': '0',
        'TRAIN__WARMUP_LR': '0',
        'TRAIN__MIN_LR': '0',
        'DATA__DATA_PATH': str(image_tree),
    }
    config = tiny_config(MODEL__PRETRAINED=str(tmp_path / 'weights.pth'), **no_updates)
    program.main(config)
    trained = weights(config)
    assert torch.equal(trained['msg_tokens'], fill_(build_model(source)).state_dict()['msg_tokens'])
    assert trained['head.weight'].shape == (3, 16)
    assert len(records(config, 'epoch')) == 2
    (folder_of(config) / 'ckpt_epoch_1.pth').unlink()
    program.main(config)  # its own checkpoint overrides the weights it started from
    assert [record['epoch'] for record in records(config, 'epoch')] == [0, 1]
    torch.save({'model': trained}, tmp_path / 'trained.pth')
    with pytest.raises(CheckpointError, match='has no optimizer, epoch, max_accuracy.*--pretrained'):
        program.main(tiny_config(TAG='other', MODEL__RESUME=str(tmp_path / 'trained.pth'), **no_updates))


def test_automatic_resuming_of_a_different_model_names_a_remedy(tiny_config, image_tree):
    program.main(tiny_config(DATA__DATA_PATH=str(image_tree)))
    with pytest.raises(CheckpointError, match='holds a different model from the config.*write another --tag or'):
        program.main(tiny_config(DATA__DATA_PATH=str(image_tree), MODEL__MSG__EMBED_DIM='16'))


def test_other_class_names_than_the_checkpoints_are_reported(tiny_config, image_tree, capsys):
    options = {'DATA__DATA_PATH': str(image_tree), **PLAIN}
    program.main(tiny_config(**options))
    for split in ('train', 'val'):
        (image_tree / split / 'class_2').rename(image_tree / split / 'other')
    assert 'other names in the checkpoint' not in capsys.readouterr().out
    message = '1 of the 3 classes have other names in the checkpoint (other for class_2)'
    path = str(folder_of(tiny_config()) / 'ckpt_epoch_1.pth')
    program.main(tiny_config(EVAL_MODE='True', MODEL__RESUME=path, **options))
    assert message in capsys.readouterr().out
    program.main(tiny_config(TRAIN__EPOCHS='3', **options))
    assert message in capsys.readouterr().out


def test_rank_r_is_seeded_with_seed_plus_r(tiny_config, monkeypatch):
    seeds = []
    monkeypatch.setattr(run, 'start_process', lambda *_: contextlib.nullcontext(Process(3, 8, CPU)))
    monkeypatch.setattr(run, 'set_seed', seeds.append)
    monkeypatch.setattr(program, 'throughput', lambda *_: None)
    program.main(tiny_config(SEED='40', THROUGHPUT_MODE='True'))
    assert seeds == [43]
