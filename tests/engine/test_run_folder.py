"""The folder of a run: which checkpoint is the newest, which is the best, which are removed."""

import logging
import os

import pytest
import torch

from engine import run_folder
from engine.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from engine.run_folder import RunFolder


def folder_in(path, keep=0):
    return RunFolder(path, keep, logging.getLogger('test'))


def state(epoch=0, step=0, score=-1.0, save_keep=10, batch_size=4):
    """A checkpoint after `step` updates of an epoch; after none, it ends the epoch before."""
    progress = {'epoch': epoch, 'step': step, 'images': step * batch_size, 'skipped': 0}
    config = {'SAVE_KEEP': save_keep}
    return {'model': {}, 'optimizer': {}, 'progress': progress, 'max_accuracy': score, 'config': config}


def names(folder):
    return [path.name.removeprefix('ckpt_epoch_').removesuffix('.pth') for path in folder.checkpoints()]


def test_checkpoints_are_ordered_by_epoch_and_update(tmp_path):
    folder = folder_in(tmp_path)
    assert folder.newest_intact() is None
    order = ['11_step_2', '10', '10_step_100', '10_step_20', '9', '2']
    for name in reversed(order):
        epoch, _, step = name.partition('_step_')
        save_checkpoint(tmp_path / f'ckpt_epoch_{name}.pth', state(int(epoch), int(step or 0)))
    for name in ('ckpt_epoch_12.pth.tmp', 'ckpt_epoch_x.pth', 'ckpt_epoch_12_step.pth'):
        (tmp_path / name).touch()
    os.utime(tmp_path / 'ckpt_epoch_9.pth')  # the newest by time
    assert names(folder) == order
    assert folder.newest_intact() == tmp_path / 'ckpt_epoch_11_step_2.pth'


