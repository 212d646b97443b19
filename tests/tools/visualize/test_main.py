import sys

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.datasets import encoded
from tests.helpers.images import damage, noise
from tests.helpers.paths import TINY
from tests.helpers.processes import error_line, run_here
from tools.visualize.__main__ import main, plan_outputs
from tools.visualize.explain import msg_attention, trace_blocks
from tools.visualize.overlays import CHOSEN, attention_overlays, influence_overlay, render_overlay
from tools.visualize.sheets import KINDS, Choice, overlay_rows
from tools.visualize.view import VisualizeError, find_class, prepare

NAMES = ['class_0', 'class_1', 'class_2']
RANDOM = ['--cfg', TINY, '--random-weights']


@pytest.fixture
def checkpoint(tiny_config, tmp_path):
    """A function of options that writes a checkpoint of the tiny network, with its config."""

    return lambda **options: write_checkpoint(tmp_path / 'w.pth', tiny_config(**options), NAMES)


def visualize(monkeypatch, *flags):
    """The exit code of the program, run here."""
    monkeypatch.setattr(sys, 'argv', ['visualize', *map(str, flags)])
    try:
        main()
    except SystemExit as exit_:
        return exit_.code
    return 0


def colours(path):
    """The number of different colours of a sheet, and its height and width."""
    sheet = cv2.imread(str(path))
    return len(np.unique(sheet.reshape(-1, 3), axis=0)), sheet.shape[:2]


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / 'photo 1 é.png'
    noise(60, 40).save(path)
    return path


@pytest.mark.parametrize(
    'options',
    [
        {'MODEL__MSG__EMBED_TYPE': 'overlap', 'MODEL__MSG__MERGE_TYPE': 'overlap', 'MODEL__MSG__APE': 'True'},
        {'MODEL__MSG__MANIP_TYPE': 'none', 'MODEL__MSG__IN_CHANS': '1'},
        {'MODEL__NUM_CLASSES': '1', 'DATA__IMG_SIZE': '14'},  # every stage is one window
    ],
)
def test_any_network_and_size(checkpoint, photo, tmp_path, monkeypatch, options):
    out = tmp_path / 'out'
    assert visualize(monkeypatch, photo, '--resume', checkpoint(**options), '--output', out, '--size', '45') == 0
    names = [f'photo 1 é_{kind}.png' for kind in KINDS]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    for name in names:
        count, (height, width) = colours(out / name)
        assert count > 200
        assert width > height >= 300


def test_a_network_without_classes(checkpoint, photo, tmp_path, monkeypatch, capsys):
    flags = [photo, '--resume', checkpoint(MODEL__NUM_CLASSES='0'), '--output', tmp_path / 'out']
    assert visualize(monkeypatch, *flags) == 0
    assert 'no Grad-CAM: the network has no classes' in capsys.readouterr().err
    assert len(list((tmp_path / 'out').iterdir())) == 3
    message = visualize(monkeypatch, *flags, '--kind', 'gradcam')
    assert message == 'error: Grad-CAM needs classes, and the network has none: write another --kind'


def test_a_sheet_of_one_kind(checkpoint, photo, tmp_path, capsys, monkeypatch):
    for name in ('a.png', 'a.jpg', 'a.pdf', 'a.svg', 'sub/a.webp'):
        flags = ['--kind', 'influence', '--stage', '1', '--window', '2', '1', '--output', tmp_path / name]
        assert visualize(monkeypatch, photo, '--resume', checkpoint(), *flags) == 0
        assert capsys.readouterr().out == f'{tmp_path / name}\n'
        assert (tmp_path / name).stat().st_size > 5000
    assert 'row 2, column 1' in (tmp_path / 'a.svg').read_text()
    assert 'tiny, ' in (tmp_path / 'a.svg').read_text()
    assert not list(tmp_path.rglob('*.tmp'))


