"""The training step and loop, in this process."""

import contextlib
import json
import logging
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from yacs.config import CfgNode

import job
import main as program
from checkpoint import CheckpointError, load_checkpoint
from config import load_config
from data.samplers import TrainSampler
from launcher import Process
from logger import MetricsLog
from lr_scheduler import build_scheduler
from models import MSGTransformer, build_model
from optimizer import build_optimizer
from precision import build_precision
from tests.conftest import one_thread
from tests.helpers.golden import fill_, golden, normal
from trainer import Run, Trainer, groups
from training_state import TrainingState
from utils import distribute

CPU = torch.device('cpu')
PLAIN = {'AUG__MIXUP': '0', 'AUG__CUTMIX': '0', 'MODEL__LABEL_SMOOTHING': '0', 'AUG__AUTO_AUGMENT': 'none'}
PLAIN |= {'AUG__COLOR_JITTER': '0', 'AUG__REPROB': '0', 'AUG__HFLIP': '0', 'AUG__SCALE': '(1, 1)'}


def run_of(config):
    return Run(config, Process(0, 1, CPU), build_precision(config, CPU), Path(), logging.getLogger('test'))


def loss_of(network, batch):
    images, targets = batch
    return nn.functional.cross_entropy(network(images), targets)


def trainer_of(config, model, optimizer=None, steps_per_epoch=4, run=None):
    """A trainer without data: for its `train_step` on batches of the test's own."""
    run = run or run_of(config)
    optimizer = optimizer or build_optimizer(config, model)
    scheduler = build_scheduler(config, optimizer, steps_per_epoch)
    sampler = TrainSampler(1)
    state = TrainingState(model, optimizer, scheduler, run.precision, sampler, CPU, steps_per_epoch, 4, 1)
    return Trainer(run, state, distribute(model, CPU), None, loss_of, None, 'acc1', {})


def folder_of(config):
    return Path(config.OUTPUT) / config.MODEL.NAME / config.TAG


def records(config, kind):
    lines = (folder_of(config) / 'metrics.jsonl').read_text().splitlines()
    return [record for record in map(json.loads, lines) if record['kind'] == kind]


def weights(config, name='ckpt_epoch_1.pth'):
    return load_checkpoint(folder_of(config) / name)['model']


def assert_same_weights(one, two, **tolerance):
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], msg=lambda text, name=name: f'{name}: {text}', **tolerance)


def test_sixteen_recorded_steps(tiny_config):
    record = golden('train_v1')
    config = tiny_config(
        TRAIN__EPOCHS='4', TRAIN__BASE_LR='1e-3', TRAIN__WARMUP_LR='1e-6', TRAIN__MIN_LR='1e-5', **PLAIN
    )
    model = fill_(
        MSGTransformer(embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), num_classes=10, drop_path_rate=0.0)
    ).train()
    trainer = trainer_of(config, model, steps_per_epoch=4)
    for step, expected in enumerate(record['run']):
        batch = (normal(f'step-{step}', (8, 3, 224, 224)), (torch.arange(8) * 7 % 10 + step) % 10)
        assert trainer.state.optimizer.param_groups[0]['lr'] == pytest.approx(expected['lr'], rel=1e-9)
        update = trainer.train_step([batch])
        trainer.state.advance(updated=True)
        assert update.loss.item() == pytest.approx(expected['loss'], rel=1e-5), step
        assert update.grad_norm.item() == pytest.approx(expected['grad_norm'], rel=1e-3), step
    for name, parameter in model.named_parameters():
        noise = name.endswith(('rel_pos_msg', 'qkv.bias'))  # gradients of rounding noise
        expected = record['weight_norm_after'][name]
        assert parameter.norm().item() == pytest.approx(expected, rel=1e-2 if noise else 1e-5), name


