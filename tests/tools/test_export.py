"""`python -m tools.export`: files that run elsewhere, and the errors."""

import json
import sys

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from sklearn.datasets import load_sample_images
from torchvision.transforms.functional import normalize, to_tensor

from data.transforms import mean_and_std
from detection.models import build_detector
from engine.checkpoint import load_checkpoint, save_safetensors
from models import build_model
from tests.helpers.detectors import tiny_detector
from tests.helpers.golden import fill_
from tests.helpers.processes import error_line
from tools.export import check
from tools.export.__main__ import main

V2 = {'MODEL__MSG__EMBED_TYPE': 'overlap', 'MODEL__MSG__MERGE_TYPE': 'overlap'}
VARIANTS = {
    'v2': V2,
    'position embedding of one channel': {'MODEL__MSG__APE': 'True', 'MODEL__MSG__IN_CHANS': '1'},
    'no shuffle and no classes': {'MODEL__MSG__MANIP_TYPE': 'none', 'MODEL__NUM_CLASSES': '0'},
}


def save(path, model, config, **extra):
    torch.save({'model': fill_(model).state_dict(), 'config': yaml.safe_load(config.dump())} | extra, path)
    return model.eval()


@pytest.fixture
def classifier(tmp_path, tiny_config):
    """A function of config options that writes a.pth, and gives its network and config."""

    def write(**options):
        config = tiny_config(MODEL__MSG__WINDOW_SIZE='5', **options)
        return save(tmp_path / 'a.pth', build_model(config), config, classes=['ant', 'bee', 'cat']), config

    return write


@pytest.fixture
def export(tmp_path, monkeypatch, capsys):
    """A function that exports a.pth, and gives the file, its report and what was printed."""

    def run(format_, name, *flags):
        command = ['export', '--resume', 'a.pth', '--format', format_, '--output', name, *flags]
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, 'argv', command)
        main()
        return tmp_path / name, json.loads((tmp_path / f'{name}.json').read_text()), capsys.readouterr().out

    return run


def photographs(config, height, width):
    """Two photographs as the network's input, made without the tool."""
    mode = 'RGB' if config.MODEL.MSG.IN_CHANS == 3 else 'L'
    images = [Image.fromarray(x).convert(mode).resize((width, height)) for x in load_sample_images().images]
    return torch.stack([normalize(to_tensor(image), *mean_and_std(config)) for image in images])


def onnx_outputs(path, images):
    return [torch.from_numpy(x) for x in onnxruntime.InferenceSession(path).run(None, {'images': images.numpy()})]


def loaded(path):
    module = torch.export.load(path).module()
    return lambda images: module(images)


def assert_same(outputs, expected):
    for x, y in zip(outputs, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-4)


@torch.no_grad()
def test_onnx_of_any_size_equals_eager(classifier, export):
    model, config = classifier()
    path, report, out = export('onnx', 'a.onnx', '--always-pad')
    for size in ((28, 28), (33, 57), (2, 9), (97, 130)):
        images = photographs(config, *size)
        assert_same(onnx_outputs(path, images), [model(images)])
        assert_same(onnx_outputs(path, images[:1]), [model(images[:1])])
    session = onnxruntime.InferenceSession(path)
    assert session.get_inputs()[0].shape == ['batch', 3, 'height', 'width']
    assert session.get_outputs()[0].name == 'logits'
    assert report['input']['range'] == {'batch': [1, None], 'height': [2, 4096], 'width': [2, 4096]}
    assert report['classes'] == ['ant', 'bee', 'cat']
    assert report['opset'] == 20
    assert report['environment']['onnxruntime'] == onnxruntime.__version__
    assert report['config']['MODEL']['MSG']['PATCH_SIZE'] == 2
    assert report['preprocessing']['resize'] == {'shorter_side': 32, 'center_crop': 28, 'interpolation': 'bicubic'}
    assert report['preprocessing']['std'] == [0.229, 0.224, 0.225]
    assert 0 < report['max_abs_difference'] == max(x['difference'] for x in report['checked']) < 1e-4
    checked = [tuple(x['size']) for x in report['checked']]
    assert {(28, 28), (33, 57), (97, 130), (224, 224), (480, 640), (2, 2), (2, 4096), (4096, 2)} == set(checked)
    assert 'largest difference from eager execution: ' in out


@pytest.mark.slow
@torch.no_grad()
def test_torch_export_of_any_size_equals_eager(classifier, export):
    model, config = classifier(**V2)
    path, report, _ = export('torch_export', 'a.pt2', '--always-pad', '--size', '50', '31')
    run = loaded(path)
    for size in ((28, 28), (33, 57), (2, 9)):
        images = photographs(config, *size)
        assert_same([run(images), run(images[:1])], [model(images), model(images[:1])])
    assert report['checked'][0]['size'] == [50, 31]


