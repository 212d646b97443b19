import json

import pytest
import torch

import main as program
from engine.checkpoint import CheckpointError, load_checkpoint
from tests.helpers.processes import start
from tests.helpers.runs import folder_of
from tools.convert_checkpoint import convert


def test_weights_survive_conversion_to_safetensors_and_back(tmp_path, tiny_config, image_tree, capsys):
    config = tiny_config(DATA__DATA_PATH=str(image_tree), TRAIN__EMA_DECAY='0.9')
    program.main(config)
    source = folder_of(config) / 'ckpt_epoch_1.pth'
    checkpoint = load_checkpoint(source)
    for ema in (False, True):
        out, back = tmp_path / 'weights.safetensors', tmp_path / 'back.pth'
        assert convert(source, out, ema) == convert(out, back) == len(checkpoint['model'])
        for path in (out, back):
            loaded = load_checkpoint(path)
            assert loaded.keys() == {'model', 'config', 'classes'}
            assert loaded['classes'] == checkpoint['classes']
            assert loaded['config'] == json.loads(json.dumps(checkpoint['config']))
            expected = checkpoint['model_ema' if ema else 'model']
            assert loaded['model'].keys() == expected.keys()
            assert all(torch.equal(value, expected[name]) for name, value in loaded['model'].items())
    evaluation = tiny_config(DATA__DATA_PATH=str(image_tree), EVAL_MODE='True', MODEL__RESUME=str(out))
    program.main(evaluation)  # a .safetensors file is a checkpoint
    assert f'weights of {out}' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('source', 'target', 'ema', 'message'),
    [
        ('a.pth', 'b.onnx', False, 'b.onnx has an unknown suffix: write .pth or .safetensors'),
        ('a.pth', 'b.pth', True, 'a.pth holds no EMA weights'),
        ('nowhere.pth', 'b.pth', False, 'nowhere.pth does not exist'),
        ('a.pth', 'nowhere/b.safetensors', False, 'nowhere/b.safetensors cannot be written: No such file or directory'),
    ],
)
def test_conversion_errors(tmp_path, source, target, ema, message):
    torch.save({'model': {'x': torch.zeros(1)}}, tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / source, tmp_path / target, ema)


def test_command_line(tmp_path):
    weights = {'x': torch.zeros(1)}
    torch.save({'model': weights, 'model_ema': {'x': torch.ones(1)}}, tmp_path / 'a.pth')
    out = tmp_path / 'b.safetensors'
    done = start('-m', 'tools.convert_checkpoint', tmp_path / 'a.pth', out, '--ema')
    assert done.stdout == f'{out}: 1 tensors\n', done.stderr
    assert load_checkpoint(out)['model']['x'].item() == 1
