"""Hashes of the weights, which metrics.jsonl records every HASH_FREQ updates."""

import hashlib

import pytest
import torch

import main as program
from engine.checkpoint import load_checkpoint
from engine.weights import hash_weights
from models import build_model
from tests.helpers.runs import RANDOM, differences, folder_of, last_checkpoint, one_thread, records
from trackers import TRACKERS, Tracker


def test_any_flipped_bit_changes_the_hash(tiny_config):
    weights = build_model(tiny_config()).state_dict()
    expected, seen = hash_weights(weights), set()
    for name, value in weights.items():
        byte = value.reshape(-1).view(torch.uint8)
        for position, bit in ((0, 0), (len(byte) // 2, 4), (-1, 7)):
            byte[position] ^= 1 << bit
            seen.add(hash_weights(weights))
            byte[position] ^= 1 << bit
            assert expected not in seen, name
    assert len(seen) == 3 * len(weights)
    assert hash_weights(weights) == expected == hash_weights({name: x.clone() for name, x in weights.items()})


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_what_a_hash_depends_on(dtype):
    values = torch.arange(6).to(dtype)
    values[1] = 0
    one = {'a': values, 'b': torch.zeros(2, 3, dtype=dtype)}
    others = [
        {'a': values[[1, 2, 0, 3, 4, 5]], 'b': one['b']},  # elements have moved
        {'a': values.view(2, 3), 'b': one['b']},
        {'a': one['b'], 'b': values},
        {'a': values},
        {**one, 'c': torch.zeros(0)},
        {**one, 'a': torch.arange(6, dtype=torch.float16)},
    ]
    assert len({hash_weights(weights) for weights in (one, *others)}) == 7
    assert hash_weights(dict(reversed(one.items()))) == hash_weights(one)
    transposed = {'a': values, 'b': torch.zeros(3, 2, dtype=dtype).T}  # the same numbers in another order in memory
    assert hash_weights(transposed) == hash_weights(one)
    assert hash_weights({'a': torch.tensor(0.0)}) != hash_weights({'a': torch.tensor(-0.0)})


def test_a_hash_is_the_same_in_later_versions():
    weights = {'a': torch.arange(3.0), 'b': torch.tensor(2)}
    assert hash_weights(weights) == 'a7c7f00946348353'
    assert len(hash_weights(weights, hashlib.sha256())) == 64


def test_hashes_are_recorded_every_so_many_updates_and_change_no_bit(tiny_config, image_tree, monkeypatch):
    told = []

    class Recorder(Tracker):
        def write(self, record):
            told.append(record['kind'])

    monkeypatch.setitem(TRACKERS, 'recorder', Recorder)
    common = {'DATA__DATA_PATH': str(image_tree), 'TRACKER': 'recorder', **RANDOM}
    common |= {'TRAIN__EPOCHS': '2', 'PRINT_FREQ': '3', 'AUG__REPEATS': '2'}
    hashed, plain = (tiny_config(TAG=freq, HASH_FREQ=freq, **common) for freq in ('4', '0'))
    with one_thread():
        program.main(hashed)
        program.main(plain)
    assert records(plain, 'hash') == []
    found = records(hashed, 'hash')
    assert [(x['epoch'], x['step'], x['updates']) for x in found] == [
        (0, 0, 1), (0, 4, 5), (0, 5, 6), (1, 0, 7), (1, 4, 11), (1, 5, 12)
    ]  # fmt: skip
    logged = {(x['epoch'], x['step']): x for x in records(hashed, 'train')}
    both = [(x, logged[x['epoch'], x['step']]) for x in found if (x['epoch'], x['step']) in logged]
    assert len(both) == 4
    assert all((one['loss'], one['grad_norm']) == (two['loss'], two['grad_norm']) for one, two in both)
    for epoch in (0, 1):
        weights = load_checkpoint(folder_of(hashed) / f'ckpt_epoch_{epoch}.pth')['model']
        assert found[3 * epoch + 2]['weights_hash'] == hash_weights(weights)
    assert set(told) == {'train', 'epoch'}
    assert differences(last_checkpoint(hashed), last_checkpoint(plain)) == []
