"""The training step and loop."""

import math
import re

import pytest
import torch
import yaml
from torch import nn

import main as program
from engine.checkpoint import load_checkpoint
from engine.trainer import Trainer, chunked
from models import MSGTransformer, build_model
from optimizer import build_optimizer
from tests.helpers.golden import fill_, golden, normal
from tests.helpers.runs import PLAIN, assert_same_weights, build_trainer, folder_of, last_checkpoint, log_of, records


def test_sixteen_recorded_steps(tiny_config):
    record = golden('train_v1')
    config = tiny_config(
        TRAIN__EPOCHS='4', TRAIN__BASE_LR='1e-3', TRAIN__WARMUP_LR='1e-6', TRAIN__MIN_LR='1e-5', **PLAIN
    )
    model = fill_(
        MSGTransformer(embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), num_classes=10, drop_path_rate=0.0)
    ).train()
    trainer = build_trainer(config, model, steps_per_epoch=4)
    for step, expected in enumerate(record['run']):
        batch = (normal(f'step-{step}', (8, 3, 224, 224)), (torch.arange(8) * 7 % 10 + step) % 10)
        assert trainer.state.optimizer.param_groups[0]['lr'] == pytest.approx(expected['lr'], rel=1e-9)
        update = trainer.train_step([batch])
        trainer.step_schedule_and_ema(update)
        assert update.loss.item() == pytest.approx(expected['loss'], rel=1e-5), step
        assert update.grad_norm.item() == pytest.approx(expected['grad_norm'], rel=1e-3), step
    for name, parameter in model.named_parameters():
        noise = name.endswith(('rel_pos_msg', 'qkv.bias'))  # their gradients are rounding noise
        expected = record['weight_norm_after'][name]
        assert parameter.norm().item() == pytest.approx(expected, rel=1e-2 if noise else 1e-5), name


@pytest.mark.parametrize('batch_sizes', [[4, 4], [2, 2, 2, 2]])
def test_accumulation_equals_the_joint_batch(tiny_config, batch_sizes):
    # SGD: AdamW amplifies the rounding noise in gradients of biases without effect.
    config = tiny_config(TRAIN__OPTIMIZER__NAME='sgd', **PLAIN)
    images, targets = torch.randn(8, 3, 28, 28), torch.arange(8) % 3
    results = []
    for sizes in ([8], batch_sizes):
        model = fill_(build_model(config)).train()
        trainer = build_trainer(config, model, build_optimizer(config, model, lr=0.01))
        batches = list(zip(images.split(sizes), targets.split(sizes), strict=True))
        for _ in range(3):
            update = trainer.train_step(batches)
        results.append((model.state_dict(), update.loss, update.grad_norm))
    assert_same_weights(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[0][1:], results[1][1:])


