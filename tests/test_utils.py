import os
import pickle

import pytest
import torch
from torch import nn
from yacs.config import CfgNode

from utils import (
    LAUNCHER_VARIABLES,
    CheckpointError,
    all_reduce_sum,
    find_latest_checkpoint,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    start_process,
    synchronize_gradients,
)


def network(classes=3, width=4):
    return nn.ModuleDict({'body': nn.Linear(2, width), 'head': nn.Linear(width, classes)})


def test_checkpoints_survive_a_round_trip_and_leave_no_temporary_file(tmp_path):
    model = network()
    save_checkpoint(tmp_path / 'a.pth', {'model': model.state_dict(), 'epoch': 3, 'config': {'SEED': 1}})
    assert os.listdir(tmp_path) == ['a.pth']
    checkpoint = load_checkpoint(tmp_path / 'a.pth')
    assert (checkpoint['epoch'], checkpoint['config']) == (3, {'SEED': 1})
    other = network()
    assert not load_weights(other, checkpoint, 'a.pth')
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_failed_save_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / 'a.pth', {'model': {}, 'epoch': 1})

    def fail(state, path):
        path.write_bytes(b'half')
        raise OSError('disk full')

    monkeypatch.setattr(torch, 'save', fail)
    with pytest.raises(OSError, match='disk full'):
        save_checkpoint(tmp_path / 'a.pth', {'model': {}, 'epoch': 2})
    assert load_checkpoint(tmp_path / 'a.pth')['epoch'] == 1


def test_published_checkpoints_hold_a_yacs_node(tmp_path):
    node = CfgNode({'TRAIN': CfgNode({'EPOCHS': 300}), 'BASE': ['']})
    torch.save({'model': network().state_dict(), 'epoch': 299, 'config': node}, tmp_path / 'published.pth')
    checkpoint = load_checkpoint(tmp_path / 'published.pth')
    assert checkpoint['config']['TRAIN']['EPOCHS'] == 300
    assert not isinstance(checkpoint['config'], CfgNode)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ('owned',)


def test_files_that_are_no_checkpoints_are_refused_and_run_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'garbage.pth').write_bytes(b'not a checkpoint')
    (tmp_path / 'empty.pth').write_bytes(b'')
    torch.save({'model': Malicious()}, tmp_path / 'malicious.pth')
    (tmp_path / 'pickle.pth').write_bytes(pickle.dumps({'model': Malicious()}))
    for name in ('garbage', 'empty', 'malicious', 'pickle'):
        with pytest.raises(CheckpointError, match=f'{name}.pth is not a checkpoint that can be read safely'):
            load_checkpoint(tmp_path / f'{name}.pth')
    assert not (tmp_path / 'owned').exists()
    torch.save([1, 2], tmp_path / 'list.pth')
    with pytest.raises(CheckpointError, match='list.pth is not a checkpoint of this project: it has no entry'):
        load_checkpoint(tmp_path / 'list.pth')
    torch.save({'model': {'a': 1}}, tmp_path / 'values.pth')
    with pytest.raises(CheckpointError, match='values.pth .* no entry "model" of weights'):
        load_checkpoint(tmp_path / 'values.pth')
    with pytest.raises(CheckpointError, match='is a folder: name a file in it'):
        load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match='nowhere.pth does not exist'):
        load_checkpoint(tmp_path / 'nowhere.pth')


def test_the_weights_of_another_model_are_named():
    state = network(width=5).state_dict()
    state['extra'] = state.pop('body.bias')
    with pytest.raises(CheckpointError) as error:
        load_weights(network(), {'model': state}, 'other.pth')
    assert 'other.pth is a checkpoint of another model' in str(error.value)
    assert 'missing body.bias; unexpected extra; misshapen body.weight (5, 2) for (4, 2), head.weight' in str(
        error.value
    )
    many = {f'w{i}': torch.zeros(1) for i in range(9)}
    with pytest.raises(CheckpointError, match='unexpected w0, w1, w2 and 6 more'):
        load_weights(network(), {'model': many}, 'many.pth')


def test_a_new_head_replaces_one_of_other_classes_only_where_asked():
    source, target = network(classes=7), network(classes=3)
    head = target['head'].weight.clone()
    with pytest.raises(CheckpointError, match='misshapen head.weight'):
        load_weights(target, {'model': source.state_dict()}, 'x')
    assert load_weights(target, {'model': source.state_dict()}, 'x', may_replace_head=True)
    assert torch.equal(target['head'].weight, head)
    assert torch.equal(target['body'].weight, source['body'].weight)
    same = network(classes=3)
    assert not load_weights(target, {'model': same.state_dict()}, 'x', may_replace_head=True)
    assert torch.equal(target['head'].weight, same['head'].weight)


def test_the_latest_checkpoint_is_that_of_the_highest_epoch(tmp_path):
    assert find_latest_checkpoint(tmp_path) is None
    for name in ('ckpt_epoch_9.pth', 'ckpt_epoch_10.pth', 'ckpt_best.pth', 'ckpt_epoch_11.pth.tmp', 'ckpt_epoch_x.pth'):
        (tmp_path / name).touch()
    os.utime(tmp_path / 'ckpt_epoch_9.pth')  # the newest by time
    assert find_latest_checkpoint(tmp_path) == tmp_path / 'ckpt_epoch_10.pth'


def test_one_process_needs_no_launcher(monkeypatch):
    monkeypatch.delenv('RANK', raising=False)
    with start_process('cpu', 0) as process:
        assert (process.rank, process.world_size, process.device) == (0, 1, torch.device('cpu'))
        assert all_reduce_sum(torch.tensor([2.0])).item() == 2.0
        with synchronize_gradients(nn.Linear(1, 1), enabled=False):
            pass


def test_launcher_variables_set_in_part_are_told(monkeypatch):
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('RANK', '0')
    monkeypatch.setenv('WORLD_SIZE', '2')
    told = 'RANK is set but LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not: start with torchrun'
    with pytest.raises(ValueError, match=told), start_process('cpu', 0):
        pass


def test_a_device_that_is_not_there_is_told(monkeypatch):
    monkeypatch.delenv('RANK', raising=False)
    monkeypatch.setenv('LOCAL_RANK', '0')  # stale: there is no launcher
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    with (
        pytest.raises(ValueError, match='local rank 1 has no GPU, since 1 are visible.*--device cpu'),
        start_process('cuda', 1),
    ):
        pass
