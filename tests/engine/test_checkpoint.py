"""Checkpoint files: durable, verified, safe to read."""

import argparse
import collections
import contextlib
import datetime
import errno
import os
import pickle
import resource
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from yacs.config import CfgNode

from engine.checkpoint import (
    CheckpointError,
    load_checkpoint,
    peek_checkpoint,
    save_checkpoint,
    save_safetensors,
    saved_progress,
)
from engine.weights import choose_weights, load_weights
from tests.helpers.paths import ROOT


def network(classes=3, width=4):
    return nn.ModuleDict({'body': nn.Linear(2, width), 'head': nn.Linear(width, classes)})


def test_round_trip_leaves_no_temporary_file(tmp_path):
    model = network()
    save_checkpoint(tmp_path / 'a.pth', {'model': model.state_dict(), 'epoch': 3, 'config': {'SEED': 1}})
    assert os.listdir(tmp_path) == ['a.pth']
    checkpoint = load_checkpoint(tmp_path / 'a.pth')
    assert (checkpoint['epoch'], checkpoint['config']) == (3, {'SEED': 1})
    other = network()
    assert not load_weights(other, checkpoint, 'a.pth').is_head_new
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_file_is_flushed_then_renamed_then_the_folder_is_flushed(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor):
        calls.append(('fsync', os.path.basename(os.readlink(f'/proc/self/fd/{descriptor}'))))
        fsync(descriptor)

    def note_replace(source, target):
        calls.append(('rename', target.name))
        replace(source, target)

    monkeypatch.setattr(os, 'fsync', note_fsync)
    monkeypatch.setattr(os, 'replace', note_replace)
    save_checkpoint(tmp_path / 'a.pth', {'model': {}})
    assert [(call, name.partition('.pth.')[0]) for call, name in calls] == [
        ('fsync', 'a'),  # the temporary file
        ('rename', 'a.pth'),
        ('fsync', tmp_path.name),
    ]
    assert calls[0][1].endswith('.tmp')


@pytest.mark.parametrize(('number', 'tolerated'), [(errno.EINVAL, True), (errno.EIO, False)])
def test_unsupported_flush_of_a_folder_is_tolerated_but_a_disk_error_is_not(tmp_path, monkeypatch, number, tolerated):
    def fsync(descriptor):
        if os.path.isdir(f'/proc/self/fd/{descriptor}'):
            raise OSError(number, 'folder')

    monkeypatch.setattr(os, 'fsync', fsync)
    with contextlib.nullcontext() if tolerated else pytest.raises(CheckpointError, match='folder'):
        save_checkpoint(tmp_path / 'a.pth', {'model': {}})


@pytest.mark.parametrize('when', ['write', 'fsync', 'rename'])
def test_failed_save_keeps_the_old_checkpoint_and_is_reported(tmp_path, monkeypatch, when):
    save_checkpoint(tmp_path / 'a.pth', {'model': {}, 'epoch': 1})

    def fail(*_):
        raise OSError(28, 'No space left on device')

    target = {'write': (torch, 'save'), 'fsync': (os, 'fsync'), 'rename': (os, 'replace')}[when]
    with monkeypatch.context() as patch:
        patch.setattr(*target, fail)
        with pytest.raises(CheckpointError, match='a.pth cannot be written: No space left on device. Earlier'):
            save_checkpoint(tmp_path / 'a.pth', {'model': {}, 'epoch': 2})
    assert load_checkpoint(tmp_path / 'a.pth')['epoch'] == 1
    assert os.listdir(tmp_path) == ['a.pth']