@torch.no_grad()
@pytest.mark.parametrize(('format_', 'name'), [('onnx', 'a.onnx'), ('torch_export', 'a.pt2')])
def test_a_file_of_one_size(classifier, export, format_, name):
    model, config = classifier(**V2, MODEL__MSG__APE='True')
    path, report, out = export(format_, name, '--size', '33', '57')
    images = photographs(config, 33, 57)
    run = loaded(path) if format_ == 'torch_export' else lambda x: onnx_outputs(path, x)[0]
    assert_same([run(images), run(images[:1])], [model(images), model(images[:1])])
    assert report['input']['shape'] == ['batch', 3, 33, 57]
    assert report['input']['range'] == {'batch': [1, None]}
    assert [line.partition(':')[0] for line in out.splitlines()[:2]] == ['33 x 57, batch 1', '33 x 57, batch 3']


@torch.no_grad()
def test_a_detector_exports_its_backbone(tmp_path, export):
    config = tiny_detector()
    detector = save(tmp_path / 'a.pth', build_detector(config), config, classes=['x', 'y', 'z'])
    path, report, _ = export('torch_export', 'a.pt2', '--size', '64', '96')
    images = torch.randn(2, 3, 64, 96)
    outputs = loaded(path)(images)
    assert_same(outputs.values(), detector.backbone.body(images).values())
    assert report['network'] == "detector's backbone"
    assert report['outputs'] == list(outputs) == list('0123')
    assert report['preprocessing']['resize']['pad_to_multiple'] == 32


def test_safetensors_hold_the_whole_detector(tmp_path, export):
    config = tiny_detector()
    detector = save(tmp_path / 'a.pth', build_detector(config), config)
    path, _, _ = export('safetensors', 'a.safetensors')
    weights = detector.state_dict()
    saved = load_checkpoint(path)['model']
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[name], value) for name, value in weights.items())


def test_safetensors_are_a_checkpoint(classifier, export):
    model, _ = classifier()
    path, report, out = export('safetensors', 'a.safetensors')
    saved = load_checkpoint(path)
    assert saved['classes'] == report['classes'] == ['ant', 'bee', 'cat']
    assert saved['config']['MODEL']['NAME'] == 'tiny'
    assert all(torch.equal(saved['model'][name], value) for name, value in model.state_dict().items())
    assert report['max_abs_difference'] == 0
    assert out.splitlines()[0] == 'all weights read back equal'
    with safe_open(path, 'pt') as file:
        assert file.metadata()['format'] == 'pt'  # transformers refuses files without


def test_weights_that_read_back_differently_are_not_kept(classifier, export, tmp_path, monkeypatch):
    classifier()

    def convert_wrongly(source, target, choice):
        weights = load_checkpoint(source)['model']
        weights['head.bias'] = weights['head.bias'] + 1
        save_safetensors(target, weights)

    monkeypatch.setattr('tools.export.__main__.convert', convert_wrongly)
    with pytest.raises(SystemExit, match='does not read back equal, and is not kept: head.bias'):
        export('safetensors', 'a.safetensors')
    assert [path.name for path in tmp_path.iterdir()] == ['a.pth']


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize('options', VARIANTS.values(), ids=VARIANTS)
def test_every_network_at_any_size(classifier, export, options):
    model, config = classifier(**options)
    path, _, _ = export('onnx', 'a.onnx', '--always-pad')
    for size in ((28, 28), (33, 57), (2, 9), (200, 31)):
        images = photographs(config, *size)
        for batch in (images, images[:1]):
            assert_same(onnx_outputs(path, batch), [model(batch)])


@pytest.mark.slow
@torch.no_grad()
def test_a_backbone_of_any_size(tmp_path, export):
    config = tiny_detector()
    detector = save(tmp_path / 'a.pth', build_detector(config), config)
    path, _, _ = export('onnx', 'a.onnx', '--always-pad')
    assert [x.name for x in onnxruntime.InferenceSession(path).get_outputs()] == list('0123')
    for size in ((64, 96), (33, 57), (4, 300)):
        images = torch.randn(2, 3, *size)
        assert_same(onnx_outputs(path, images), detector.backbone.body(images).values())


@pytest.mark.slow
def test_latency(classifier, export):
    classifier()
    _, report, out = export('torch_export', 'a.pt2', '--latency', '--rounds', '2')
    assert report['latency']['median_seconds'].keys() == {'exported', 'eager', 'compiled'}
    assert report['latency']['shape'] == [1, 3, 28, 28]
    assert 'latency at 28 x 28, batch 1: exported ' in out


