"""A run that is interrupted and resumed ends with the same bits as one that is not, wherever it stops."""

import os
import signal

import pytest
import torch

import main as program
from engine.checkpoint import CheckpointError, load_checkpoint
from engine.signals import STOP_SIGNALS, Stopped
from engine.trainer import Trainer
from tests.helpers.images import write_images
from tests.helpers.runs import CPU, RANDOM, differences, folder_of, last_checkpoint, log_of, one_thread, records
from utils import random_states, set_seed


@pytest.fixture
def steady(image_tree):
    with one_thread():
        yield {'DATA__DATA_PATH': str(image_tree), 'SAVE_KEEP': '0', **RANDOM}


@pytest.mark.parametrize(
    'options',
    [
        {},
        {'TRAIN__ACCUMULATION_STEPS': '4'},  # two updates an epoch, the second of two batches
        {'AMP_OPT_LEVEL': 'O1', 'AMP_DTYPE': 'float16'},
        {'TRAIN__OPTIMIZER__NAME': 'sgd', 'TRAIN__LR_SCHEDULER__NAME': 'linear'},
    ],
    ids=['plain', 'accumulation', 'float16', 'sgd'],
)
def test_resumes_bit_for_bit_from_every_update(tiny_config, steady, options):
    whole = tiny_config(TAG='whole', SAVE_STEPS='1', **steady, **options)
    program.main(whole)
    expected = last_checkpoint(whole)
    steps = 2 if 'TRAIN__ACCUMULATION_STEPS' in options else 6
    inside = [f'ckpt_epoch_{epoch}_step_{step}.pth' for epoch in range(3) for step in range(1, steps)]
    ends = [f'ckpt_epoch_{epoch}.pth' for epoch in range(3)]
    assert {path.name for path in folder_of(whole).glob('ckpt_epoch_*')} == {*inside, *ends}
    starts = [*inside[::2], *ends[:2]] if not options else [inside[0], inside[-1], ends[0]]
    for number, name in enumerate(starts):
        workers = '2' if number == 2 else '0'  # the number of DataLoader workers does not matter either
        start = str(folder_of(whole) / name)
        config = tiny_config(TAG=name, MODEL__RESUME=start, DATA__NUM_WORKERS=workers, **steady, **options)
        program.main(config)
        assert differences(expected, last_checkpoint(config)) == [], name
        assert 'the run resumes bit for bit, as if it had never stopped' in log_of(config)


def test_signal_stops_after_the_current_update(tiny_config, steady, monkeypatch):
    whole = tiny_config(TAG='whole', **steady)
    program.main(whole)
    train_step = Trainer.train_step

    def signalled(trainer, *arguments):
        if (trainer.state.epoch, trainer.state.step) == (1, 2):
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(trainer, *arguments)

    handlers = [(number, signal.getsignal(number)) for number in STOP_SIGNALS]
    config = tiny_config(TAG='stopped', **steady)
    try:
        monkeypatch.setattr(Trainer, 'train_step', signalled)
        with pytest.raises(Stopped):
            program.main(config)
    finally:  # a stopped run ignores further signals
        for number, handler in handlers:
            signal.signal(number, handler)
    assert (folder_of(config) / 'ckpt_epoch_1_step_3.pth').exists()
    assert records(config, 'train')[-1]['step'] == 2
    monkeypatch.setattr(Trainer, 'train_step', train_step)
    program.main(config)
    assert differences(last_checkpoint(whole), last_checkpoint(config)) == []


def test_other_random_states_or_images_give_other_bits(tiny_config, steady):
    whole = tiny_config(TAG='whole', SAVE_STEPS='4', **steady)
    program.main(whole)
    path = folder_of(whole) / 'ckpt_epoch_0_step_4.pth'
    for name in ('python', 'numpy', 'torch', 'order'):
        checkpoint = load_checkpoint(path)
        if name == 'order':
            checkpoint['sampler']['order'] = checkpoint['sampler']['order'].flip(0)
        else:
            set_seed(5)
            checkpoint['ranks'][0]['random'][name] = random_states(CPU)[name]
        torch.save(checkpoint, path.with_name('changed.pth'))
        config = tiny_config(TAG=name, MODEL__RESUME=str(path.with_name('changed.pth')), **steady)
        program.main(config)
        changed_entry = 'ranks' if name == 'python' else 'model'  # nothing draws from Python's
        assert changed_entry in differences(last_checkpoint(whole), last_checkpoint(config))


def test_metrics_of_a_resumed_run_are_those_of_the_whole(tiny_config, steady):
    whole = tiny_config(TAG='whole', SAVE_STEPS='4', **steady)
    program.main(whole)
    for path in (*folder_of(whole).glob('ckpt_epoch_2*'), folder_of(whole) / 'ckpt_best.pth'):
        path.unlink()
    timed = {'seconds', 'data_s', 'images_per_s', 'memory_mb'}

    def metrics():
        kept = records(whole, 'train') + records(whole, 'epoch')
        return [{key: value for key, value in record.items() if key not in timed} for record in kept]

    before = metrics()
    (folder_of(whole) / 'ckpt_epoch_1.pth').unlink()  # the newest is now inside epoch 1
    with (folder_of(whole) / 'metrics.jsonl').open('a') as file:
        file.write('{"kind": "train", "upd')  # of a run that was killed
    program.main(whole)
    assert metrics() == before  # each record once; the epoch's mean loss is over all its updates
    assert 'resuming at epoch 1, update 4' in log_of(whole)