def test_file_too_large_for_the_disk(tmp_path):
    """A real failed write, in a process whose files are limited to 100 kB."""
    script = (
        'import torch; from pathlib import Path; from engine.checkpoint import *\n'
        f'path = Path({str(tmp_path)!r}) / "a.pth"\n'
        'save_checkpoint(path, {"model": {}, "epoch": 1})\n'
        'try: save_checkpoint(path, {"model": {"x": torch.zeros(1_000_000)}, "epoch": 2})\n'
        'except CheckpointError as error: print(error)\n'
    )
    limit = 100_000
    done = subprocess.run(
        [sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert 'a.pth cannot be written: File too large. Earlier checkpoints are intact' in done.stdout, done
    assert load_checkpoint(tmp_path / 'a.pth')['epoch'] == 1
    assert os.listdir(tmp_path) == ['a.pth']


def test_published_checkpoints_hold_a_yacs_node(tmp_path):
    node = CfgNode({'TRAIN': CfgNode({'EPOCHS': 300}), 'BASE': ['']})
    torch.save({'model': network().state_dict(), 'epoch': 299, 'config': node}, tmp_path / 'published.pth')
    checkpoint = load_checkpoint(tmp_path / 'published.pth')
    assert checkpoint['config']['TRAIN']['EPOCHS'] == 300
    assert not isinstance(checkpoint['config'], CfgNode)


def test_checkpoints_in_the_format_before_pytorch_1_6(tmp_path):
    path = tmp_path / 'old.pth'
    torch.save({'model': network().state_dict(), 'epoch': 5}, path, _use_new_zipfile_serialization=False)
    assert load_checkpoint(path)['epoch'] == 5
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match='old.pth is not a checkpoint that can be read safely'):
        load_checkpoint(path)


def prefixed(weights, prefix):
    return {prefix + name: value for name, value in weights.items()}


@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.', 'module._orig_mod.', '_orig_mod.module.'])
@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_plain_state_dicts_are_weights(tmp_path, prefix, suffix):
    weights = network().state_dict()
    path = tmp_path / f'weights.{suffix}'
    if suffix == 'pth':
        torch.save(prefixed(weights, prefix), path)
    else:
        safetensors.torch.save_file(prefixed(weights, prefix), path)
    checkpoint = load_checkpoint(path)
    assert checkpoint.keys() == {'model', 'task'}
    other = network()
    load_weights(other, checkpoint, path)
    assert torch.equal(other['head'].weight, weights['head.weight'])


def test_prefix_of_some_names_is_part_of_them(tmp_path):
    torch.save({'module.a': torch.zeros(1), 'b': torch.zeros(1)}, tmp_path / 'a.pth')
    assert load_checkpoint(tmp_path / 'a.pth')['model'].keys() == {'module.a', 'b'}


@pytest.mark.parametrize(
    ('weights_key', 'ema_key'),
    [('state_dict', None), ('state_dict', 'state_dict_ema'), ('model', 'model_ema'), (None, 'model_ema')],
)
def test_timm_checkpoints(tmp_path, weights_key, ema_key):
    raw, ema = network().state_dict(), network().state_dict()
    state = {'epoch': 3, 'arch': 'msg_tiny', 'args': argparse.Namespace(lr=0.1), 'metric': 81.0}
    state |= {weights_key: prefixed(raw, 'module.')} if weights_key else {}
    state |= {ema_key: prefixed(ema, 'module.')} if ema_key else {'state_dict_ema': None}
    torch.save(state, tmp_path / 'timm.pth')
    checkpoint = load_checkpoint(tmp_path / 'timm.pth')
    expected = {'model': raw if weights_key else ema} | ({'model_ema': ema} if ema_key else {})
    assert checkpoint.keys() == {'epoch', 'arch', 'args', 'metric', 'task'} | expected.keys()
    for entry, weights in expected.items():
        assert checkpoint[entry].keys() == weights.keys()
        assert all(torch.equal(value, weights[name]) for name, value in checkpoint[entry].items())


def test_text_in_the_metadata_of_safetensors_is_skipped(tmp_path):
    metadata = {'format': 'pt', 'classes': '["a", "b"]', 'model': '"x"'}
    safetensors.torch.save_file({'x': torch.ones(1)}, tmp_path / 'a.safetensors', metadata)
    checkpoint = load_checkpoint(tmp_path / 'a.safetensors')
    assert checkpoint == {'model': {'x': torch.ones(1)}, 'classes': ['a', 'b'], 'task': 'classification'}


@pytest.mark.parametrize(
    ('config', 'name', 'task'),
    [
        ({'TASK': 'detection'}, 'head.weight', 'detection'),
        ({'TASK': 'classification'}, 'backbone.weight', 'classification'),
        ({'MODEL': {'TYPE': 'cascade_rcnn'}}, 'head.weight', 'detection'),  # of an older version
        ({'MODEL': {'TYPE': 'msg'}}, 'backbone.weight', 'classification'),
        (None, 'backbone.body.norm.weight', 'detection'),  # of another program
        (None, 'norm.weight', 'classification'),
        ({'TASK': 'pretrain'}, 'norm.weight', 'classification'),
        ({'MODEL': {'TYPE': 'faster_rcnn'}}, 'backbone.norm.weight', 'detection'),
        ([], 'norm.weight', 'classification'),
    ],
)
def test_a_checkpoint_has_a_task(tmp_path, config, name, task):
    save_checkpoint(
        tmp_path / 'a.pth', {'model': {name: torch.ones(1)}} | ({} if config is None else {'config': config})
    )
    assert load_checkpoint(tmp_path / 'a.pth')['task'] == task


def test_files_without_tensors_are_refused(tmp_path):
    torch.save({}, tmp_path / 'a.pth')
    torch.save({'state_dict': {'a': 1}}, tmp_path / 'b.pth')
    safetensors.torch.save_file({}, tmp_path / 'c.safetensors', {'format': 'pt'})
    for name in ('a.pth', 'b.pth', 'c.safetensors'):
        with pytest.raises(CheckpointError, match=f'{name} is not a checkpoint of this project: .* is no state dict'):
            load_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    ('scores', 'choice', 'expected'),
    [
        (None, 'auto', 'EMA weights'),
        ({'raw': 16.5}, 'auto', 'EMA weights'),
        ({'raw': 16.5, 'ema': 18.04}, 'auto', 'EMA weights (18.0 against 16.5 %)'),
        ({'raw': 16.5, 'ema': 16.5}, 'auto', 'EMA weights (16.5 against 16.5 %)'),
        ({'raw': 16.5, 'ema': 0.1}, 'auto', 'raw weights (16.5 against 0.1 %)'),
        ({'raw': 16.5, 'ema': 0.1}, 'ema', 'EMA weights (0.1 against 16.5 %)'),
        ({'raw': 16.5, 'ema': 18.0}, 'raw', 'raw weights (16.5 against 18.0 %)'),
        (None, 'raw', 'raw weights'),
    ],
)
def test_better_of_raw_and_ema_weights_is_chosen(scores, choice, expected):
    checkpoint = {'model': {'x': 'raw'}, 'model_ema': {'x': 'EMA'}} | ({'scores': scores} if scores else {})
    weights, description = choose_weights(checkpoint, 'a.pth', choice)
    assert description == expected
    assert weights['x'] == expected.split()[0]