def test_a_damaged_image_is_reported_and_the_others_are_drawn(photo, tmp_path, monkeypatch, capsys):
    damage(tmp_path / 'bad.jpg', 'truncated')
    Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64) * 16).save(tmp_path / 'grey16.png')
    Image.new('RGBA', (1, 1), (255, 0, 0, 128)).save(tmp_path / 'dot.png')
    Image.new('RGB', (300, 2)).save(tmp_path / 'strip.png')
    flags = [tmp_path, '--output', tmp_path / 'out', *RANDOM, '--kind', 'attention']
    assert visualize(monkeypatch, *flags) == 3
    err = capsys.readouterr().err
    assert f'error: image {tmp_path}/bad.jpg cannot be read' in err
    assert 'error: an image of 300 x 2 pixels is too narrow' in err
    assert 'error: 2 of 5 images cannot be read: see above' in err
    assert len(list((tmp_path / 'out').iterdir())) == 3


def test_images_and_the_checkpoint_are_not_overwritten(checkpoint, photo, monkeypatch):
    flags = [photo, '--resume', checkpoint(), '--kind', 'gradcam', '--output']
    assert 'is one of the images and would be overwritten' in visualize(monkeypatch, *flags, photo)
    copied = checkpoint().with_suffix('.png')
    copied.write_bytes(checkpoint().read_bytes())
    flags[2] = copied
    assert 'is the checkpoint and would be overwritten' in visualize(monkeypatch, *flags, copied)


def test_images_of_the_same_name_get_sheets_of_their_own(tmp_path):
    images = [tmp_path / 'a' / '0.png', tmp_path / 'b' / '0.jpg', tmp_path / '1.png']
    outputs = plan_outputs(images, ['attention', 'gradcam'], tmp_path)
    names = [path.name for sheets in outputs.values() for path in sheets.values()]
    assert names == [f'{stem}_{kind}.png' for stem in ('0', '0_2', '1') for kind in ('attention', 'gradcam')]


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--output', 'a.png'], '--output a.png is one file for 4 sheets: give a folder, or one image and one --kind'),
        (['--output', 'a.bmpp'], '--output a.bmpp: no pictures of type .bmpp: write .png'),
        (['--output', 'Makefile'], '--output Makefile is a file without a suffix: give a folder'),
        (['--output', 'Makefile/a.png', '--kind', 'gradcam'], 'Makefile/a.png: '),
        (['--output', 'x', '--stage', '3'], 'the network has no stage 3: write one from 1 to 2'),
        (['--output', 'x', '--block', '2'], 'no block 2 in the chosen stages: write one from 1 to 1'),
        (['--output', 'x', '--window', '3', '1'], 'no window at row 3, column 1: this image has 2 rows and 2 columns'),
        (['--output', 'x', '--class', 'cat'], 'no class cat: write one of 0, 1, 2, or a number from 0 to 2'),
        (['--output', 'x', '--class', '3'], 'no class 3: '),
        (['--output', 'x', '--size', '1'], '--size 1 is smaller than a patch of 2 pixels'),
        (
            ['--output', 'x', '--opts', 'MODEL.MSG.MSG_TOKENS', 'False'],
            'this tool draws what MSG tokens do, and MODEL.MSG.MSG_TOKENS is False',
        ),
        (['--output', 'x', '--size', '2000'], 'more than 1,048,576: write a smaller one'),
    ],
)
def test_mistakes_are_told_in_one_line(photo, flags, message):
    line = error_line('-m', 'tools.visualize', photo, *RANDOM, *flags)
    assert line.startswith('error: ')
    assert message in line


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ([], 'error: give --resume, --weights or --random-weights'),
        (['--resume', 'x', '--random-weights'], 'error: give --resume, --weights or --random-weights'),
        (['--random-weights'], 'error: --random-weights needs the --cfg of a network'),
        (['--weights', 'none'], 'argument --weights: no weights none: write one of msg_transformer_nano'),
        (
            ['--weights', 'msg_transformer_nano', '--resume', 'x'],
            '--resume: not allowed with argument --weights',
        ),
        (['--resume', 'nowhere'], 'error: checkpoint nowhere does not exist'),
        (['--resume', 'x', '--kind', 'heat'], "argument --kind: invalid choice: 'heat'"),
        (['--resume', 'x', '--stage', '0'], 'argument --stage: 0 is not a positive integer'),
        (['--resume', 'x', '--window', '1'], 'argument --window: expected 2 arguments'),
    ],
)
def test_wrong_flags(photo, flags, message):
    done = run_here('-m', 'tools.visualize', photo, '--output', 'x', *flags)
    assert done.returncode != 0
    assert message in done.stderr.splitlines()[-1]
    assert 'Traceback' not in done.stderr


