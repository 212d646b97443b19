"""How a run starts, resumes and ends."""

import contextlib
import os
import signal

import pytest
import torch

import main as program
from config import load_config
from engine import run, run_task
from engine.checkpoint import CheckpointError
from engine.distributed import Process
from engine.signals import EXIT_STOPPED, STOP_SIGNALS, Stopped
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


def test_a_run_goes_on_from_a_checkpoint_of_another_one(tiny_config, image_tree):
    """Without random augmentation, two halves equal the whole."""
    data = {'DATA__DATA_PATH': str(image_tree), 'TRAIN__EPOCHS': '3', **PLAIN}
    whole = tiny_config(TAG='whole', **data)
    with one_thread():
        program.main(whole)
        first = folder_of(whole) / 'ckpt_epoch_0.pth'
        explicit = tiny_config(TAG='explicit', MODEL__RESUME=str(first), **data)
        program.main(explicit)
        assert [record['epoch'] for record in records(explicit, 'epoch')] == [1, 2]
        assert_same_weights(weights(whole, 'ckpt_epoch_2.pth'), weights(explicit, 'ckpt_epoch_2.pth'), rtol=0, atol=0)

        for name in ('ckpt_epoch_2.pth', 'ckpt_best.pth'):
            (folder_of(whole) / name).unlink()
        program.main(whole)  # automatic: from epoch 1
        assert [record['epoch'] for record in records(whole, 'epoch')] == [0, 1, 2]
        assert_same_weights(weights(whole, 'ckpt_epoch_2.pth'), weights(explicit, 'ckpt_epoch_2.pth'), rtol=0, atol=0)


def test_start_epoch(tiny_config, image_tree):
    data = {'DATA__DATA_PATH': str(image_tree)}
    config = tiny_config(**data, TRAIN__START_EPOCH='1', TAG='from_1')
    whole = tiny_config(**data)
    program.main(whole)
    first = records(whole, 'train')[6]
    program.main(config)
    assert [record['epoch'] for record in records(config, 'epoch')] == [1]
    assert records(config, 'train')[0]['lr'] == first['lr']  # the schedule starts in the middle too


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
    for name in ('ckpt_epoch_1.pth', 'ckpt_best.pth'):
        (folder_of(config) / name).unlink(missing_ok=True)
    program.main(config)  # its own checkpoint overrides the weights it started from
    assert [record['epoch'] for record in records(config, 'epoch')] == [0, 1]
    torch.save({'model': trained}, tmp_path / 'trained.pth')
    with pytest.raises(CheckpointError, match='has no optimizer, epoch, max_accuracy.*--pretrained'):
        program.main(tiny_config(TAG='other', MODEL__RESUME=str(tmp_path / 'trained.pth'), **no_updates))


class Started(BaseException):
    """Raised instead of looking for a checkpoint, once a run has started."""


@pytest.fixture
def start_only(monkeypatch):
    """A function that starts a run, and no more."""

    def find_start(*_):
        raise Started

    def start(config):
        with pytest.raises(Started):
            program.main(config)

    monkeypatch.setattr(run_task, 'find_start', find_start)
    return start


def test_rank_r_is_seeded_with_seed_plus_r(tiny_config, monkeypatch, start_only):
    seeds = []
    monkeypatch.setattr(run, 'start_process', lambda *_: contextlib.nullcontext(Process(3, 8, CPU)))
    monkeypatch.setattr(run, 'set_seed', seeds.append)
    start_only(tiny_config(SEED='40', EVAL_MODE='True', MODEL__RESUME='x'))
    assert seeds == [43]


@pytest.fixture
def handlers():
    """Signal handlers as before the test: a stopped run ignores further signals."""
    before = [(number, signal.getsignal(number)) for number in STOP_SIGNALS]
    yield
    for number, handler in before:
        signal.signal(number, handler)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_training_ends_the_run_in_an_orderly_way(
    tiny_config, image_tree, monkeypatch, handlers, number
):
    build_loaders = program.build_loaders

    def signalled(*arguments):
        os.kill(os.getpid(), number)
        return build_loaders(*arguments)

    monkeypatch.setattr(program, 'build_loaders', signalled)
    config = tiny_config(DATA__DATA_PATH=str(image_tree))
    with pytest.raises(Stopped) as exit_:
        program.main(config)
    assert exit_.value.code == EXIT_STOPPED
    assert 'stopped by a signal before training: start again' in log_of(config)
    assert not list(folder_of(config).glob('ckpt_*'))


def test_a_signal_while_a_run_waits_for_its_folder(tiny_config, monkeypatch, handlers):
    monkeypatch.setattr(run.RunLock, 'acquire', lambda self, wait, is_stopped: is_stopped() or not wait)
    config = tiny_config()
    with pytest.raises(Stopped):
        program.main(config)
    assert not (folder_of(config) / 'log_rank0.txt').exists()  # of the run that has the folder


def test_compilation_is_announced(tiny_config, image_tree, monkeypatch):
    monkeypatch.setattr(torch, 'compile', lambda network, **_: network)
    config = tiny_config(DATA__DATA_PATH=str(image_tree), TRAIN__COMPILE='True', **PLAIN)
    program.main(config)
    log = log_of(config)
    assert log.index('the first batch of training or evaluation takes minutes') < log.index('Train: [0/2]')
    assert log.index('Train: [0/2][0/6]\teta ? lr') < log.index('1 epochs to go, about ?') < log.index('about 0:00')
    assert log.count('eta ?') == 1
    program.main(tiny_config(DATA__DATA_PATH=str(image_tree), TRAIN__COMPILE='True', TRAIN__EPOCHS='4', **PLAIN))
    assert log_of(config).count('eta ?') == 2  # a resumed run compiles again


def test_log_says_how_many_threads_and_why(tiny_config, monkeypatch, start_only):
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    config = tiny_config()
    start_only(config)
    assert 'thread(s): OMP_NUM_THREADS' in log_of(config)
