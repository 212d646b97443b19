"""The folder of a run: which checkpoint is the newest, which go, which are set aside."""

import logging
import os

import pytest

from engine.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from engine.run_folder import RunFolder, progress_of


def folder_in(path, keep=0):
    return RunFolder(path, keep, logging.getLogger('test'))


def state(epoch=0, step=0, score=-1.0, save_keep=10):
    """A checkpoint after `step` updates of an epoch; after none, it ends the epoch before."""
    progress = {'epoch': epoch, 'step': step, 'images': 0, 'skipped': 0}
    config = {'SAVE_KEEP': save_keep}
    return {'model': {}, 'optimizer': {}, 'progress': progress, 'max_accuracy': score, 'config': config}


def names(folder):
    return [path.name.removeprefix('ckpt_epoch_').removesuffix('.pth') for path in folder.checkpoints()]


def test_checkpoints_are_ordered_by_epoch_and_update(tmp_path):
    folder = folder_in(tmp_path)
    assert folder.newest_complete() is None
    order = ['11_step_2', '10', '10_step_100', '10_step_20', '9', '2']
    for name in reversed(order):
        save_checkpoint(tmp_path / f'ckpt_epoch_{name}.pth', {'model': {}})
    for name in ('ckpt_epoch_12.pth.tmp', 'ckpt_epoch_x.pth', 'ckpt_epoch_12_step.pth'):
        (tmp_path / name).touch()
    os.utime(tmp_path / 'ckpt_epoch_9.pth')  # the newest by time
    assert names(folder) == order
    assert folder.newest_complete() == tmp_path / 'ckpt_epoch_11_step_2.pth'