def test_chunks_keep_the_remainder():
    assert list(chunked(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(chunked([], 3)) == []


def test_remainder_of_an_epoch_is_an_update_of_its_own_mean(tiny_config, image_tree):
    """24 images in batches of 4, 4 batches per update: two updates per epoch, the second of two batches."""
    config = tiny_config(TRAIN__ACCUMULATION_STEPS='4', DATA__DATA_PATH=str(image_tree), **PLAIN)
    program.main(config)
    steps = records(config, 'train')
    assert [(record['epoch'], record['step']) for record in steps] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(0.5 < record['loss'] < 3 for record in steps)  # a mean, not a sum, in each
    optimizer = last_checkpoint(config)['optimizer']
    assert {int(state['step']) for state in optimizer['state'].values()} == {4}
    scale = 4 * 4 / 512
    warm_up = [5e-7 * scale + step / 2 * (0.1 * scale - 5e-7 * scale) for step in (0, 0, 1)]
    assert [record['lr'] for record in steps[:3]] == pytest.approx(warm_up)


@pytest.mark.parametrize(('clip', 'clipped'), [('0', False), ('0.001', True)])
def test_clip_grad_0_means_no_clipping(tiny_config, clip, clipped):
    config = tiny_config(TRAIN__CLIP_GRAD=clip, **PLAIN)
    model = fill_(build_model(config)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = (torch.randn(4, 3, 28, 28), torch.arange(4) % 3)
    trainer = build_trainer(config, model, optimizer)
    for group in optimizer.param_groups:
        group['lr'] = 1.0  # not the schedule's
    norm = trainer.train_step([batch]).grad_norm
    moved = torch.stack([(p.detach() - before[name]).norm() for name, p in model.named_parameters()]).norm()
    assert norm > 0.1
    torch.testing.assert_close(moved, torch.tensor(0.001) if clipped else norm, rtol=1e-3, atol=0)


def test_gradients_synchronise_once_per_update(tiny_config):
    """All-reduces of an update of three batches, in a process group of one."""
    config = tiny_config(**PLAIN)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group('gloo', store=store, rank=0, world_size=1)
    try:
        trainer = build_trainer(config, fill_(build_model(config)).train())
        reduced = []

        def count(state, bucket):
            reduced.append(bucket.index())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        trainer.network.register_comm_hook(None, count)
        batches = [(torch.randn(4, 3, 28, 28), torch.arange(4) % 3)] * 3
        for updates in (1, 2):
            trainer.train_step(batches)
            assert reduced.count(0) == updates
    finally:
        torch.distributed.destroy_process_group()


def test_modes_and_precision_of_training_and_evaluation(tiny_config, image_tree, monkeypatch):
    config = tiny_config(DATA__DATA_PATH=str(image_tree), AMP_OPT_LEVEL='O1', AMP_DTYPE='bfloat16')
    seen = []

    class Spy(nn.Identity):
        def forward(self, logits):
            seen.append((self.training, torch.is_grad_enabled(), logits.dtype))
            return logits

    def build(config):
        model = build_model(config)
        model.head = nn.Sequential(nn.Linear(16, 3), Spy())
        return model

    monkeypatch.setattr(program, 'build_model', build)
    program.main(config)
    training, evaluation = (True, True, torch.bfloat16), (False, False, torch.bfloat16)
    assert seen == ([training] * 6 + [evaluation] * 3) * 2


def test_epochs_and_seeds_shuffle_differently(tiny_config, image_tree, monkeypatch):
    orders = []

    def train_one_epoch(trainer):
        trainer.state.begin_epoch()
        orders.append([index for _, index in trainer.loader.sampler])
        return {}

    monkeypatch.setattr(Trainer, 'train_one_epoch', train_one_epoch)
    for number, seed in enumerate(('0', '1', '0')):
        program.main(tiny_config(DATA__DATA_PATH=str(image_tree), SEED=seed, TAG=str(number)))
    assert orders[0] != orders[1]  # epochs
    assert orders[0] != orders[2]  # seeds
    assert orders[:2] == orders[4:]


def test_run_outputs(tiny_config, image_tree, capsys):
    config = tiny_config(DATA__DATA_PATH=str(image_tree), DATA__NUM_WORKERS='2')
    program.main(config)
    folder = folder_of(config)
    names = {path.name for path in folder.iterdir()}
    expected = {'config.yaml', 'log_rank0.txt', 'metrics.jsonl', 'ckpt_epoch_0.pth', 'ckpt_epoch_1.pth'}
    assert names == expected | {'ckpt_best.pth', 'tensorboard'}
    log = log_of(config)
    for pattern in (
        r'Train: \[0/2\]\[5/6\]\teta 0:00:00 lr [\d.]+\ttime [\d.]+ \([\d.]+\)\tdata [\d.]+ \([\d.]+\)\t',
        r'\tloss [\d.]+ \([\d.]+\)\tgrad_norm [\d.]+ \([\d.]+\)\tmem \d+MB\t\d+ images/s',
        r'Test: \[2/3\]\tTime [\d.]+\tLoss [\d.]+ \([\d.]+\)\tAcc@1 [\d.]+ \([\d.]+\)\tMem \d+MB\n',
        r' \* Acc@1 [\d.]+\n',
        r'Accuracy of the network on the 12 test images: [\d.]+%',
        r'Max accuracy: [\d.]+%',
        r'EPOCH 1 training takes 0:00:0\d',
        r'Training time 0:0',
    ):
        assert re.search(pattern, log), pattern
    assert ' * Acc@1' in capsys.readouterr().out
    checkpoint = load_checkpoint(folder / 'ckpt_epoch_1.pth')
    assert {'model', 'optimizer', 'lr_scheduler', 'epoch', 'max_accuracy', 'config'} <= checkpoint.keys()
    assert checkpoint['epoch'] == 1
    assert checkpoint['classes'] == ['class_0', 'class_1', 'class_2']
    epochs = records(config, 'epoch')
    assert [record['epoch'] for record in epochs] == [0, 1]
    assert checkpoint['max_accuracy'] == max(record['acc1'] for record in epochs)  # including this epoch
    assert checkpoint['config'] == yaml.safe_load((folder / 'config.yaml').read_text())
    assert all(math.isfinite(record['val_loss']) and record['images_per_s'] > 0 for record in epochs)


def test_training_learns(tiny_config, image_tree):
    config = tiny_config(DATA__DATA_PATH=str(image_tree), TRAIN__EPOCHS='8', TRAIN__BASE_LR='0.5', **PLAIN)
    program.main(config)
    losses = [record['train_loss'] for record in records(config, 'epoch')]
    assert losses[-1] < 0.5 * losses[0]
    assert records(config, 'epoch')[-1]['acc1'] > 90
    best = load_checkpoint(folder_of(config) / 'ckpt_best.pth')
    scores = [(record['acc1'], -record['val_loss']) for record in records(config, 'epoch')]
    assert best['epoch'] == scores.index(max(scores))  # of equally accurate ones that with the lowest loss


def test_save_freq_keeps_every_nth_and_the_last(tiny_config, image_tree):
    config = tiny_config(DATA__DATA_PATH=str(image_tree), TRAIN__EPOCHS='5', SAVE_FREQ='2')
    program.main(config)
    assert sorted(path.name for path in folder_of(config).glob('ckpt_epoch_*')) == [
        f'ckpt_epoch_{epoch}.pth' for epoch in (1, 3, 4)
    ]


def test_epochs_between_evaluations(tiny_config, image_tree):
    config = tiny_config(DATA__DATA_PATH=str(image_tree), TRAIN__EPOCHS='5', EVAL_FREQ='2', SAVE_KEEP='0')
    program.main(config)
    assert ['acc1' in record for record in records(config, 'epoch')] == [False, True, False, True, True]
    scores = [load_checkpoint(folder_of(config) / f'ckpt_epoch_{epoch}.pth')['scores'] for epoch in range(5)]
    assert [bool(score) for score in scores] == [False, True, False, True, True]
    best = load_checkpoint(folder_of(config) / 'ckpt_best.pth')
    assert best['progress']['epoch'] in (2, 4, 5)
    program.main(tiny_config(DATA__DATA_PATH=str(image_tree), TRAIN__EPOCHS='6', EVAL_FREQ='4', SAVE_KEEP='0'))
    assert len(records(config, 'epoch')) == 6
    assert 'acc1' in records(config, 'epoch')[-1]
