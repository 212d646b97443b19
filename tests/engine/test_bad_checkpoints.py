"""Checkpoints whose entries are of any type: every program that reads one tells in a line what is wrong."""

import random

import pytest
import torch

import main as program
from config import load_config
from engine.checkpoint import load_checkpoint
from engine.predictor import load_predictor, prediction_parser
from engine.run_folder import RunFolder
from engine.start import Start, resume_training
from models import build_model
from tests.helpers.images import write_images
from tests.helpers.paths import TINY
from tests.helpers.runs import PLAIN, build_run, build_trainer, folder_of
from tools.convert_checkpoint import convert
from utils import UserError

SEEDS = range(16)  # of a few hundred that were tried

VALUES = [
    None, [], {}, '', 'x' * 3000, 0, -1, 3, 1e400, float('nan'), True, b'abc', set(), (1, 2), [[]], [None],
    {1: 2}, {'a': None}, {'kind': 'x'}, {'state': {}, 'param_groups': []}, [{'random': 1, 'sums': 2}], '../../x',
    torch.zeros(3), torch.tensor(3), torch.zeros(0), torch.zeros(2, dtype=torch.complex64),
    torch.zeros(2, 2).to_sparse(), torch.zeros(2, device='meta'), torch.zeros(9, 8, dtype=torch.int64),
]  # fmt: skip


def mutated(value, rng, depth=0):
    """A copy of nested data in which one thing, somewhere, is something else, missing or added."""
    if isinstance(value, dict) and value and (depth == 0 or rng.random() < 0.7):
        value, key, action = dict(value), rng.choice(list(value)), rng.random()
        if action < 0.1:
            del value[key]
        elif action < 0.15:
            value[rng.choice((1, None, 'unknown', (1,)))] = rng.choice(VALUES)
        else:
            value[key] = mutated(value[key], rng, depth + 1)
        return value
    if isinstance(value, list) and value and rng.random() < 0.7:
        index = rng.randrange(len(value))
        return [*value[:index], mutated(value[index], rng, depth + 1), *value[index + 1 :]]
    if isinstance(value, torch.Tensor) and value.layout == torch.strided and rng.random() < 0.6:
        return rng.choice((value[..., None], value.flatten(), value.flatten()[:0], value.long(), value.half()))
    return rng.choice(VALUES)


def error_of(function):
    """The message of the `UserError` that a function raises; '' if it raises nothing."""
    try:
        function()
    except UserError as error:
        return str(error)
    return ''


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """The config and a checkpoint, within an epoch, of a run."""
    folder = tmp_path_factory.mktemp('finished')
    options = {'DATA.DATA_PATH': str(write_images(folder / 'images')), 'OUTPUT': str(folder / 'output')}
    options |= {key.replace('__', '.'): value for key, value in PLAIN.items()}
    options |= {'SAVE_STEPS': '1', 'SAVE_KEEP': '0', 'TRAIN.EMA_DECAY': '0.9', 'TRAIN.EPOCHS': '2'}
    config = load_config(TINY, [x for pair in options.items() for x in pair])
    program.main(config)
    return config, torch.load(folder_of(config) / 'ckpt_epoch_1_step_1.pth', weights_only=True)


def predict(path, *_):
    args = ['images', '--resume', str(path), '--opts', 'DEVICE', 'cpu']
    load_predictor(prediction_parser('').parse_intermixed_args(args), program.TASK)


def resume(path, config, provenance):
    """What a run does with its checkpoint before its first update."""
    checkpoint = load_checkpoint(path)
    trainer = build_trainer(config, build_model(config), run=build_run(config))
    trainer.state.sampler.length = 24
    start = Start('resume', checkpoint.get('origin'), str(path), checkpoint)
    start.load_weights(build_run(config), program.TASK, trainer.state.model, provenance['classes'])
    resume_training(build_run(config), program.TASK, trainer.state, start, provenance)
    for parameter in trainer.state.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainer.state.optimizer.step()


def look_into_folder(path, config, _):
    path.rename(path.with_name('ckpt_best.pth'))
    folder = RunFolder(path.parent, 1, build_run(config).logger)
    folder.is_best({'raw': 1.0})
    folder.newest_intact()


def convert_to_safetensors(path, *_):
    convert(path, path.with_suffix('.safetensors'))


@pytest.mark.filterwarnings('ignore:Sparse invariant', 'ignore:Using a non-tuple sequence')
@pytest.mark.parametrize('read', [predict, resume, look_into_folder, convert_to_safetensors])
def test_any_entry_of_any_type_is_an_error_in_one_line_or_none(finished, tmp_path, read):
    config, checkpoint = finished
    provenance = {name: checkpoint[name] for name in ('classes', 'data', 'environment', 'origin')}
    outcomes = set()
    for seed in SEEDS:
        rng = random.Random(seed)
        changed = checkpoint
        for _ in range(rng.choice((1, 1, 2, 4))):
            changed = mutated(changed, rng)
        path = tmp_path / f'{seed}.pth'
        torch.save(changed, path)
        message = error_of(lambda path=path: read(path, config, provenance))
        assert '\n' not in message, seed
        assert len(message) < 1000, seed
        outcomes.add('refused' if message else 'taken')
        (tmp_path / 'ckpt_best.pth').unlink(missing_ok=True)
    assert 'taken' in outcomes
    assert 'refused' in outcomes or read not in (predict, resume)


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_damaged_files(finished, tmp_path, suffix):
    path = tmp_path / f'whole.{suffix}'
    torch.save(finished[1], tmp_path / 'source.pth')
    convert(tmp_path / 'source.pth', path)
    whole = path.read_bytes()
    for seed in range(16):
        rng = random.Random(seed)
        content = bytearray(whole)
        if seed % 2:
            content = content[: rng.randrange(len(content))]
        else:
            limit = min(len(content), rng.choice((200, len(content))))
            for _ in range(rng.choice((1, 20))):
                content[rng.randrange(limit)] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        assert '\n' not in error_of(lambda: predict(path)), seed