def test_choice_without_ema_weights():
    checkpoint = {'model': {'x': 'raw'}, 'scores': {'raw': 16.5}}
    for choice in ('auto', 'raw'):
        assert choose_weights(checkpoint, 'a.pth', choice) == (checkpoint['model'], 'no EMA weights')
    with pytest.raises(CheckpointError, match='a.pth holds no EMA weights: write --pretrained-weights raw'):
        choose_weights(checkpoint, 'a.pth', 'ema')


class Malicious:
    def __reduce__(self):
        return os.mkdir, ('owned',)


def test_other_files_are_refused_and_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'garbage.pth').write_bytes(b'not a checkpoint')
    (tmp_path / 'empty.pth').write_bytes(b'')
    torch.save({'model': Malicious()}, tmp_path / 'malicious.pth')
    torch.save({'model': {}, 'config': Malicious()}, tmp_path / 'malicious_config.pth')
    torch.save({'model': Malicious()}, tmp_path / 'legacy.pth', _use_new_zipfile_serialization=False)
    (tmp_path / 'pickle.pth').write_bytes(pickle.dumps({'model': Malicious()}))
    (tmp_path / 'garbage.safetensors').write_bytes(b'not a checkpoint')
    names = ['garbage.pth', 'empty.pth', 'malicious.pth', 'malicious_config.pth', 'legacy.pth', 'pickle.pth']
    for name in [*names, 'garbage.safetensors']:
        with pytest.raises(CheckpointError, match=f'{name} is not a checkpoint that can be read safely') as error:
            load_checkpoint(tmp_path / name)
        assert 'weights_only' not in str(error.value)
    assert not (tmp_path / 'owned').exists()
    torch.save([1, 2], tmp_path / 'list.pth')
    with pytest.raises(CheckpointError, match='list.pth is not a checkpoint of this project: it has no entry'):
        load_checkpoint(tmp_path / 'list.pth')
    torch.save({'model': {'a': 1}}, tmp_path / 'values.pth')
    with pytest.raises(CheckpointError, match='values.pth .* no entry "model" with weights'):
        load_checkpoint(tmp_path / 'values.pth')
    with pytest.raises(CheckpointError, match='is a folder: name a file in it'):
        load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match='nowhere.pth does not exist'):
        load_checkpoint(tmp_path / 'nowhere.pth')


