import json
import sys

import pytest
import torch

import main as program
from engine.checkpoint import CheckpointError, load_checkpoint
from tests.helpers.processes import error_line
from tests.helpers.runs import folder_of
from tools.convert_checkpoint import convert
from tools.convert_checkpoint import main as convert_main


def test_weights_survive_conversion_to_safetensors_and_back(tmp_path, tiny_config, image_tree, capsys):
    config = tiny_config(DATA__DATA_PATH=str(image_tree), TRAIN__EMA_DECAY='0.9')
    program.main(config)
    source = folder_of(config) / 'ckpt_epoch_1.pth'
    checkpoint = load_checkpoint(source)
    for choice, entry in (('raw', 'model'), ('ema', 'model_ema')):
        out, back = tmp_path / 'weights.safetensors', tmp_path / 'back.pth'
        assert convert(source, out, choice)[0] == convert(out, back)[0] == len(checkpoint['model'])
        for path in (out, back):
            loaded = load_checkpoint(path)
            assert loaded.keys() == {'model', 'config', 'classes', 'task'}
            assert loaded['classes'] == checkpoint['classes']
            assert loaded['config'] == json.loads(json.dumps(checkpoint['config']))
            expected = checkpoint[entry]
            assert loaded['model'].keys() == expected.keys()
            assert all(torch.equal(value, expected[name]) for name, value in loaded['model'].items())
    evaluation = tiny_config(DATA__DATA_PATH=str(image_tree), EVAL_MODE='True', MODEL__RESUME=str(out))
    program.main(evaluation)  # a .safetensors file is a checkpoint
    assert f'weights of {out}' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('source', 'target', 'choice', 'message'),
    [
        ('a.pth', 'b.onnx', 'auto', 'b.onnx has an unknown suffix: write .pth, .safetensors, or a folder'),
        ('a.pth', 'b.pth', 'ema', 'a.pth holds no EMA weights: write --pretrained-weights raw'),
        ('nowhere.pth', 'b.pth', '', 'nowhere.pth does not exist'),
        ('nowhere.pth', 'a.pth', '', 'nowhere.pth does not exist'),
        ('a.pth', 'a.pth', '', 'a.pth is the source, whose training state would be lost: write another name'),
        ('a.pth', 'nowhere/b.safetensors', '', 'nowhere/b.safetensors cannot be written: No such file or directory'),
    ],
)
def test_conversion_errors(tmp_path, source, target, choice, message):
    torch.save({'model': {'x': torch.zeros(1)}}, tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / source, tmp_path / target, choice)


@pytest.mark.parametrize(
    ('flags', 'scores', 'value', 'text'),
    [
        ([], {}, 1, 'EMA weights'),
        ([], {'raw': 16.5, 'ema': 18.0}, 1, 'EMA weights (18.0 against 16.5 %)'),
        ([], {'raw': 16.5, 'ema': 0.1}, 0, 'raw weights (16.5 against 0.1 %)'),
        (['--pretrained-weights', 'raw'], {'raw': 16.5, 'ema': 18.0}, 0, 'raw weights (16.5 against 18.0 %)'),
        (['--pretrained-weights', 'ema'], {'raw': 16.5, 'ema': 0.1}, 1, 'EMA weights (0.1 against 16.5 %)'),
    ],
)
def test_command_line(tmp_path, monkeypatch, capsys, flags, scores, value, text):
    weights, ema_weights = {'x': torch.zeros(1)}, {'x': torch.ones(1)}
    torch.save({'model': weights, 'model_ema': ema_weights, 'scores': scores}, tmp_path / 'a.pth')
    out = tmp_path / 'b.safetensors'
    monkeypatch.setattr(sys, 'argv', ['convert_checkpoint', str(tmp_path / 'a.pth'), str(out), *flags])
    convert_main()
    assert capsys.readouterr().out == f'{out}: 1 tensors, {text}\n'
    assert load_checkpoint(out)['model']['x'].item() == value


def test_missing_source_is_reported_in_one_line(tmp_path):
    (tmp_path / 'b.pth').touch()
    message = error_line('-m', 'tools.convert_checkpoint', tmp_path / 'nowhere.pth', tmp_path / 'b.pth')
    assert message == f'error: checkpoint {tmp_path}/nowhere.pth does not exist'