def test_another_batch_size_resumes_after_the_images_seen(tiny_config, steady, monkeypatch):
    program.main(tiny_config(TAG='whole', SAVE_STEPS='3', **steady))
    start = folder_of(tiny_config(TAG='whole')) / 'ckpt_epoch_1_step_3.pth'
    seen = []
    train_step = Trainer.train_step

    def note(trainer, *arguments):
        seen.append((trainer.state.epoch, trainer.state.step, trainer.state.images))
        return train_step(trainer, *arguments)

    monkeypatch.setattr(Trainer, 'train_step', note)
    config = tiny_config(TAG='two', DATA__BATCH_SIZE='2', MODEL__RESUME=str(start), **steady)
    program.main(config)
    assert seen[:6] == [(1, step, 2 * step) for step in range(6, 12)]
    log = log_of(config)
    assert 'not bit for bit: update 3 of its epoch is update 6 here; DATA.BATCH_SIZE has changed' in log
    seen.clear()
    program.main(tiny_config(TAG='eight', DATA__BATCH_SIZE='8', MODEL__RESUME=str(start), **steady))
    assert seen[:2] == [(1, 1, 8), (1, 2, 16)]  # 12 images had been seen: the last whole update


def test_changed_keys_are_named(tiny_config, steady):
    program.main(tiny_config(**steady))
    start = folder_of(tiny_config()) / 'ckpt_epoch_1.pth'
    harmless = {'PRINT_FREQ': '7', 'DATA__NUM_WORKERS': '1', 'SAVE_STEPS': '5', 'MODEL__RESUME': str(start)}
    for options, message in (
        ({}, 'the run resumes bit for bit, as if it had never stopped'),
        ({'SEED': '7', 'TRAIN__BASE_LR': '0.2'}, 'not bit for bit: SEED has changed; TRAIN.BASE_LR has changed'),
        (
            {'AMP_OPT_LEVEL': 'O1', 'AMP_DTYPE': 'bfloat16'},
            'AMP_OPT_LEVEL has changed; AMP_DTYPE has changed; precision was float32 and is bfloat16 autocast',
        ),
    ):
        config = tiny_config(TAG='again', **harmless, **steady, **options)
        program.main(config)
        log = log_of(config).splitlines()
        assert [line for line in log if 'the run resumes' in line][-1].endswith(message)


def test_another_batch_size_leaves_the_newest_checkpoint_the_newest(tiny_config, steady):
    """With a larger batch, a later checkpoint within an epoch has a smaller number of updates."""
    small = tiny_config(SAVE_STEPS='8', DATA__BATCH_SIZE='2', **steady)
    program.main(small)
    folder = folder_of(small)

    def keep_only(*names):
        for path in folder.glob('ckpt_*'):
            if path.name not in names:
                path.unlink()
        assert {path.name for path in folder.glob('ckpt_*')} == set(names)

    keep_only('ckpt_epoch_0_step_8.pth')
    large = tiny_config(SAVE_STEPS='5', **steady)  # batches of four
    program.main(large)
    assert 'resuming at epoch 0, update 4' in log_of(large)
    keep_only('ckpt_epoch_0_step_8.pth', 'ckpt_epoch_0_step_5.pth')
    program.main(large)
    assert 'resuming at epoch 0, update 5' in log_of(large)


def test_another_dataset_cannot_resume_inside_an_epoch(tiny_config, steady, tmp_path):
    program.main(tiny_config(SAVE_STEPS='3', **steady))
    start = folder_of(tiny_config()) / 'ckpt_epoch_1_step_3.pth'
    steady['DATA__DATA_PATH'] = str(write_images(tmp_path / 'more', train=9))
    with pytest.raises(
        CheckpointError, match='within an epoch of 24 images, but there are 27 now: take one from the end'
    ):
        program.main(tiny_config(TAG='more', MODEL__RESUME=str(start), **steady))
    program.main(tiny_config(TAG='end', MODEL__RESUME=str(start.with_name('ckpt_epoch_0.pth')), **steady))


def test_published_checkpoints_resume_after_their_epoch(tiny_config, steady):
    program.main(tiny_config(**steady))
    path = folder_of(tiny_config()) / 'ckpt_epoch_0.pth'
    published = ('model', 'optimizer', 'lr_scheduler', 'max_accuracy', 'epoch', 'config')
    checkpoint = load_checkpoint(path)
    torch.save({name: checkpoint[name] for name in published}, path)
    config = tiny_config(TAG='published', MODEL__RESUME=str(path), **steady)
    program.main(config)
    assert [record['epoch'] for record in records(config, 'epoch')] == [1, 2]
    assert 'no EMA weights: EMA starts from its weights; it comes from another program' in log_of(config)


def test_ema_is_the_moving_average_of_the_weights_and_decides_the_best(tiny_config, steady):
    config = tiny_config(SAVE_STEPS='1', **steady)
    program.main(config)
    ema = None
    for epoch in range(3):
        for step in (*(f'_step_{step}' for step in range(1, 6)), ''):
            checkpoint = load_checkpoint(folder_of(config) / f'ckpt_epoch_{epoch}{step}.pth')
            weights, saved = checkpoint['model']['head.weight'], checkpoint['model_ema']['head.weight']
            if ema is not None:
                torch.testing.assert_close(saved, 0.9 * ema + 0.1 * weights)
            ema = saved
    epochs = records(config, 'epoch')
    assert checkpoint['max_accuracy'] == max(record['ema_acc1'] for record in epochs)
    assert any(record['ema_val_loss'] != record['val_loss'] for record in epochs)
    path = str(folder_of(config) / 'ckpt_epoch_2.pth')
    program.main(tiny_config(TAG='eval', EVAL_MODE='True', MODEL__RESUME=path, **steady))
    plain, ema_log = log_of(tiny_config(TAG='eval')).split('EMA weights:')
    assert f' * Acc@1 {epochs[-1]["acc1"]:.3f}' in plain
    assert f' * Acc@1 {epochs[-1]["ema_acc1"]:.3f}' in ema_log