def test_scalars_of_numpy_and_paths_are_read_as_plain_data(tmp_path):
    entries = {
        'epoch': np.int64(3), 'best_acc': np.float64(81.25), 'swapped': np.dtype('>f4').type(2), 'flag': np.bool_(True),
        'name': np.str_('häns'), 'output': Path('runs/1'), 'pure': PurePosixPath('a') / 'b', 'half': np.float16(0.5),
        'tensor': torch.tensor(2), 'max_accuracy': torch.tensor(81.5),
    }  # fmt: skip
    safe_globals = torch.serialization.get_safe_globals()
    for is_zip in (True, False):
        torch.save(
            {'model': network().state_dict()} | entries, tmp_path / 'a.pth', _use_new_zipfile_serialization=is_zip
        )
        checkpoint = load_checkpoint(tmp_path / 'a.pth')
        plain = {name: value for name, value in checkpoint.items() if name in entries and name != 'tensor'}
        assert plain == {
            'epoch': 3, 'best_acc': 81.25, 'swapped': 2.0, 'flag': True, 'name': 'häns', 'output': 'runs/1',
            'pure': 'a/b', 'half': 0.5, 'max_accuracy': 81.5,
        }  # fmt: skip
        assert {type(value) for value in plain.values()} == {int, float, bool, str}
    assert set(torch.serialization.get_safe_globals()) == set(safe_globals)


@pytest.mark.parametrize(
    ('value', 'name'),
    [
        (np.zeros(2), 'numpy.ndarray'),
        (np.datetime64('2020-01-01'), None),
        (datetime.date(2020, 1, 1), 'datetime.date'),
        (collections.deque(), 'collections.deque'),
        (Malicious(), f'{os.mkdir.__module__}.mkdir'),
    ],
)
def test_other_types_are_named(tmp_path, value, name):
    torch.save({'model': network().state_dict(), 'extra': value}, tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match='a.pth is not a checkpoint that can be read safely') as error:
        load_checkpoint(tmp_path / 'a.pth')
    if name:
        assert f'it holds {name}, whose code would run: in the program that wrote the file, save' in str(error.value)


def test_entries_of_other_programs_are_left_out(tmp_path):
    other = {'config': 'a.yaml', 'classes': 1000, 'epoch': 'last', 'scores': [1], 'max_accuracy': None, 'extra': {1: 2}}
    torch.save({'model': network().state_dict()} | other, tmp_path / 'a.pth')
    checkpoint = load_checkpoint(tmp_path / 'a.pth')
    assert checkpoint.keys() == {'model', 'extra', 'task', 'ignored'}
    assert checkpoint['ignored'] == ['config (str)', 'classes (int)', 'epoch (str)', 'scores (list)']
    assert saved_progress(peek_checkpoint(tmp_path / 'a.pth'))['epoch'] == 0


@pytest.mark.parametrize('change', [torch.Tensor.to_sparse, lambda x: x.to('meta')])
@pytest.mark.filterwarnings('ignore:Sparse invariant')
def test_weights_that_are_no_ordinary_tensors_are_named(tmp_path, change):
    torch.save({'model': {'a': torch.ones(2, 2), 'b': change(torch.ones(2, 2))}}, tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match='a.pth: b is not a dense tensor with data'):
        load_checkpoint(tmp_path / 'a.pth')


def test_zip_files_that_are_no_checkpoints_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / 'a.pth', 'w') as archive:
        archive.writestr('a/b.txt', 'text')
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / 'b.pth')
    (tmp_path / 'model.safetensors.index.json').write_text('{"weight_map": {"x": "../../x.safetensors"}}')
    for name in ('a.pth', 'b.pth', 'model.safetensors.index.json', '\0', 'x' * 5000):
        with pytest.raises(CheckpointError, match='can be read safely|does not exist') as error:
            load_checkpoint(tmp_path / name)
        assert 'weights_only' not in str(error.value)