def test_missing_images(tmp_path):
    line = error_line('-m', 'tools.visualize', tmp_path / 'none', *RANDOM, '--output', tmp_path)
    assert line == f'error: {tmp_path}/none does not exist: give image files or folders'


def test_a_view_is_what_evaluation_feeds(predictor):
    image = noise(60, 40)
    view = prepare(predictor, encoded(image), 'noise.png')
    assert view.picture.shape == (28, 28, 3)
    whole = prepare(predictor, encoded(image), 'noise.png', size=40)  # as large as it is: no pixel changes
    assert np.array_equal(whole.picture, np.asarray(image))
    assert whole.image.shape == (1, 3, 40, 60)


def test_classes_are_found_by_name_before_number():
    assert find_class(['2', '1', '0'], '2') == 0
    assert find_class(NAMES, '2') == 2
    with pytest.raises(VisualizeError, match='no classes'):
        find_class([], '0')


def test_rows_and_columns_of_sheets(predictor):
    stages = trace_blocks(predictor.model, prepare(predictor, encoded(noise()), 'noise.png').image)
    choices = {'attention': Choice(), 'influence': Choice([0]), 'gradcam': Choice(blocks=[0], class_index=1)}
    choices['rollout'] = Choice([1])
    titles = {}
    for kind, choice in choices.items():
        rows = overlay_rows(predictor.model, stages, kind, choice)
        titles[kind] = [[overlay.title.partition(':')[0] for overlay in row] for row in rows]
    assert titles == {
        'attention': [['stage 1, block 1', 'stage 2, block 1']],
        'influence': [['MSG token, stage 1, block 1'], ['patches, stage 1, block 1']],
        'gradcam': [['stage 1', 'stage 2']],
        'rollout': [['stage 2']],
    }
    [heads] = overlay_rows(predictor.model, stages, 'attention', Choice([1], [0]))
    assert [overlay.title for overlay in heads] == ['stage 2, block 1', 'head 1', 'head 2']
    np.testing.assert_allclose((heads[1].values + heads[2].values) / 2, heads[0].values, rtol=1e-5)


def test_attention_lies_where_its_patches_are(predictor):
    stages = trace_blocks(predictor.model, prepare(predictor, encoded(noise()), 'noise.png').image)
    maps = msg_attention(stages)[0][0].mean(dim=2)  # (nH, nW, w, w), heads averaged
    overlay = attention_overlays(predictor.model, stages, 0, 0)[0]
    for row, column, i, j in ((0, 1, 2, 5), (1, 0, 6, 0)):
        value = overlay.values[row * 7 + i, column * 7 + j]
        assert value == pytest.approx(50 * maps[row, column, i, j].item(), rel=1e-5)


def test_an_overlay_lies_where_its_window_is(predictor):
    """Grey where nothing has influence, coloured and outlined where the chosen window is."""
    view = prepare(predictor, encoded(noise()), 'noise.png')
    stages = trace_blocks(predictor.model, view.image)
    overlay = influence_overlay(predictor.model, stages, 0, 0, (1, 0), 'patches')
    assert overlay.values.tolist() == [[0, 0], [1, 0]]
    drawn = render_overlay(view.picture, overlay, width=280).astype(int)
    assert drawn.shape == (280, 280, 3)
    saturation = drawn.max(axis=-1) - drawn.min(axis=-1)
    quarters = [saturation[y + 20 : y + 120, x + 20 : x + 120].mean() for y in (0, 140) for x in (0, 140)]
    assert [quarter > 30 for quarter in quarters] == [False, False, True, False]
    outline = np.abs(drawn - [int(CHOSEN[i : i + 2], 16) for i in (1, 3, 5)]).max(axis=-1) < 30
    rows, columns = np.nonzero(outline)
    assert rows.min() >= 135
    assert columns.max() <= 145
    assert len(rows) > 300
