"""A run that is interrupted and continued ends with the same bits as one that is not, wherever it stops."""

import math
import os
import signal

import numpy as np
import pytest
import torch

import main as program
from checkpoint import CheckpointError, load_checkpoint
from data import build_loaders
from data.samplers import TrainSampler
from data.seeding import SeededDataset, random_states, seeded, set_random_states
from signals import STOP_SIGNALS, Stopped
from tests.conftest import one_thread, write_images
from tests.test_training import folder_of, records
from trainer import Trainer
from utils import set_seed

CPU = torch.device('cpu')

# Everything that draws random numbers: augmentation in the loaders, Mixup in the process, dropout in the network.
RANDOM = {'MODEL__DROP_PATH_RATE': '0.3', 'MODEL__DROP_RATE': '0.1', 'TRAIN__EMA_DECAY': '0.9', 'TRAIN__EPOCHS': '3'}


def same(one, two):
    """Whether two checkpoints' entries are the same to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(value, two[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def differences(one, two):
    """Names of the entries that differ, but for the config, whose folders do."""
    assert one.keys() == two.keys()
    return [name for name in one if name != 'config' and not same(one[name], two[name])]


def last(config):
    return load_checkpoint(folder_of(config) / f'ckpt_epoch_{config.TRAIN.EPOCHS - 1}.pth')


@pytest.fixture
def steady(image_tree):
    with one_thread():
        yield {'DATA__DATA_PATH': str(image_tree), **RANDOM}


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
def test_every_update_is_a_place_to_continue_from(tiny_config, steady, options):
    whole = tiny_config(TAG='whole', SAVE_STEPS='1', **steady, **options)
    program.main(whole)
    expected = last(whole)
    steps = 2 if 'TRAIN__ACCUMULATION_STEPS' in options else 6
    inside = [f'ckpt_epoch_{epoch}_step_{step}.pth' for epoch in range(3) for step in range(1, steps)]
    ends = [f'ckpt_epoch_{epoch}.pth' for epoch in range(3)]
    assert {path.name for path in folder_of(whole).glob('ckpt_epoch_*')} == {*inside, *ends}
    for number, name in enumerate([*inside[::2], *ends[:2]]):
        workers = '2' if number == 2 else '0'  # the number of loader processes does not matter either
        start = str(folder_of(whole) / name)
        config = tiny_config(TAG=name, MODEL__RESUME=start, DATA__NUM_WORKERS=workers, **steady, **options)
        program.main(config)
        assert differences(expected, last(config)) == [], name
        assert 'bit for bit as if it had not stopped' in (folder_of(config) / 'log_rank0.txt').read_text()


def test_a_signal_stops_after_the_update_it_comes_in(tiny_config, steady, monkeypatch):
    whole = tiny_config(TAG='whole', **steady)
    program.main(whole)
    train_step = Trainer.train_step

    def signalled(trainer, batches):
        if (trainer.state.epoch, trainer.state.step) == (1, 2):
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(trainer, batches)

    handlers = [(number, signal.getsignal(number)) for number in STOP_SIGNALS]
    config = tiny_config(TAG='stopped', **steady)
    try:
        monkeypatch.setattr(Trainer, 'train_step', signalled)
        with pytest.raises(Stopped):
            program.main(config)
    finally:  # which a run that has stopped ignores
        for number, handler in handlers:
            signal.signal(number, handler)
    assert (folder_of(config) / 'ckpt_epoch_1_step_3.pth').exists()
    assert records(config, 'train')[-1]['step'] == 2
    monkeypatch.setattr(Trainer, 'train_step', train_step)
    program.main(config)
    assert differences(last(whole), last(config)) == []


def test_what_is_compared_would_differ(tiny_config, steady):
    """The same run with one random state, or one image, another, ends otherwise."""
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
        found = differences(last(whole), last(config))
        assert ('ranks' if name == 'python' else 'model') in found  # the main process draws none of Python's own


def test_the_figures_of_a_continued_run_are_those_of_the_whole(tiny_config, steady):
    whole = tiny_config(TAG='whole', SAVE_STEPS='4', **steady)
    program.main(whole)
    for path in folder_of(whole).glob('ckpt_epoch_2*'):
        path.unlink()
    timed = {'seconds', 'images_per_s', 'memory_mb'}

    def figures():
        kept = records(whole, 'train') + records(whole, 'epoch')
        return [{key: value for key, value in record.items() if key not in timed} for record in kept]

    before = figures()
    (folder_of(whole) / 'ckpt_epoch_1.pth').unlink()  # the newest is now inside epoch 1
    with (folder_of(whole) / 'metrics.jsonl').open('a') as file:
        file.write('{"kind": "train", "upd')  # of a run that was killed
    program.main(whole)
    assert figures() == before  # each once, the epoch's mean loss of all its updates too
    assert 'continuing at epoch 1, update 4' in (folder_of(whole) / 'log_rank0.txt').read_text()


def test_another_batch_size_continues_after_the_images_it_has_seen(tiny_config, steady, monkeypatch):
    program.main(tiny_config(TAG='whole', SAVE_STEPS='3', **steady))
    start = folder_of(tiny_config(TAG='whole')) / 'ckpt_epoch_1_step_3.pth'
    seen = []
    train_step = Trainer.train_step

    def note(trainer, batches):
        seen.append((trainer.state.epoch, trainer.state.step, trainer.state.images))
        return train_step(trainer, batches)

    monkeypatch.setattr(Trainer, 'train_step', note)
    config = tiny_config(TAG='two', DATA__BATCH_SIZE='2', MODEL__RESUME=str(start), **steady)
    program.main(config)
    assert seen[:6] == [(1, step, 2 * step) for step in range(6, 12)]
    log = (folder_of(config) / 'log_rank0.txt').read_text()
    assert 'not bit for bit: update 3 of its epoch is update 6 here; DATA.BATCH_SIZE has changed' in log
    seen.clear()
    program.main(tiny_config(TAG='eight', DATA__BATCH_SIZE='8', MODEL__RESUME=str(start), **steady))
    assert seen[:2] == [(1, 1, 8), (1, 2, 16)]  # 12 images had been seen: the last whole update


def test_what_has_changed_is_named(tiny_config, steady):
    program.main(tiny_config(**steady))
    start = folder_of(tiny_config()) / 'ckpt_epoch_1.pth'
    neutral = {'PRINT_FREQ': '7', 'DATA__NUM_WORKERS': '1', 'SAVE_STEPS': '5', 'MODEL__RESUME': str(start)}
    for options, told in (
        ({}, 'the run goes on, bit for bit as if it had not stopped'),
        ({'SEED': '7', 'TRAIN__BASE_LR': '0.2'}, 'not bit for bit: SEED has changed; TRAIN.BASE_LR has changed'),
        ({'AMP_OPT_LEVEL': 'O1', 'AMP_DTYPE': 'bfloat16'}, 'AMP_DTYPE has changed; AMP_OPT_LEVEL has changed'),
    ):
        config = tiny_config(TAG='again', **neutral, **steady, **options)
        program.main(config)
        log = (folder_of(config) / 'log_rank0.txt').read_text().splitlines()
        assert [line for line in log if 'the run goes on' in line][-1].endswith(told)


def test_a_branch_that_was_left_does_not_take_the_run_up_again(tiny_config, steady):
    """A step of a larger batch is a smaller number, though it is further on; so is that of an earlier checkpoint."""
    small = tiny_config(SAVE_STEPS='10', DATA__BATCH_SIZE='2', **{**steady, 'TRAIN__EPOCHS': '2'})
    program.main(small)
    folder = folder_of(small)
    for name in ('ckpt_epoch_1.pth', 'ckpt_epoch_0.pth', 'ckpt_epoch_1_step_10.pth'):
        (folder / name).unlink()
    large = tiny_config(SAVE_STEPS='4', DATA__BATCH_SIZE='6', **{**steady, 'TRAIN__ACCUMULATION_STEPS': '1'})
    program.main(large)  # from update 10 of 12, which is after update 3 of 4
    assert 'continuing at epoch 0, update 3' in (folder / 'log_rank0.txt').read_text()
    (folder / 'ckpt_epoch_2.pth').rename(folder / 'ckpt_epoch_9.pth')
    again = tiny_config(SAVE_STEPS='4', MODEL__RESUME=str(folder / 'ckpt_epoch_0_step_10.pth'), **steady)
    program.main(again)
    assert (folder / 'ckpt_epoch_9.pth.old').exists()
    assert [record['epoch'] for record in records(again, 'epoch')] == [0, 1, 2]


def test_another_data_set_cannot_continue_inside_an_epoch(tiny_config, steady, tmp_path):
    program.main(tiny_config(SAVE_STEPS='3', **steady))
    start = folder_of(tiny_config()) / 'ckpt_epoch_1_step_3.pth'
    steady['DATA__DATA_PATH'] = str(write_images(tmp_path / 'more', train=9))
    with pytest.raises(
        CheckpointError, match='inside an epoch of 24 images, but there are 27 now: take one of the end'
    ):
        program.main(tiny_config(MODEL__RESUME=str(start), **steady))
    program.main(tiny_config(MODEL__RESUME=str(start.with_name('ckpt_epoch_0.pth')), **steady))


def test_published_checkpoints_continue_after_their_epoch(tiny_config, steady):
    program.main(tiny_config(**steady))
    path = folder_of(tiny_config()) / 'ckpt_epoch_0.pth'
    published = ('model', 'optimizer', 'lr_scheduler', 'max_accuracy', 'epoch', 'config')
    checkpoint = load_checkpoint(path)
    torch.save({name: checkpoint[name] for name in published}, path)
    config = tiny_config(TAG='published', MODEL__RESUME=str(path), **steady)
    program.main(config)
    assert [record['epoch'] for record in records(config, 'epoch')] == [1, 2]
    log = (folder_of(config) / 'log_rank0.txt').read_text()
    assert 'no average of the weights: a new one starts from its weights; it is of another program' in log


def test_the_average_is_the_running_mean_of_the_weights_and_decides_what_is_best(tiny_config, steady):
    config = tiny_config(SAVE_STEPS='1', **steady)
    program.main(config)
    average = None
    for epoch in range(3):
        for step in (*(f'_step_{step}' for step in range(1, 6)), ''):
            checkpoint = load_checkpoint(folder_of(config) / f'ckpt_epoch_{epoch}{step}.pth')
            weights, kept = checkpoint['model']['head.weight'], checkpoint['model_ema']['head.weight']
            if average is not None:
                torch.testing.assert_close(kept, 0.9 * average + 0.1 * weights)
            average = kept
    epochs = records(config, 'epoch')
    assert checkpoint['max_accuracy'] == max(record['ema_acc1'] for record in epochs)
    assert any(record['ema_val_loss'] != record['val_loss'] for record in epochs)
    path = str(folder_of(config) / 'ckpt_epoch_2.pth')
    program.main(tiny_config(TAG='eval', EVAL_MODE='True', MODEL__RESUME=path, **steady))
    log = (folder_of(tiny_config(TAG='eval')) / 'log_rank0.txt').read_text()
    plain, of_average = log.split('average of the weights')
    assert f' * Acc@1 {epochs[-1]["acc1"]:.3f}' in plain
    assert f' * Acc@1 {epochs[-1]["ema_acc1"]:.3f}' in of_average


@pytest.mark.parametrize('workers', ['1', '3'])
def test_batches_do_not_depend_on_the_number_of_loader_processes(tiny_config, image_tree, workers):
    def batches(**options):
        loader, _ = build_loaders(tiny_config(DATA__DATA_PATH=str(image_tree), **options))
        told = []
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            told += list(loader)
        return told

    torch.manual_seed(1)
    np.random.seed(1)
    alone = batches()
    before = random_states(CPU)
    assert same(alone, batches(DATA__NUM_WORKERS=workers))
    assert same(before, random_states(CPU))  # nor do they draw from the process's own random numbers
    assert not same(alone, batches(SEED='1'))
    first, second = (torch.cat([images for images, _ in part]).sum((1, 2, 3)) for part in (alone[:6], alone[6:]))
    assert not torch.equal(first.sort()[0], second.sort()[0])  # an image is augmented anew in each epoch


def test_seeded_numbers_depend_on_their_seeds_alone():
    def draw(*entropy):
        with seeded(*entropy):
            return random_states(CPU)

    before = random_states(CPU)
    assert same(draw(1, 2, 3), draw(1, 2, 3))
    assert same(before, random_states(CPU))  # as if nothing had been drawn
    for other in ((1, 3, 2), (2, 2, 3), (1, 2, 4), (1, 2)):
        assert not same(draw(1, 2, 3), draw(*other))
    dataset = SeededDataset([lambda: 0] * 5, seed=3)
    assert len(dataset) == 5


def test_random_states_round_trip():
    states = random_states(CPU)
    drawn = [torch.rand(3), torch.from_numpy(np.random.rand(3))]
    np.random.standard_normal()  # of a pair, whose other half is kept
    middle = random_states(CPU)
    after = np.random.standard_normal(3).tolist()
    set_random_states(states, CPU)
    assert same(drawn, [torch.rand(3), torch.from_numpy(np.random.rand(3))])
    set_random_states(middle, CPU)
    assert np.random.standard_normal(3).tolist() == after


@pytest.mark.parametrize('world_size', [1, 2, 3, 5])
@pytest.mark.parametrize('length', [2, 7, 12])
def test_the_order_is_that_of_distributed_sampler_from_any_start(length, world_size):
    shards = []
    for rank in range(world_size):
        sampler = TrainSampler(length, rank, world_size, seed=4)
        theirs = torch.utils.data.DistributedSampler(range(length), world_size, rank, shuffle=True, seed=4)
        for epoch in (0, 3):
            sampler.set_epoch(epoch)
            theirs.set_epoch(epoch)
            assert [index for _, index in sampler] == list(theirs)
            assert {epoch_of for epoch_of, _ in sampler} == {epoch}
            assert len(sampler) == len(theirs) == len(list(sampler))
        state = sampler.state_dict()
        whole = list(sampler)
        sampler.set_epoch(9)
        for start in range(0, length, world_size):
            sampler.load_state_dict(state, start)
            assert list(sampler) == whole[start // world_size :]
        shards.append(whole)
    assert len({len(shard) for shard in shards}) == 1
    assert {index for shard in shards for _, index in shard} == set(range(length))
    assert math.ceil(length / world_size) == len(shards[0])