def test_damaged_checkpoints_are_skipped_and_named(tmp_path, caplog):
    folder = folder_in(tmp_path)
    for epoch in range(5):
        folder.save({'model': {}, 'bytes': os.urandom(1000)}, epoch)
    (tmp_path / 'ckpt_epoch_4.pth').write_bytes(b'')
    (tmp_path / 'ckpt_epoch_3.pth').write_bytes(b'garbage')
    whole = (tmp_path / 'ckpt_epoch_2.pth').read_bytes()
    (tmp_path / 'ckpt_epoch_2.pth').write_bytes(whole[: len(whole) // 2])
    assert folder.newest_intact() == tmp_path / 'ckpt_epoch_1.pth'
    warnings = [record.getMessage() for record in caplog.records if record.levelname == 'WARNING']
    assert ['ckpt_epoch_4' in warnings[0], 'ckpt_epoch_3' in warnings[1], 'ckpt_epoch_2' in warnings[2]] == [True] * 3
    for epoch in (0, 1):
        (tmp_path / f'ckpt_epoch_{epoch}.pth').write_bytes(b'')
    with pytest.raises(CheckpointError, match='none of the 5 checkpoints .*: to start over, write another --tag'):
        folder.newest_intact()


def test_best_is_resumed_from_where_it_is_the_newest(tmp_path, caplog):
    folder = folder_in(tmp_path)
    folder.save(state(3), 2)
    folder.save_best(state(3))
    assert folder.newest_intact() == tmp_path / 'ckpt_epoch_2.pth'
    folder.save(state(3, 4), 3, 4)
    assert folder.newest_intact() == tmp_path / 'ckpt_epoch_3_step_4.pth'
    folder.save_best(state(4, score=90.0))
    assert folder.newest_intact() == folder.best
    assert folder.copy_best(load_checkpoint(folder.best)) == tmp_path / 'ckpt_epoch_3.pth'
    assert folder.newest_intact() == tmp_path / 'ckpt_epoch_3.pth'
    assert load_checkpoint(tmp_path / 'ckpt_epoch_3.pth')['max_accuracy'] == 90
    (tmp_path / 'ckpt_epoch_3.pth').unlink()
    folder.best.write_bytes(b'damaged')
    assert folder.newest_intact() == tmp_path / 'ckpt_epoch_3_step_4.pth'
    assert 'skipping a damaged checkpoint' in caplog.text
    for path in folder.checkpoints():
        path.unlink()
    with pytest.raises(CheckpointError, match=r'none of the 1 checkpoints in .* can be read .*ckpt_best.pth'):
        folder.newest_intact()


@pytest.mark.parametrize(
    ('on_disk', 'scores', 'expected'),
    [
        (None, {'raw': 1.0}, True),
        ({'raw': 90.0}, {'raw': 50.0}, False),
        ({'raw': 90.0}, {'raw': 91.0}, True),
        ({'raw': 5.0, 'ema': 11.0}, {'raw': 95.0, 'ema': 10.0}, False),  # EMA weights decide
        ({'raw': 90.0, 'loss': 1.0}, {'raw': 90.0, 'loss': 0.9}, True),  # a tie: the lower loss
        ({'raw': 90.0, 'loss': 1.0}, {'raw': 90.0, 'loss': 1.0}, False),
        ({'raw': 90.0}, {'raw': 90.0, 'loss': 0.9}, False),  # of an older version, or a task without a loss
        ({'raw': 90.0, 'loss': 1.0}, {'raw': float('nan'), 'loss': 0.9}, False),
        (None, {'raw': float('nan')}, False),
    ],
)
def test_best_has_the_highest_metric_and_then_the_lowest_loss(tmp_path, on_disk, scores, expected):
    folder = folder_in(tmp_path)
    if on_disk is not None:
        folder.save_best(state(1) | {'scores': on_disk})
    assert folder.is_best(scores) == expected


def test_a_damaged_best_does_not_count_and_an_older_one_has_the_best_metric_so_far(tmp_path):
    folder = folder_in(tmp_path)
    weights = torch.tensor(list(b'weights'), dtype=torch.uint8)
    folder.save_best(state(1, score=90.0) | {'model': {'x': weights}})
    assert not folder.is_best({'raw': 50.0})
    content = bytearray(folder.best.read_bytes())
    content[content.index(b'weights')] ^= 1  # in a tensor, so the metric can still be read
    folder.best.write_bytes(content)
    assert not folder.is_best({'raw': 10.0})
    with pytest.raises(CheckpointError, match='none of the 1 checkpoints'):
        folder.newest_intact()
    assert folder.is_best({'raw': 10.0})
    folder.save_best(state(2, score=10.0))
    assert not folder.is_best({'raw': 9.0})
    folder.best.write_bytes(b'damaged')
    assert folder.is_best({'raw': 1.0})


def test_weights_alone_are_not_resumed_from(tmp_path):
    folder = folder_in(tmp_path)
    save_checkpoint(folder.best, {'model': {}})
    assert folder.newest_intact() is None


def test_newest_are_kept_and_steps_go_when_their_epoch_is_complete(tmp_path):
    folder = folder_in(tmp_path, keep=2)
    folder.save_best(state())
    for epoch in range(3):
        for step in (2, 4, 6):
            folder.save(state(epoch, step), epoch, step)
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


def test_progress_within_an_epoch_goes_by_images(tmp_path):
    """A run goes on with twice the batch size: a later checkpoint has a smaller number of updates."""
    folder = folder_in(tmp_path, keep=1)
    folder.save(state(3, 30), 3, 30)
    folder.save(state(3, 20, batch_size=8), 3, 20)
    assert names(folder) == ['3_step_20']
    folder.keep = 0
    folder.save(state(3, 30), 3, 30)
    assert names(folder) == ['3_step_20', '3_step_30']
    assert folder.newest_intact() == tmp_path / 'ckpt_epoch_3_step_20.pth'


def test_saving_reads_no_checkpoint_but_those_it_removes(tmp_path, monkeypatch):
    """Reading one takes a fifth of the time of writing one."""
    folder, read = folder_in(tmp_path, keep=3), []
    peek = run_folder.peek_checkpoint
    monkeypatch.setattr(run_folder, 'peek_checkpoint', lambda path: (read.append(path.name), peek(path))[1])
    for step in range(1, 6):
        folder.save(state(0, step), 0, step)
    assert read == ['ckpt_epoch_0_step_1.pth', 'ckpt_epoch_0_step_2.pth']
    assert names(folder) == ['0_step_5', '0_step_4', '0_step_3']


def test_failed_save_removes_nothing(tmp_path, monkeypatch):
    folder = folder_in(tmp_path, keep=1)
    folder.save(state(), 0)
    monkeypatch.setattr(os, 'fsync', lambda _: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
    with pytest.raises(CheckpointError):
        folder.save(state(), 1)
    assert names(folder) == ['0']
