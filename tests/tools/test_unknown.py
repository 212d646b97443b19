"""Images of none of the classes: scores, the choice of a threshold, and what the tools say."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch

from config import TREE
from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.config_tree import ConfigError
from engine.predictor import Predictor
from models import build_model
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.golden import fill_
from tests.helpers.images import noise
from tests.helpers.paths import ROOT
from tests.helpers.runs import CPU
from tools import predict, unknown_threshold
from tools.app.explainer import Explainer
from tools.unknown import SCORES, UNKNOWN, flag_unknown
from tools.visualize import gallery

NAMES = ['class_0', 'class_1', 'class_2']


@pytest.fixture
def call(tiny_config, tmp_path, monkeypatch, capsys):
    """A function that runs a program with a checkpoint, and returns its exit code, stdout and stderr."""
    write_checkpoint(tmp_path / 'w.pth', tiny_config(), NAMES)

    def run(main, *arguments, resume='w.pth'):
        monkeypatch.setattr('sys.argv', ['tool', *map(str, arguments), '--resume', str(tmp_path / resume)])
        code = 0
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code
        return code, *capsys.readouterr()

    return run


def test_scores_are_those_of_the_literature_and_grow_with_uncertainty():
    logits = torch.tensor([[9.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    scores = {name: score(logits) for name, score in SCORES.items()}
    assert scores['max_softmax'][1] == pytest.approx(2 / 3)
    assert scores['entropy'][1] == pytest.approx(np.log(3))
    assert scores['energy'].tolist() == pytest.approx([-np.log(np.exp(9) + 2), -np.log(3)], rel=1e-5)
    assert all(sure < unsure for sure, unsure in scores.values())
    assert SCORES['entropy'](torch.tensor([[1e4, 0.0, 0.0]])) == 0


def test_every_score_is_a_choice_of_the_config_and_off_by_default(tiny_config):
    assert TREE.keys['TEST.UNKNOWN_SCORE'].choices == ('', *SCORES)
    logits = torch.tensor([[9.0, 0.0], [0.1, 0.0]])
    assert flag_unknown(logits, tiny_config()) is None
    for name in SCORES:
        threshold = float(SCORES[name](logits).mean())
        config = tiny_config(TEST__UNKNOWN_SCORE=name, TEST__UNKNOWN_THRESHOLD=threshold)
        assert flag_unknown(logits, config) == [False, True]


def test_several_classes_per_image_need_no_score(tiny_config):
    with pytest.raises(ConfigError, match="write TEST.UNKNOWN_SCORE ''"):
        tiny_config(DATA__MULTI_LABEL=True, TRAIN__LOSS='bce', AUG__MIXUP=0, TEST__UNKNOWN_SCORE='energy')


def test_the_first_halves_choose_and_the_second_ones_are_reported(capsys):
    rng = np.random.default_rng(0)
    good = rng.normal(0, 1, 400), rng.normal(4, 1, 200)
    bad = rng.normal(0, 1, 400), rng.normal(0, 1, 200)
    known = {name: (good if name == 'energy' else bad)[0] for name in SCORES}
    unknown = {name: (good if name == 'energy' else bad)[1] for name in SCORES}
    score, threshold = unknown_threshold.choose_threshold(known, unknown, keep=95)
    first, second = unknown_threshold.split_halves(good[0])
    others = unknown_threshold.split_halves(good[1])[1]
    assert score == 'energy'
    assert threshold == pytest.approx(np.quantile(first, 0.95), rel=1e-3)
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if '**energy**' in line)
    assert f'{(second > threshold).mean():.1%} | {(others > threshold).mean():.1%}' in row
    assert '200 known and 100 unknown images to choose, 200 and 100 to report' in printed
    assert f'TEST.UNKNOWN_SCORE energy TEST.UNKNOWN_THRESHOLD {threshold:g}' in printed
    assert sorted([*first, *second]) == sorted(good[0])
    assert unknown_threshold.choose_threshold(known, unknown, 95, 'entropy')[0] == 'entropy'


def test_the_threshold_is_stored_with_the_weights_and_flags_images(call, image_tree, tmp_path, capsys):
    others = tmp_path / 'others'
    (others / 'class_1').mkdir(parents=True)
    for number in range(5):
        noise(40 + number, 30).save(others / f'{number}.png')
    noise(40, 30).save(others / 'class_0_9.png')
    noise(40, 30).save(others / 'class_1' / '1.png')
    arguments = ('--known', image_tree / 'val', '--unknown', others, '--workers', 0, '--keep', 50)
    code, printed, err = call(unknown_threshold.main, *arguments, '--output', tmp_path / 't.safetensors')
    assert code == 0
    assert '2 of the unknown images left out: a known class' in err
    before, after = load_checkpoint(tmp_path / 'w.pth'), load_checkpoint(tmp_path / 't.safetensors')
    assert all(torch.equal(before['model'][name], after['model'][name]) for name in before['model'])
    assert after['classes'] == NAMES
    stored = after['config']['TEST']
    assert stored['UNKNOWN_SCORE'] in SCORES
    assert f'_SCORE {stored["UNKNOWN_SCORE"]} TEST.UNKNOWN_THRESHOLD {stored["UNKNOWN_THRESHOLD"]:g}\n' in printed

    flags = [image_tree / 'val', '--workers', 0, '--opts', 'DEVICE', 'cpu']
    code, out, err = call(predict.main, *flags, '--csv', tmp_path / 'a.csv', resume='t.safetensors')
    lines = out.splitlines()
    flagged = sum(line.endswith(f'\t{UNKNOWN}') for line in lines)
    assert 0 < flagged < len(lines) == 12
    assert f'{flagged} of 12 flagged: {UNKNOWN}' in err
    with (tmp_path / 'a.csv').open() as file:
        assert sum(int(row['unknown']) for row in csv.DictReader(file)) == flagged
    call(predict.main, *flags, '--json', tmp_path / 'a.json', resume='t.safetensors')
    assert sum(entry['unknown'] for entry in json.loads((tmp_path / 'a.json').read_text())) == flagged

    off = call(predict.main, *flags, 'TEST.UNKNOWN_SCORE', '', resume='t.safetensors')
    plain = call(predict.main, *flags)
    assert off[:2] == plain[:2]
    assert UNKNOWN not in off[1] + off[2]


def test_a_network_whose_outputs_are_not_finite_has_no_threshold(call, image_tree, tmp_path):
    checkpoint = load_checkpoint(tmp_path / 'w.pth')
    checkpoint['model']['head.weight'].fill_(float('inf'))
    save_checkpoint(tmp_path / 'inf.pth', checkpoint)
    paths = [tmp_path / f'{number}.png' for number in range(4)]
    for path in paths:
        noise(40, 30).save(path)
    images = ('--known', image_tree / 'val', '--unknown', *paths, '--workers', 0)
    code, _, err = call(unknown_threshold.main, *images, resume='inf.pth')
    assert 'not finite' in f'{code} {err}'


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--keep', '100'], 'is no percentage'),
        (['--output', 'a.pth'], 'ends with .safetensors'),
        (['--output', 'a.safetensors', '--opts', 'DATA.IMG_SIZE', '56'], 'leave out --cfg and --opts'),
        (['--unknown', 'few'], '3 unknown images are too few'),
    ],
)
def test_mistakes_are_told_in_a_line(call, image_tree, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'few').mkdir()
    for number in range(3):
        noise(40, 30).save(tmp_path / 'few' / f'{number}.png')
    images = ('--known', image_tree / 'val', '--unknown', image_tree / 'train', '--workers', 0)
    code, out, err = call(unknown_threshold.main, *images, *arguments)
    assert code
    assert message in f'{code} {out} {err}'


def test_gallery_draws_photographs_with_their_maps(call, tmp_path, monkeypatch):
    weights = ROOT / 'models' / 'weights' / 'msg_transformer_nano.safetensors'
    shutil.copy(weights, tmp_path / 'w.safetensors')
    drawn = []
    monkeypatch.setattr(gallery, 'draw_gallery', lambda pictures: drawn.extend(pictures) or gallery.Figure())
    photographs = ROOT / 'docs' / 'photographs'
    opts = ('--opts', 'DEVICE', 'cpu', 'TEST.UNKNOWN_THRESHOLD', '-100')
    code, _, _ = call(gallery.main, photographs, '--output', tmp_path / 'a.png', *opts, resume='w.safetensors')
    assert code == 0
    assert len(drawn) == len(list(photographs.glob('*/*.jpg'))) >= 9
    labels = {image.label for image, _ in drawn}
    assert labels == {'church', 'garbage truck', 'parachute', None}
    for image, overlay in drawn:
        assert image.title(image.predicted, image.label).startswith('no known class?\n')
        assert image.image.shape == (112, 112, 3)
        assert overlay.values.shape == (14, 14)


def test_gallery_figure():
    overlay = gallery.Overlay('rollout', np.ones((7, 7)), 4, 'stage 1', 14)
    picture = np.zeros((28, 28, 3), np.uint8)
    images = [gallery.SheetImage(picture, 'a', 0.5, label, False) for label in ('a', 'b', None)]
    figure = gallery.draw_gallery([(image, overlay) for image in images], columns=2)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ['a (50%)', 'a (50%)\nis b', 'a (50%)']
    colours = [axes.title.get_color() for axes in figure.axes if axes.get_title()]
    assert colours == ['darkgreen', 'firebrick', 'black']


def test_photographs_are_few_and_small_and_each_has_a_licence():
    folder = ROOT / 'docs' / 'photographs'
    table, photographs = (folder / 'README.md').read_text(), list(folder.glob('*/*.jpg'))
    assert sum(path.stat().st_size for path in photographs) < 1e6
    for path in photographs:
        assert f'| `{path.relative_to(folder)}` |' in table


def test_the_page_says_when_a_picture_shows_no_known_class(tiny_config, tmp_path):
    noise(60, 40).save(tmp_path / 'photo.png')
    notes = []
    for threshold in (-1, 2):
        config = tiny_config(TEST__UNKNOWN_SCORE='entropy', TEST__UNKNOWN_THRESHOLD=threshold)
        explainer = Explainer(Predictor(config, fill_(build_model(config)).eval(), NAMES, CPU))
        notes.append(explainer.explain(tmp_path / 'photo.png', 'Grad-CAM', 1, 1).note)
    assert notes[0] == f'**{UNKNOWN.capitalize()}.** {notes[1]}'
