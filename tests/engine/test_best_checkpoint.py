"""The best checkpoint is never lost, wherever a run is killed."""

import pytest

import main as program
from engine import run_folder
from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.run_folder import RunFolder
from engine.trainer import Trainer
from evaluation import Accuracy
from tests.helpers.runs import PLAIN, folder_of, one_thread, records

SCORES = [10.0, 90.0, 50.0, 60.0, 20.0, 95.0]  # faked, by epoch


class Killed(BaseException):
    """As far as the run's files go, a SIGKILL."""


@pytest.fixture
def scored(monkeypatch, tiny_config, image_tree):
    """The config of a run of two updates an epoch, with faked scores and few checkpoints."""
    rare = {'TRAIN__EPOCHS': '6', 'DATA__BATCH_SIZE': '12', 'SAVE_STEPS': '1', 'SAVE_FREQ': '4'}
    config = tiny_config(DATA__DATA_PATH=str(image_tree), TRACKER='none', **rare, **PLAIN)
    epoch_of = {}
    monkeypatch.setattr(Trainer, '_epoch', _remember_epoch(Trainer._epoch, epoch_of))
    monkeypatch.setattr(program, 'validate', lambda *_: Accuracy(1.0, SCORES[epoch_of['now']], 100.0, 12))
    with one_thread():
        yield config


def _remember_epoch(epoch_function, epoch_of):
    def epoch(trainer):
        epoch_of['now'] = trainer.state.epoch
        epoch_function(trainer)

    return epoch


def best_score(config):
    """The metric of the best checkpoint; None if there is none."""
    path = folder_of(config) / 'ckpt_best.pth'
    return load_checkpoint(path)['scores']['raw'] if path.exists() else None


def kill_at(monkeypatch, point):
    """Kill the run before or after its n-th write of a checkpoint: `point` is 2 n, or 2 n + 1.

    Returns:
        The names of the files written.
    """
    save, written = run_folder.save_checkpoint, []

    def save_or_die(path, state):
        if 2 * len(written) == point:
            raise Killed
        save(path, state)
        written.append(path.name)
        if 2 * len(written) - 1 == point:
            raise Killed

    monkeypatch.setattr(run_folder, 'save_checkpoint', save_or_die)
    return written


@pytest.mark.slow
def test_best_never_falls_wherever_the_run_is_killed(scored, monkeypatch):
    """Epochs after the kill score nothing, so the best must be that of before."""
    with monkeypatch.context() as patch:
        whole = kill_at(patch, -1)
        program.main(scored)
    assert (len(whole), whole.count('ckpt_best.pth')) == (11, 3)  # six within epochs, two at ends of epochs
    for point in [*range(0, 2 * len(whole), 2), 2 * len(whole) - 1]:  # after a write is before the next one
        for path in folder_of(scored).glob('ckpt_*'):
            path.unlink()
        with monkeypatch.context() as patch:
            written = kill_at(patch, point)
            with pytest.raises(Killed):
                program.main(scored)
        bests = written.count('ckpt_best.pth')
        assert best_score(scored) == [None, 10, 90, 95][bests], point
        with monkeypatch.context() as patch:
            patch.setattr(program, 'validate', lambda *_: Accuracy(1.0, 1.0, 100.0, 12))
            program.main(scored)
        assert best_score(scored) == [1, 10, 90, 95][bests], point
        assert [record['epoch'] for record in records(scored, 'epoch')] == list(range(6)), point


def test_a_best_between_two_saves_survives_a_kill_and_worse_epochs(scored, monkeypatch):
    """Killed after the best of 90, before the next checkpoint that is due."""
    monkeypatch.setattr(Trainer, 'save', _best_only(Trainer.save))
    with monkeypatch.context() as patch:
        kill_at(patch, 4)  # before its third best
        with pytest.raises(Killed):
            program.main(scored)
    assert (best_score(scored), RunFolder(folder_of(scored), 0, None).checkpoints()) == (90, [])
    worse = [*SCORES[:5], 30.0]
    monkeypatch.setattr(
        program, 'validate', lambda run, *_: Accuracy(1.0, worse[len(records(scored, 'epoch'))], 100, 12)
    )
    program.main(scored)
    assert best_score(scored) == 90
    assert len(records(scored, 'epoch')) == 6


def _best_only(save):
    def save_best(trainer, epoch, step=None, is_best=False, is_due=True):
        if is_best:
            save(trainer, epoch, step, is_best, is_due=False)

    return save_best


def test_a_better_best_on_disk_is_kept(scored, tiny_config, monkeypatch):
    """The newest checkpoint knows of no better metric than 10, as after a kill in an older version."""
    program.main(scored)
    newest = folder_of(scored) / 'ckpt_epoch_5.pth'
    save_checkpoint(newest, load_checkpoint(newest) | {'max_accuracy': 10.0})
    best = folder_of(scored) / 'ckpt_best.pth'
    before = best.read_bytes()
    monkeypatch.setattr(program, 'validate', lambda *_: Accuracy(1.0, 20.0, 100.0, 12))
    longer = {'TRAIN__EPOCHS': '8', 'DATA__BATCH_SIZE': '12', 'DATA__DATA_PATH': scored.DATA.DATA_PATH}
    program.main(tiny_config(**longer, **PLAIN))
    assert best.read_bytes() == before
    assert [record['acc1'] for record in records(scored, 'epoch')][-2:] == [20, 20]
