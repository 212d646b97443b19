import cv2
import pytest
import torch
import yaml

from config import TREE
from data.images import ReadableImages, choose_images, find_images
from engine.checkpoint import CheckpointError
from engine.inference import Predictor, load_predictor, prediction_parser
from models import build_model
from tests.helpers.golden import fill_
from tests.helpers.images import damage
from tests.helpers.paths import TINY
from tests.helpers.processes import run_here
from tests.helpers.runs import CPU
from tools.predict import draw_sheet, main, predict


def test_predictions(tiny_config, image_tree, tmp_path):
    config = tiny_config()
    predictor = Predictor(config, fill_(build_model(config)).eval(), ['class_0', 'class_1', 'class_2'], CPU)
    images = find_images([image_tree / 'val', image_tree / 'train' / 'class_0' / '0.png'])
    assert len(images) == 13
    predictions = predict(predictor, ReadableImages(images), batch_size=5)
    assert [prediction.label for prediction in predictions] == ['class_0'] * 4 + ['class_1'] * 4 + ['class_2'] * 4 + [
        'class_0'
    ]
    assert all(1 / 3 <= prediction.probability <= 1 for prediction in predictions)
    (single,) = predict(predictor._replace(class_names=['a', 'b', 'c']), ReadableImages(images[4:5]))
    assert single.label is None
    assert single.probability == pytest.approx(predictions[4].probability, rel=1e-5)
    draw_sheet(predictions, tmp_path / 'sheet.png')
    assert cv2.imread(str(tmp_path / 'sheet.png')).shape == (340, 1120, 3)


def test_chosen_images_are_random_but_fixed():
    images = list(range(100))
    chosen = choose_images(images, 10)
    assert chosen == choose_images(images, 10) == sorted(set(chosen))
    assert chosen != images[:10]
    assert choose_images(images, 100) == choose_images(images, None) == images


def test_predict_prints_and_draws(tiny_config, image_tree, tmp_path):
    names = ['class_0', 'class_1', 'class_2']
    torch.save({'model': build_model(tiny_config()).state_dict(), 'classes': names}, tmp_path / 'w.pth')
    done = run_here(
        '-m', 'tools.predict', image_tree / 'val', '--limit', '6', '--cfg', TINY,
        '--resume', tmp_path / 'w.pth', '--output', tmp_path / 'sheet.png',
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 8
    assert all(line.split('\t')[1] in names for line in lines[:6])
    assert lines[6].endswith('of 6 right')
    assert (tmp_path / 'sheet.png').exists()


def test_predict_takes_the_better_weights(tiny_config, image_tree, tmp_path, capsys):
    raw, ema = build_model(tiny_config()), build_model(tiny_config())
    path = str(tmp_path / 'w.pth')
    scores = {'raw': 16.5, 'ema': 18.0}
    torch.save({'model': raw.state_dict(), 'model_ema': ema.state_dict(), 'scores': scores}, path)
    for flags, expected in (([], ema), (['--ema'], ema), (['--raw'], raw)):
        args = prediction_parser('').parse_intermixed_args(['x', '--cfg', str(TINY), '--resume', path, *flags])
        model = load_predictor(args, TREE, build_model, first_label=0).model
        assert torch.equal(model.head.weight.cpu(), expected.head.weight)
        name, first, second = ('EMA', 18.0, 16.5) if expected is ema else ('raw', 16.5, 18.0)
        assert capsys.readouterr().err == f'{path}: {name} weights ({first} against {second} %)\n'
    with pytest.raises(SystemExit):
        prediction_parser('').parse_intermixed_args(['x', '--cfg', 'c', '--resume', path, '--raw', '--ema'])


def test_the_config_comes_from_the_checkpoint_and_cfg_overrides_it(tiny_config, tmp_path):
    trained = tiny_config(MODEL__NUM_CLASSES=5, MODEL__MSG__EMBED_DIM=32, OUTPUT='there')
    saved = yaml.safe_load(trained.dump()) | {'KEY_OF_ANOTHER_PROGRAM': 1}
    torch.save({'model': build_model(trained).state_dict(), 'config': saved}, tmp_path / 'w.pth')
    (tmp_path / 'other.yaml').write_text('MODEL: {MSG: {MANIP_TYPE: none}}')

    def load(*flags):
        argv = ['x', '--resume', str(tmp_path / 'w.pth'), *flags]
        return load_predictor(prediction_parser('').parse_intermixed_args(argv), TREE, build_model, first_label=0)

    config, model, names, _ = load()
    assert config.MODEL.MSG == trained.MODEL.MSG
    assert config.TEST == trained.TEST
    assert (config.DEVICE, config.OUTPUT) == ('auto', '')  # those of the command that trained
    assert names == ['0', '1', '2', '3', '4']
    assert model.layers[0].blocks[0].shuffle
    overridden = load('--cfg', str(tmp_path / 'other.yaml'), '--opts', 'DEVICE', 'cpu')
    assert not overridden.model.layers[0].blocks[0].shuffle
    assert overridden.config.MODEL.MSG.EMBED_DIM == 32
    assert overridden.config.DEVICE == 'cpu'
    torch.save({'model': model.state_dict()}, tmp_path / 'w.pth')
    with pytest.raises(CheckpointError, match='w.pth has no config: give the one of its network with --cfg'):
        load()


def test_a_damaged_image_is_reported_and_the_others_are_classified(
    tiny_config, image_tree, tmp_path, monkeypatch, capsys
):
    folder, sheet = image_tree / 'val' / 'class_0', tmp_path / 'sheet.png'
    damage(folder / '1.png', 'truncated')
    (folder / 'notes.txt').write_text('not an image')
    torch.save({'model': build_model(tiny_config()).state_dict()}, tmp_path / 'w.pth')
    flags = ['--cfg', TINY, '--resume', tmp_path / 'w.pth', '--output', sheet]
    monkeypatch.setattr('sys.argv', ['predict', str(folder), *map(str, flags)])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 'error: 1 of 4 images cannot be read: see above'
    captured = capsys.readouterr()
    assert [line.split('\t')[0] for line in captured.out.splitlines()[:3]] == [f'{folder}/{i}.png' for i in (0, 2, 3)]
    assert captured.err.splitlines()[1] == '1 file(s) of other kinds left out'
    assert captured.err.splitlines()[2].startswith(f'error: image {folder}/1.png cannot be read')
    assert sheet.exists()
