"""Folders that timm and transformers load a network from."""

import io
import json

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

import models
from data.build import EvalTransform
from models import build_model, save_for_hf
from tests.helpers.golden import fill_
from tests.helpers.processes import run_here


@torch.no_grad()
def test_names_of_pretrained_classes_are_kept_unless_others_are_given(tmp_path):
    model = timm.create_model('msg_transformer_nano', pretrained=True).eval()
    save_for_hf(model, tmp_path)
    names = json.loads((tmp_path / 'config.json').read_text())['label_names']
    assert names == list(models.registry.IMAGENETTE.values())
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    batch = torch.randn(1, 3, 112, 112)
    assert torch.equal(loaded(batch), model(batch))
    model.reset_classifier(2)
    save_for_hf(model, tmp_path, ['cat', 'dog'])
    assert json.loads((tmp_path / 'config.json').read_text())['label_names'] == ['cat', 'dog']
    with pytest.raises(ValueError, match='label_names has 1 names for 2 classes: give a name for each'):
        save_for_hf(model, tmp_path, ['cat'])


@pytest.mark.slow
@pytest.mark.parametrize('network', ['msg', 'timm:resnet10t'])
@torch.no_grad()
def test_transformers_predicts_what_the_checkpoint_does(tiny_config, tmp_path, network):
    transformers = pytest.importorskip('transformers')
    # What shapes the network must be in the folder.
    options = {'MODEL__MSG__MANIP_TYPE': '[mix, none]', 'MODEL__MSG__MLP_RATIO': '2'} if network == 'msg' else {}
    config = tiny_config(MODEL__TYPE=network, DATA__PIPELINE='published', **options)
    model = build_model(config).eval()
    if network == 'msg':
        fill_(model)
    names = ['cat', 'dog', 'elk']
    checkpoint = {'model': model.state_dict(), 'config': yaml.safe_load(config.dump()), 'classes': names}
    torch.save(checkpoint, tmp_path / 'ckpt.pth')
    done = run_here('-m', 'tools.convert_checkpoint', tmp_path / 'ckpt.pth', f'{tmp_path}/folder/')
    assert 'network, preprocessing and 3 class names' in done.stdout, done.stderr
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    image.save(file := io.BytesIO(), 'PNG')
    expected = model(EvalTransform(config)(file.getvalue(), 'image')[None])
    classifier = transformers.pipeline('image-classification', model=str(tmp_path / 'folder'))
    results = {result['label']: result['score'] for result in classifier(image)}
    probabilities = dict(zip(names, expected.softmax(1)[0].tolist(), strict=True))
    assert results == pytest.approx(probabilities, abs=1e-5)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / 'folder').eval()
    pixels = torch.randn(2, 3, 28, 28)
    torch.testing.assert_close(loaded(pixel_values=pixels).logits, model(pixels))
    assert loaded.config.id2label == {0: 'cat', 1: 'dog', 2: 'elk'}
    new_head = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / 'folder', num_labels=5, ignore_mismatched_sizes=True
    )
    assert new_head(pixel_values=pixels).logits.shape == (2, 5)