@pytest.mark.parametrize('shift', [2e-4, float('nan')])
def test_a_file_that_differs_is_not_kept(classifier, export, tmp_path, monkeypatch, shift):
    classifier()
    (tmp_path / 'a.pt2').write_text('old')
    run_file = check.compare
    monkeypatch.setattr(
        'tools.export.__main__.compare',
        lambda network, run, *rest: run_file(network, lambda images: [x + shift for x in run(images)], *rest),
    )
    with pytest.raises(SystemExit, match='differs by .* at 28 x 28, batch 1, more than 0.0001, and is not kept'):
        export('torch_export', 'a.pt2')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.pt2', 'a.pth']
    assert (tmp_path / 'a.pt2').read_text() == 'old'


def test_images_of_the_users(classifier, export, tmp_path):
    classifier(MODEL__MSG__IN_CHANS='1')
    (tmp_path / 'images').mkdir()
    Image.fromarray(np.arange(2500, dtype=np.uint16).reshape(50, 50) * 20).save(tmp_path / 'images' / 'grey 16.png')
    export('torch_export', 'a.pt2', '--images', 'images')
    (tmp_path / 'images' / 'grey 16.png').write_bytes(b'not an image')
    with pytest.raises(SystemExit, match='grey 16.png cannot be read'):
        export('torch_export', 'a.pt2', '--images', 'images')


def test_onnx_says_what_to_install(classifier, export, monkeypatch):
    classifier()
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    with pytest.raises(SystemExit, match=r'onnxscript is not installed: pip install -r requirements-export.txt'):
        export('onnx', 'a.onnx')


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--format', 'onnx', '--output', 'b.pt'], 'b.pt has another suffix: write .onnx for onnx'),
        (['--format', 'onnx', '--output', 'folder.onnx'], 'folder.onnx is a folder: give the name of a file'),
        (['--format', 'onnx', '--output', 'a.pth/b.onnx'], ': File exists: write to another folder'),
        (['--format', 'onnx', '--output', 'b.onnx', '--size', '1'], r'--size 1 x 1: sides are from 2 \(one patch\)'),
        (['--format', 'onnx', '--output', 'b.onnx', '--size', '28', '--size', '32'], 'one for all with --always-pad'),
        (['--format', 'onnx', '--output', 'b.onnx', '--images', 'nowhere'], 'nowhere does not exist'),
    ],
)
def test_mistakes(classifier, tmp_path, monkeypatch, flags, message):
    classifier()
    (tmp_path / 'folder.onnx').mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['export', '--resume', 'a.pth', *flags])
    with pytest.raises(SystemExit, match=message):
        main()
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.pth', 'folder.onnx']


def test_a_backbone_needs_a_size(tmp_path, export):
    config = tiny_detector()
    save(tmp_path / 'a.pth', build_detector(config), config)
    with pytest.raises(SystemExit, match='has no size of its own: give --size, or --always-pad'):
        export('onnx', 'a.onnx')


def test_the_checkpoint_is_not_overwritten(classifier, tmp_path, export):
    classifier()
    export('safetensors', 'b.safetensors')
    (tmp_path / 'a.pth').write_bytes((tmp_path / 'b.safetensors').read_bytes())
    (tmp_path / 'link.safetensors').symlink_to('a.pth')
    with pytest.raises(SystemExit, match='a.pth is the checkpoint and would be overwritten'):
        export('safetensors', 'link.safetensors')


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--size', '1', '2', '3'], 'error: --size takes one number, or height and width: write --size again for'),
        (['--size', '0'], 'error: argument --size: 0 is not a positive integer'),
        (['--format', 'tflite'], "error: argument --format: invalid choice: 'tflite'"),
        (['--format', 'safetensors', '--latency'], 'error: safetensors holds weights, for any size: leave out'),
        (['--format', 'safetensors', '--size', '28'], 'error: safetensors holds weights, for any size: leave out'),
    ],
)
def test_wrong_arguments(monkeypatch, capsys, flags, message):
    command = ['export', '--resume', 'a.pth', '--format', 'onnx', '--output', 'a.onnx', *flags]
    monkeypatch.setattr(sys, 'argv', command)
    with pytest.raises(SystemExit):
        main()
    assert message in capsys.readouterr().err


def test_a_missing_checkpoint_is_reported_in_one_line(tmp_path):
    output = tmp_path / 'a.pt2'
    message = error_line('-m', 'tools.export', '--resume', 'nowhere', '--format', 'torch_export', '--output', output)
    assert message == 'error: checkpoint nowhere does not exist'