@pytest.mark.parametrize('parts', [[4, 4], [2, 2, 2, 2]])
def test_accumulation_equals_the_joint_batch(tiny_config, parts):
    # SGD, since AdamW blows up the rounding noise that is the gradient of biases without effect.
    config = tiny_config(TRAIN__OPTIMIZER__NAME='sgd', **PLAIN)
    images, targets = torch.randn(8, 3, 28, 28), torch.arange(8) % 3
    results = []
    for sizes in ([8], parts):
        model = fill_(build_model(config)).train()
        trainer = trainer_of(config, model, build_optimizer(config, model, lr=0.01))
        batches = list(zip(images.split(sizes), targets.split(sizes), strict=True))
        for _ in range(3):
            update = trainer.train_step(batches)
        results.append((model.state_dict(), update.loss, update.grad_norm))
    assert_same_weights(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[0][1:], results[1][1:])


def test_groups_keep_the_remainder():
    assert list(groups(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(groups([], 3)) == []


def test_the_remainder_of_an_epoch_is_an_update_of_its_own_mean(tiny_config, image_tree):
    """24 images in batches of 4, 4 batches an update: two updates an epoch, the second of two batches."""
    config = tiny_config(TRAIN__ACCUMULATION_STEPS='4', DATA__DATA_PATH=str(image_tree), **PLAIN)
    program.main(config)
    steps = records(config, 'train')
    assert [(record['epoch'], record['step']) for record in steps] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(0.5 < record['loss'] < 3 for record in steps)  # a mean, not a sum, in each
    optimizer = load_checkpoint(folder_of(config) / 'ckpt_epoch_1.pth')['optimizer']
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
    trainer = trainer_of(config, model, optimizer)
    for group in optimizer.param_groups:
        group['lr'] = 1.0  # not the schedule's
    norm = trainer.train_step([batch]).grad_norm
    moved = torch.stack([(p.detach() - before[name]).norm() for name, p in model.named_parameters()]).norm()
    assert norm > 0.1
    torch.testing.assert_close(moved, torch.tensor(0.001) if clipped else norm, rtol=1e-3, atol=0)


def test_a_run_leaves_what_the_house_promises(tiny_config, image_tree, capsys):
    config = tiny_config(DATA__DATA_PATH=str(image_tree), DATA__NUM_WORKERS='2')
    program.main(config)
    folder = folder_of(config)
    names = {path.name for path in folder.iterdir()}
    expected = {'config.yaml', 'log_rank0.txt', 'metrics.jsonl', 'ckpt_epoch_0.pth', 'ckpt_epoch_1.pth'}
    assert names == expected | {'ckpt_best.pth', 'tensorboard'}
    log = (folder / 'log_rank0.txt').read_text()
    for pattern in (
        r'Train: \[0/2\]\[5/6\]\teta 0:00:00 lr [\d.]+\ttime [\d.]+ \([\d.]+\)\tloss [\d.]+ \([\d.]+\)\t',
        r'\tgrad_norm [\d.]+ \([\d.]+\)\tmem \d+MB\t\d+ images/s',
        r'Test: \[2/3\]\tTime [\d.]+\tLoss [\d.]+ \([\d.]+\)\tAcc@1 [\d.]+ \([\d.]+\)\tAcc@5 100.000 \(100.000\)\t',
        r' \* Acc@1 [\d.]+ Acc@5 100.000',
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
    assert checkpoint['max_accuracy'] == max(record['acc1'] for record in epochs)  # of this epoch too
    assert checkpoint['config'] == yaml.safe_load((folder / 'config.yaml').read_text())
    assert all(math.isfinite(record['val_loss']) and record['images_per_s'] > 0 for record in epochs)


def test_training_learns(tiny_config, image_tree):
    config = tiny_config(DATA__DATA_PATH=str(image_tree), TRAIN__EPOCHS='8', TRAIN__BASE_LR='0.5', **PLAIN)
    program.main(config)
    losses = [record['train_loss'] for record in records(config, 'epoch')]
    assert losses[-1] < 0.5 * losses[0]
    assert records(config, 'epoch')[-1]['acc1'] > 90
    best = load_checkpoint(folder_of(config) / 'ckpt_best.pth')
    scores = [record['acc1'] for record in records(config, 'epoch')]
    assert best['epoch'] == scores.index(max(scores))


def test_save_freq_keeps_every_nth_and_the_last(tiny_config, image_tree):
    config = tiny_config(DATA__DATA_PATH=str(image_tree), TRAIN__EPOCHS='5', SAVE_FREQ='2')
    program.main(config)
    assert sorted(path.name for path in folder_of(config).glob('ckpt_epoch_*')) == [
        f'ckpt_epoch_{epoch}.pth' for epoch in (1, 3, 4)
    ]


def test_the_saved_config_reproduces_the_run(tiny_config, image_tree, tmp_path):
    config = tiny_config(DATA__DATA_PATH=str(image_tree))
    with one_thread():
        program.main(config)
        again = load_config(folder_of(config) / 'config.yaml', ['OUTPUT', str(tmp_path / 'again')])
        program.main(again)
    assert_same_weights(weights(config), weights(again), rtol=0, atol=0)


def test_resume_continues_where_it_stopped(tiny_config, image_tree):
    """Without random augmentation, two halves equal the whole; the explicit checkpoint goes before the newest."""
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
        assert 'continuing at epoch 1, update 0' in (folder_of(whole) / 'log_rank0.txt').read_text()


def test_a_finished_run_has_nothing_to_train(tiny_config, image_tree):
    config = tiny_config(DATA__DATA_PATH=str(image_tree))
    program.main(config)
    program.main(config)
    assert len(records(config, 'epoch')) == 2
    assert 'nothing to train: epoch 2 of TRAIN.EPOCHS 2' in (folder_of(config) / 'log_rank0.txt').read_text()


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
    frozen = {'TRAIN__BASE_LR': '0', 'TRAIN__WARMUP_LR': '0', 'TRAIN__MIN_LR': '0', 'DATA__DATA_PATH': str(image_tree)}
    config = tiny_config(MODEL__PRETRAINED=str(tmp_path / 'weights.pth'), **frozen)
    program.main(config)
    trained = weights(config)
    assert torch.equal(trained['msg_tokens'], fill_(build_model(source)).state_dict()['msg_tokens'])
    assert trained['head.weight'].shape == (3, 16)
    assert len(records(config, 'epoch')) == 2
    (folder_of(config) / 'ckpt_epoch_1.pth').unlink()
    program.main(config)  # an interrupted run of its own goes before the weights it started from
    assert [record['epoch'] for record in records(config, 'epoch')] == [0, 1]
    torch.save({'model': trained}, tmp_path / 'trained.pth')
    with pytest.raises(CheckpointError, match='has no optimizer, epoch, max_accuracy.*--pretrained'):
        program.main(tiny_config(TAG='other', MODEL__RESUME=str(tmp_path / 'trained.pth'), **frozen))


def test_eval_evaluates_and_never_trains(tiny_config, image_tree, monkeypatch):
    config = tiny_config(DATA__DATA_PATH=str(image_tree))
    program.main(config)

    def left():
        files = (path for path in folder_of(config).rglob('*') if path.is_file() and path.name != 'log_rank0.txt')
        return {path: path.read_bytes() for path in files}

    before = left()
    monkeypatch.setattr(program, 'train', lambda *_: pytest.fail('--eval trains'))
    monkeypatch.setattr(Trainer, 'train_step', lambda *_: pytest.fail('--eval trains'))
    results = []
    validate = program.validate
    monkeypatch.setattr(program, 'validate', lambda *args: results.append(validate(*args)))
    last = str(folder_of(config) / 'ckpt_epoch_1.pth')
    program.main(tiny_config(DATA__DATA_PATH=str(image_tree), EVAL_MODE='True', MODEL__RESUME=last))
    program.main(tiny_config(DATA__DATA_PATH=str(image_tree), EVAL_MODE='True', MODEL__PRETRAINED=last))
    recorded = records(config, 'epoch')[-1]
    for result in results:
        assert result.acc1 == recorded['acc1']
        assert result.val_loss == pytest.approx(recorded['val_loss'], rel=1e-6)
    assert len(results) == 2
    assert left() == before


def test_classes_of_other_names_than_the_checkpoints_are_told(tiny_config, image_tree, capsys):
    options = {'DATA__DATA_PATH': str(image_tree), **PLAIN}
    program.main(tiny_config(**options))
    for split in ('train', 'val'):
        (image_tree / split / 'class_2').rename(image_tree / split / 'other')
    assert 'are not those of the checkpoint' not in capsys.readouterr().out
    told = '1 of the 3 classes are not those of the checkpoint (other for class_2)'
    path = str(folder_of(tiny_config()) / 'ckpt_epoch_1.pth')
    program.main(tiny_config(EVAL_MODE='True', MODEL__RESUME=path, **options))
    assert told in capsys.readouterr().out
    program.main(tiny_config(TRAIN__EPOCHS='3', **options))
    assert told in capsys.readouterr().out


@pytest.mark.parametrize('batch_size', ['1', '4', '5', '12', '50'])
def test_evaluation_counts_every_image_once_at_any_batch_size(tiny_config, image_tree, batch_size):
    config = tiny_config(DATA__DATA_PATH=str(image_tree), DATA__BATCH_SIZE=batch_size)
    model = fill_(build_model(config)).eval()
    loader = program.build_eval_loader(config)
    result = program.validate(run_of(config), model, loader)
    with torch.no_grad():
        logits = torch.cat([model(images) for images, _ in loader])
    targets = torch.tensor([0] * 4 + [1] * 4 + [2] * 4)
    assert result.val_loss == pytest.approx(nn.functional.cross_entropy(logits, targets).item(), rel=1e-6)
    assert result.acc1 == pytest.approx(100 * (logits.argmax(1) == targets).double().mean().item())
    assert result.acc5 == 100


def test_top_five_of_many_classes(tiny_config):
    config = tiny_config(MODEL__NUM_CLASSES='10')
    logits = torch.arange(10.0).flip(0).repeat(10, 1)  # class 0 is the first guess, 9 the last
    loader = torch.utils.data.DataLoader([(logits[i], i) for i in range(10)], batch_size=3)
    result = program.validate(run_of(config), nn.Identity(), loader)
    assert (result.acc1, result.acc5) == (10, 50)


def test_throughput_needs_no_data(tiny_config, capsys, monkeypatch):
    program.main(tiny_config(THROUGHPUT_MODE='True', AMP_OPT_LEVEL='O1', AMP_DTYPE='bfloat16'))
    assert 'batch_size 4 throughput ' in capsys.readouterr().out


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_mixed_precision_trains_and_saves_its_scale(tiny_config, image_tree, dtype):
    config = tiny_config(
        DATA__DATA_PATH=str(image_tree), AMP_OPT_LEVEL='O1', AMP_DTYPE=dtype, TRAIN__USE_CHECKPOINT='True'
    )
    program.main(config)
    state = load_checkpoint(folder_of(config) / 'ckpt_epoch_1.pth')['precision']
    assert ('scale' in state) == (dtype == 'float16')
    assert records(config, 'epoch')[-1]['train_loss'] < 3


class RecordingNode(CfgNode):
    """A config tree that records the dotted names of the leaves that are read."""

    def __init__(self, node, prefix, reads):
        super().__init__()
        for key, value in dict.items(node):
            is_node = isinstance(value, CfgNode)
            dict.__setitem__(self, key, RecordingNode(value, f'{prefix}{key}.', reads) if is_node else value)
        self.__dict__['prefix'], self.__dict__['reads'] = prefix, reads

    def __getitem__(self, key):
        value = dict.__getitem__(self, key)
        if not isinstance(value, CfgNode):
            self.__dict__['reads'].add(self.__dict__['prefix'] + key)
        return value

    def leaves(self):
        for key, value in dict.items(self):
            yield from value.leaves() if isinstance(value, RecordingNode) else [self.__dict__['prefix'] + key]


def test_every_leaf_of_the_tree_is_read(tiny_config, image_tree):
    reads = set()

    def run(**options):
        program.main(node := RecordingNode(tiny_config(DATA__DATA_PATH=str(image_tree), **options), '', reads))
        return node

    run(TAG='adamw')
    run(TAG='sgd', TRAIN__OPTIMIZER__NAME='sgd', TRAIN__LR_SCHEDULER__NAME='step')
    config = tiny_config(TAG='adamw')
    tree = run(EVAL_MODE='True', MODEL__RESUME=str(folder_of(config) / 'ckpt_epoch_1.pth'))
    assert set(tree.leaves()) - reads == {'BASE'}  # which `load_config` reads; see test_config


def test_a_changed_run_resumes_on_its_own_schedule(tiny_config, image_tree):
    """A longer run, or another batch size, resumes on its own schedule."""
    data = {'DATA__DATA_PATH': str(image_tree), **PLAIN}
    program.main(tiny_config(**data))
    longer = tiny_config(TRAIN__EPOCHS='4', DATA__BATCH_SIZE='8', **data)
    program.main(longer)
    fresh = tiny_config(TRAIN__EPOCHS='4', DATA__BATCH_SIZE='8', TAG='fresh', **data)
    program.main(fresh)
    rates = [[r['lr'] for r in records(config, 'train') if r['epoch'] >= 2] for config in (longer, fresh)]
    assert rates[0] == pytest.approx(rates[1])


def test_published_optimizer_states_resume_and_another_optimizers_do_not(tiny_config, image_tree):
    config = tiny_config(DATA__DATA_PATH=str(image_tree), TRAIN__EPOCHS='3')
    program.main(tiny_config(DATA__DATA_PATH=str(image_tree)))
    checkpoint = load_checkpoint(folder_of(config) / 'ckpt_epoch_1.pth')
    for group in checkpoint['optimizer']['param_groups']:  # PyTorch 1.8, of the published runs, knew these
        for name in group.keys() - {'lr', 'betas', 'eps', 'weight_decay', 'amsgrad', 'initial_lr', 'params'}:
            del group[name]
    state = trainer_of(config, build_model(config)).state
    state.load_state_dict(checkpoint, 0, 1)
    assert (state.epoch, state.step) == (2, 0)
    assert all(group['fused'] and group['decoupled_weight_decay'] for group in state.optimizer.param_groups)
    state.optimizer.step()
    sgd = tiny_config(TRAIN__OPTIMIZER__NAME='sgd')
    with pytest.raises(CheckpointError, match="optimizer is another than the config's.*write the TRAIN.OPTIMIZER"):
        trainer_of(sgd, build_model(sgd)).state.load_state_dict(checkpoint, 0, 1)
    checkpoint['optimizer'] = {}
    with pytest.raises(CheckpointError, match="optimizer is another than the config's"):
        state.load_state_dict(checkpoint, 0, 1)


def test_the_options_of_the_optimizer_are_the_configs_not_the_checkpoints(tiny_config, image_tree):
    program.main(tiny_config(DATA__DATA_PATH=str(image_tree)))
    config = tiny_config(TRAIN__WEIGHT_DECAY='0.3', TRAIN__OPTIMIZER__EPS='1e-6')
    state = trainer_of(config, build_model(config)).state
    state.load_state_dict(load_checkpoint(folder_of(config) / 'ckpt_epoch_1.pth'), 0, 1)
    assert [group['weight_decay'] for group in state.optimizer.param_groups] == [0.3, 0.0]
    assert [group['eps'] for group in state.optimizer.param_groups] == [1e-6, 1e-6]


def test_the_loss_scale_is_restored(tiny_config, image_tree):
    options = {'DATA__DATA_PATH': str(image_tree), 'AMP_OPT_LEVEL': 'O1', 'AMP_DTYPE': 'float16'}
    config = tiny_config(**options)
    program.main(config)
    checkpoint = load_checkpoint(folder_of(config) / 'ckpt_epoch_1.pth')
    checkpoint['precision']['scale'] = 128.0
    state = trainer_of(config, build_model(config)).state
    state.load_state_dict(checkpoint, 0, 1)
    assert state.precision.scaler.get_scale() == 128.0


def test_numbers_that_json_does_not_know_are_null(tmp_path, tiny_config):
    state = trainer_of(tiny_config(), build_model(tiny_config())).state
    MetricsLog(tmp_path, state).write('train', 3, a=math.inf, b=1.5)
    assert (tmp_path / 'metrics.jsonl').read_text() == '{"kind": "train", "updates": 3, "a": null, "b": 1.5}\n'


def test_metrics_go_to_tensorboard_too(tiny_config, image_tree):
    program.main(tiny_config(DATA__DATA_PATH=str(image_tree), TAG='without', TENSORBOARD='False'))
    assert not (folder_of(tiny_config(TAG='without')) / 'tensorboard').exists()
    config = tiny_config(DATA__DATA_PATH=str(image_tree))
    program.main(config)
    (folder_of(config) / 'ckpt_epoch_1.pth').unlink()
    program.main(config)
    events = EventAccumulator(str(folder_of(config) / 'tensorboard')).Reload()
    for kind, key in (('train', 'loss'), ('train', 'lr'), ('epoch', 'acc1'), ('epoch', 'val_loss')):
        written = [(event.step, event.value) for event in events.Scalars(f'{kind}/{key}')]
        expected = [(record['updates'], pytest.approx(record[key])) for record in records(config, kind)]
        assert written == expected  # each once, also those that came again


def test_automatic_resuming_into_another_model_tells_a_way_out(tiny_config, image_tree):
    program.main(tiny_config(DATA__DATA_PATH=str(image_tree)))
    with pytest.raises(CheckpointError, match='checkpoint of another model.*write another --tag or'):
        program.main(tiny_config(DATA__DATA_PATH=str(image_tree), MODEL__MSG__EMBED_DIM='16'))


def test_epochs_and_seeds_shuffle_differently(tiny_config, image_tree, monkeypatch):
    orders = []

    def train_one_epoch(trainer):
        trainer.state.begin_epoch()
        orders.append([index for _, index in trainer.loader.sampler])
        return {}

    monkeypatch.setattr(Trainer, 'train_one_epoch', train_one_epoch)
    for seed in ('0', '1', '0'):
        program.main(tiny_config(DATA__DATA_PATH=str(image_tree), SEED=seed, TRAIN__AUTO_RESUME='False'))
    assert orders[0] != orders[1]  # epochs
    assert orders[0] != orders[2]  # seeds
    assert orders[:2] == orders[4:]


def test_rank_r_is_seeded_with_seed_plus_r(tiny_config, monkeypatch):
    seeds = []
    monkeypatch.setattr(job, 'start_process', lambda *_: contextlib.nullcontext(Process(3, 8, CPU)))
    monkeypatch.setattr(job, 'set_seed', seeds.append)
    monkeypatch.setattr(program, 'throughput', lambda *_: None)
    program.main(tiny_config(SEED='40', THROUGHPUT_MODE='True'))
    assert seeds == [43]


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


def test_gradients_are_exchanged_once_an_update(tiny_config, monkeypatch):
    """In a process group of one, the all-reduces of an update of three batches."""
    config = tiny_config(**PLAIN)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group('gloo', store=store, rank=0, world_size=1)
    try:
        trainer = trainer_of(config, fill_(build_model(config)).train())
        exchanged = []

        def count(state, bucket):
            exchanged.append(bucket.index())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        trainer.network.register_comm_hook(None, count)
        batches = [(torch.randn(4, 3, 28, 28), torch.arange(4) % 3)] * 3
        for updates in (1, 2):
            trainer.train_step(batches)
            assert exchanged.count(0) == updates
    finally:
        torch.distributed.destroy_process_group()