def test_damaged_checkpoints_are_skipped_and_named(tmp_path, caplog):
    folder = folder_in(tmp_path)
    for epoch in range(5):
        folder.save({'model': {}, 'bytes': os.urandom(1000)}, epoch)
    (tmp_path / 'ckpt_epoch_4.pth').write_bytes(b'')
    (tmp_path / 'ckpt_epoch_3.pth').write_bytes(b'garbage')
    whole = (tmp_path / 'ckpt_epoch_2.pth').read_bytes()
    (tmp_path / 'ckpt_epoch_2.pth').write_bytes(whole[: len(whole) // 2])
    assert folder.newest_complete() == tmp_path / 'ckpt_epoch_1.pth'
    warnings = [record.getMessage() for record in caplog.records if record.levelname == 'WARNING']
    assert ['ckpt_epoch_4' in warnings[0], 'ckpt_epoch_3' in warnings[1], 'ckpt_epoch_2' in warnings[2]] == [True] * 3
    for epoch in (0, 1):
        (tmp_path / f'ckpt_epoch_{epoch}.pth').write_bytes(b'')
    with pytest.raises(CheckpointError, match='none of the 5 checkpoints .*AUTO_RESUME False'):
        folder.newest_complete()


def test_best_is_resumed_from_where_it_is_the_newest(tmp_path, caplog):
    folder = folder_in(tmp_path)
    folder.save(state(3), 2)
    folder.save_best(state(3))
    assert folder.newest_complete() == tmp_path / 'ckpt_epoch_2.pth'
    folder.save(state(3, 4), 3, 4)
    assert folder.newest_complete() == tmp_path / 'ckpt_epoch_3_step_4.pth'
    folder.save_best(state(4, score=90.0))
    assert folder.newest_complete() == tmp_path / 'ckpt_epoch_3.pth'  # its copy, since the next best replaces it
    assert load_checkpoint(tmp_path / 'ckpt_epoch_3.pth')['max_accuracy'] == 90
    (tmp_path / 'ckpt_epoch_3.pth').unlink()
    folder.best.write_bytes(b'damaged')
    assert folder.newest_complete() == tmp_path / 'ckpt_epoch_3_step_4.pth'
    assert 'skipping a damaged checkpoint' in caplog.text
    for path in folder.checkpoints():
        path.unlink()
    with pytest.raises(CheckpointError, match=r'none of the 1 checkpoints in .* can be read .*ckpt_best.pth'):
        folder.newest_complete()


def test_best_on_disk_is_replaced_by_a_higher_metric_only(tmp_path, caplog):
    folder = folder_in(tmp_path)
    assert folder.best_score() is None
    folder.save_best(state(1, score=90.0))
    folder.save_best(state(2, score=50.0))
    assert load_checkpoint(folder.best)['max_accuracy'] == 90
    assert 'has the higher metric, 90.00: it is kept' in caplog.text
    folder.save_best(state(3, score=91.0))
    assert folder.best_score() == 91
    folder.best.write_bytes(b'damaged')
    folder.save_best(state(4, score=10.0))
    assert folder.best_score() == 10
    folder.save_best(state(5, score=95.0) | {'scores': {'raw': 5.0, 'ema': 11.0}})  # its own, not the best so far
    assert folder.best_score() == 11


def test_weights_alone_are_not_resumed_from(tmp_path):
    folder = folder_in(tmp_path)
    save_checkpoint(folder.best, {'model': {}})
    assert folder.newest_complete() is None


def test_newest_are_kept_and_steps_go_when_their_epoch_is_complete(tmp_path):
    folder = folder_in(tmp_path, keep=2)
    folder.save_best(state())
    for epoch in range(3):
        for step in (2, 4, 6):
            folder.save(state(), epoch, step)
        assert names(folder)[:2] == [f'{epoch}_step_6', f'{epoch}_step_4']
        assert f'{epoch}_step_2' not in names(folder)
        folder.save(state(), epoch)
    assert names(folder) == ['2', '1']
    folder.save(state(), 3, 2)
    folder.save(state(), 4, 2)  # epoch 3 was not due
    assert names(folder) == ['4_step_2', '2', '1']
    assert folder.best.exists()


def test_files_of_runs_that_kept_all_are_never_removed(tmp_path):
    old = folder_in(tmp_path)
    for epoch in range(3):
        old.save(state(save_keep=0), epoch, 3)
        old.save({'model': {}}, epoch)  # without a config
    folder = folder_in(tmp_path, keep=1)
    for epoch in (3, 4, 5):
        folder.save(state(), epoch)
    assert names(folder) == ['5', '2', '2_step_3', '1', '1_step_3', '0', '0_step_3']


def test_what_looks_newer_is_set_aside_and_never_overwritten(tmp_path, caplog):
    folder = folder_in(tmp_path, keep=2)
    for number in (1, 2):
        folder.save(state(score=number), 2)
        folder.save(state(score=number), 1)
        assert names(folder) == ['1']
        assert load_checkpoint(tmp_path / f'old_{number}' / 'ckpt_epoch_2.pth')['max_accuracy'] == number
    assert caplog.text.count('they look newer than ckpt_epoch_1.pth') == 2


def test_newer_ones_than_the_checkpoint_resumed_from_are_set_aside_with_the_best(tmp_path):
    folder = folder_in(tmp_path)
    (tmp_path / 'metrics.jsonl').write_text('{}\n')
    for epoch in range(4):
        folder.save(state(epoch + 1), epoch)
    folder.save_best(state(2, score=80.0))
    folder.set_newer_aside(progress_of(state(3)))
    assert names(folder) == ['2', '1', '0']
    assert folder.best_score() == 80  # of epoch 1
    folder.set_newer_aside(progress_of(state(1)))
    assert names(folder) == ['0']
    assert {path.name for path in (tmp_path / 'old_2').iterdir()} == {
        'ckpt_best.pth', 'ckpt_epoch_1.pth', 'ckpt_epoch_2.pth', 'metrics.jsonl',
    }  # fmt: skip
    folder.set_newer_aside(progress_of(state(1)))
    assert not (tmp_path / 'old_3').exists()


def test_a_new_run_sets_all_of_an_old_one_aside_except_its_log(tmp_path):
    folder = folder_in(tmp_path)
    (tmp_path / 'log_rank0.txt').touch()
    (tmp_path / 'metrics.jsonl').touch()
    folder.set_run_aside('a new run')
    assert not (tmp_path / 'old_1').exists()  # no checkpoint, nothing to lose
    folder.save(state(), 0)
    folder.save_best(state())
    (tmp_path / 'tensorboard').mkdir()
    folder.set_run_aside('a new run')
    assert {path.name for path in tmp_path.iterdir()} == {'log_rank0.txt', 'old_1'}
    assert {path.name for path in (tmp_path / 'old_1').iterdir()} == {
        'ckpt_best.pth', 'ckpt_epoch_0.pth', 'metrics.jsonl', 'tensorboard',
    }  # fmt: skip


def test_failed_save_removes_nothing(tmp_path, monkeypatch):
    folder = folder_in(tmp_path, keep=1)
    folder.save(state(), 0)
    monkeypatch.setattr(os, 'fsync', lambda _: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
    with pytest.raises(CheckpointError):
        folder.save(state(), 1)
    assert names(folder) == ['0']
