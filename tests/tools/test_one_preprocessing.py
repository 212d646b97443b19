"""Evaluation and every tool see an image in the same way, as `DATA.EXIF` of the network's config says."""

import json
import sys

import pytest
import torch

from data import Preprocess, build_eval_loader
from data.file_loader import evaluation_loader
from data.images import find_images
from engine.checkpoint import load_checkpoint
from engine.predictor import Predictor, load_predictor, prediction_parser
from main import TASK
from models import build_model
from models.registry import stored_weights
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.datasets import WRITERS
from tests.helpers.documents import code_blocks
from tests.helpers.golden import fill_
from tests.helpers.images import noise, set_orientation
from tests.helpers.paths import ROOT, TINY
from tests.helpers.runs import CPU
from tools.app.explainer import Explainer
from tools.export.__main__ import main as export
from tools.predict import predict
from tools.visualize.view import prepare, random_predictor

NAMES = ['class_0', 'class_1', 'class_2']
BOTH = pytest.mark.parametrize('exif', ['True', 'False'])


@pytest.fixture
def rotated_tree(image_tree):
    """Class folders of photographs that are all turned by their tag, in `val` and `train`."""
    for number, path in enumerate(sorted(image_tree.rglob('*.png'))):
        noise(90, 30 + number).save(path)
        set_orientation(path, 2 + number % 7)
    return image_tree


def load(path, *flags):
    parser = prediction_parser('', '', stored=stored_weights())
    return load_predictor(parser.parse_intermixed_args(['x', *path, *flags]), TASK)


@torch.inference_mode()
def evaluated(config, model):
    """Probabilities (N, classes) of the images of val, in order, as `main.py --eval` computes them."""
    preprocess = Preprocess(config, CPU)
    return torch.cat([model(preprocess(batch)[0]).softmax(dim=1) for batch in build_eval_loader(config)])


@BOTH
@pytest.mark.parametrize('pipeline', ['fast', 'published'])
@pytest.mark.parametrize('name', WRITERS)
def test_prediction_is_evaluation(tiny_config, rotated_tree, tmp_path, name, pipeline, exif):
    """Of rotated images, in every format of data."""
    folder = WRITERS[name](rotated_tree, tmp_path / name)
    options = {'DATA__PIPELINE': pipeline, 'DATA__EXIF': exif, 'DATA__DATASET': name, 'DATA__DATA_PATH': str(folder)}
    config = tiny_config(**options)
    model = fill_(build_model(config)).eval()
    images = evaluation_loader(config, find_images([rotated_tree / 'val']), 4)
    predictions = list(predict(Predictor(config, model, NAMES, CPU), images, topk=3))
    expected = evaluated(config, model)
    for prediction, probabilities in zip(predictions, expected, strict=True):
        assert prediction.probabilities == probabilities[prediction.indices].tolist()
    other = tiny_config(**options | {'DATA__EXIF': str(exif == 'False')})
    assert not torch.equal(evaluated(other, model), expected)


@BOTH
@pytest.mark.parametrize('pipeline', ['fast', 'published'])
def test_the_page_and_the_sheets_see_what_evaluation_sees(tiny_config, rotated_tree, pipeline, exif):
    config = tiny_config(DATA__PIPELINE=pipeline, DATA__EXIF=exif, DATA__DATA_PATH=str(rotated_tree))
    predictor = Predictor(config, fill_(build_model(config)).eval(), NAMES, CPU)
    path = find_images([rotated_tree / 'val'])[8]  # turned by a quarter
    expected = evaluated(config, predictor.model)[8]
    view = prepare(predictor, path.read_bytes(), path.name)
    torch.testing.assert_close(predictor.model(view.image).softmax(dim=1)[0], expected)
    reply = Explainer(predictor).explain(path, 'Grad-CAM', 1, 1)
    torch.testing.assert_close(torch.tensor([reply.probabilities[name] for name in NAMES]), expected.detach())
    sides = prepare(predictor, path.read_bytes(), path.name, size=30).image.shape[2:]
    assert (sides[0] > sides[1]) == (exif == 'True')


def test_the_documented_code_for_exported_files_sees_what_evaluation_sees(
    tiny_config, rotated_tree, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'photo.jpg').symlink_to(find_images([rotated_tree / 'val'])[1])
    code = code_blocks((ROOT / 'docs' / 'export.md').read_text(), 'py')[0]  # that of classifiers
    # Both files hold the same weights, so the second export, which is quick, need only say how its images are read.
    for format_, name, exif in (('onnx', 'msg.onnx', 'True'), ('safetensors', 'msg.safetensors', 'False')):
        config = tiny_config(DATA__PIPELINE='published', DATA__EXIF=exif, DATA__DATA_PATH=str(rotated_tree))
        checkpoint = write_checkpoint(tmp_path / 'w.pth', config, NAMES)
        command = ['export', '--resume', str(checkpoint), '--format', format_, '--output', name]
        monkeypatch.setattr(sys, 'argv', command)
        export()
        about = (tmp_path / f'{name}.json').read_text()
        assert json.loads(about)['preprocessing']['exif_transpose'] == (exif == 'True')
        (tmp_path / 'msg.onnx.json').write_text(about)
        names = {}
        capsys.readouterr()
        exec(code, names)
        logits = torch.from_numpy(names['logits'])
        expected = evaluated(config, load(['--resume', str(checkpoint)]).model)[1]
        torch.testing.assert_close(logits.softmax(dim=1)[0], expected, atol=1e-4, rtol=0)
        assert capsys.readouterr().out.strip() == NAMES[expected.argmax()]


@BOTH
def test_tools_obey_the_config_in_the_checkpoint(tiny_config, tmp_path, exif):
    checkpoint = write_checkpoint(tmp_path / 'w.pth', tiny_config(DATA__EXIF=exif), NAMES)
    assert (exif == 'True') == load(['--resume', str(checkpoint)]).config.DATA.EXIF
    opposite = str(exif == 'False')
    assert (exif == 'True') != load(['--resume', str(checkpoint)], '--opts', 'DATA.EXIF', opposite).config.DATA.EXIF


def test_a_config_without_the_key_was_trained_on_images_as_stored(tiny_config, tmp_path):
    path = write_checkpoint(tmp_path / 'w.pth', tiny_config(), NAMES)
    checkpoint = load_checkpoint(path)
    del checkpoint['config']['DATA']['EXIF']
    torch.save(checkpoint, path)
    assert not load(['--resume', str(path)]).config.DATA.EXIF


def test_weights_without_a_config_see_images_as_evaluation_does(tiny_config, tmp_path):
    torch.save({'model': build_model(tiny_config()).state_dict()}, tmp_path / 'w.pth')
    without_config = ['--resume', str(tmp_path / 'w.pth'), '--cfg', str(TINY)]
    assert not load(without_config).config.DATA.EXIF
    assert load(without_config, '--opts', 'DATA.EXIF', 'True').config.DATA.EXIF


def test_the_weights_of_the_project_see_upright_images():
    assert load(['--weights', 'msg_transformer_nano']).config.DATA.EXIF
    assert random_predictor(str(TINY), []).config.DATA.EXIF