def test_our_safetensors_state_their_format_and_hold_shared_weights_twice(tmp_path):
    weights = {'a': torch.ones(4), 'c': torch.arange(4.0)}
    weights |= {'b': weights['a'], 'd': weights['c'][1:]}
    save_safetensors(tmp_path / 'a.safetensors', weights, classes=['x'])
    with safetensors.safe_open(tmp_path / 'a.safetensors', 'pt') as file:
        assert file.metadata() == {'format': 'pt', 'classes': '["x"]'}
    loaded = load_checkpoint(tmp_path / 'a.safetensors')
    assert loaded.keys() == {'model', 'classes', 'task'}
    assert all(torch.equal(loaded['model'][name], value) for name, value in weights.items())


def test_missing_and_unexpected_weights_are_left_as_they_are_on_request():
    source, target = network().state_dict(), network()
    source['old.weight'] = source.pop('body.bias')
    bias = target['body'].bias.clone()
    with pytest.raises(CheckpointError, match='missing: body.bias; unexpected: old.weight; --pretrained-missing allow'):
        load_weights(target, {'model': source}, 'x', missing='report')
    loaded = load_weights(target, {'model': source}, 'x', missing='allow')
    assert (loaded.missing, loaded.unexpected) == (['body.bias'], ['old.weight'])
    assert loaded.notes == [
        '1 weights not in the file, kept as initialized: body.bias',
        '1 weights not in the network, left out: old.weight',
    ]
    assert torch.equal(target['body'].bias, bias)
    assert torch.equal(target['body'].weight, source['body.weight'])
    with pytest.raises(CheckpointError, match='missing: body.bias, body.weight.* shape mismatch: head.weight') as error:
        load_weights(target, {'model': {'head.weight': torch.ones(1)}}, 'x', missing='report')
    assert 'allow' not in str(error.value)
    with pytest.raises(CheckpointError, match='shape mismatch: head.weight'):
        load_weights(target, {'model': {'head.weight': torch.ones(1)}}, 'x', missing='allow')
    with pytest.raises(CheckpointError, match='unexpected: other'):  # none of the network's
        load_weights(target, {'model': {'other': torch.ones(1)}}, 'x', missing='allow')


def test_flipped_bit_and_truncation_are_detected(tmp_path):
    path = tmp_path / 'a.pth'
    weights = torch.arange(20_000, dtype=torch.float32)
    save_checkpoint(path, {'model': {'x': weights}})
    whole = bytearray(path.read_bytes())
    flipped = whole.copy()
    flipped[whole.index(weights[5_000:5_100].numpy().tobytes())] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(CheckpointError, match='a.pth is damaged: the checksum of .*data/0 is wrong'):
        load_checkpoint(path)
    for size in (0, 1, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r'a.pth is not a checkpoint that can be read safely'):
            load_checkpoint(path)


def test_weights_of_a_different_model_are_named():
    state = network(width=5).state_dict()
    state['extra'] = state.pop('body.bias')
    with pytest.raises(CheckpointError) as error:
        load_weights(network(), {'model': state}, 'other.pth')
    assert 'other.pth holds a different model from the config' in str(error.value)
    assert 'missing: body.bias; unexpected: extra; shape mismatch: body.weight (5, 2) for (4, 2), head.weight' in str(
        error.value
    )
    many = {f'w{i}': torch.zeros(1) for i in range(9)}
    with pytest.raises(CheckpointError, match='unexpected: w0, w1, w2 and 6 more'):
        load_weights(network(), {'model': many}, 'many.pth')


def test_head_of_other_classes_is_replaced_only_on_request():
    source, target = network(classes=7), network(classes=3)
    head = target['head'].weight.clone()
    with pytest.raises(CheckpointError, match='shape mismatch: head.weight'):
        load_weights(target, {'model': source.state_dict()}, 'x')
    assert load_weights(target, {'model': source.state_dict()}, 'x', r'head\.').is_head_new
    assert torch.equal(target['head'].weight, head)
    assert torch.equal(target['body'].weight, source['body'].weight)
    same = network(classes=3)
    assert not load_weights(target, {'model': same.state_dict()}, 'x', r'head\.').is_head_new
    assert torch.equal(target['head'].weight, same['head'].weight)
