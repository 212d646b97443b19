"""The weights that are part of the package: those of the card, with the same outputs however they are loaded."""

import hashlib
import json

import pytest
import timm
import torch
from safetensors import safe_open

from models import registry
from tests.helpers.golden import images
from tests.helpers.paths import ROOT
from tests.helpers.photographs import write_photographs
from tests.helpers.processes import run_here

NAME = 'msg_transformer_nano'
FILE = ROOT / 'models' / 'weights' / f'{NAME}.safetensors'

# Logits of images(2, 112), in fp32
LOGITS = json.loads((ROOT / 'tests' / 'fixtures' / f'{NAME}.json').read_text())['logits']


@pytest.fixture(scope='module')
def model():
    return timm.create_model(NAME, pretrained=True).eval()


def test_the_file_is_the_cards():
    card = (FILE.parent / 'README.md').read_text()
    assert hashlib.sha256(FILE.read_bytes()).hexdigest() in card
    assert FILE.stat().st_size < 8e6
    assert registry.stored_weights() == {NAME: FILE}


def test_by_name_it_computes_the_recorded_logits(model):
    with torch.no_grad():
        torch.testing.assert_close(model(images(2, 112)), torch.tensor(LOGITS), rtol=1e-4, atol=1e-4)


def test_what_timm_knows_of_it_is_what_it_was_trained_with(model):
    with safe_open(FILE, 'pt') as file:
        config, classes = (json.loads(file.metadata()[key]) for key in ('config', 'classes'))
    cfg = model.default_cfg
    assert (cfg['num_classes'], cfg['label_names']) == (len(classes), tuple(classes))
    assert cfg['label_descriptions'] == registry.IMAGENETTE
    assert cfg['input_size'] == (3, config['DATA']['IMG_SIZE'], config['DATA']['IMG_SIZE'])
    assert cfg['interpolation'] == config['DATA']['INTERPOLATION']


def test_another_head_and_size_keep_the_rest(model):
    other = timm.create_model(NAME, pretrained=True, num_classes=3, img_size=160).eval()
    assert other(images(1, 160)).shape == (1, 3)
    ours, theirs = model.state_dict(), other.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours if not key.startswith('head.'))
    features = timm.create_model(NAME, pretrained=True, features_only=True).eval()
    assert [tuple(x.shape[1:]) for x in features(images(1, 112))] == [(48, 28, 28), (96, 14, 14), (192, 7, 7)]


def test_predict_finds_it_by_name(tmp_path):
    write_photographs(tmp_path, 1)
    done = run_here('-m', 'tools.predict', '--weights', NAME, '--json', '-', '--topk', '10', tmp_path)
    assert done.returncode == 0, done.stderr
    for record in json.loads(done.stdout):
        assert {entry['class'] for entry in record['predictions']} == set(registry.IMAGENETTE)
        assert sum(entry['probability'] for entry in record['predictions']) == pytest.approx(1, abs=1e-3)
