import json

import cv2
import pytest
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import main as program
from checkpoint import CheckpointError, load_checkpoint
from config import load_config
from models import build_model
from tests.conftest import ROOT
from tests.helpers.golden import fill_
from tests.test_command_line import start
from tests.test_training import folder_of
from tools import make_digits as digits_tool
from tools.complexity import complexity
from tools.convert_checkpoint import convert
from tools.plot import plot, read_epochs
from tools.predict import draw_sheet, find_images, predict


def test_digits_are_real_split_fixed_and_stratified(tmp_path):
    assert digits_tool.make_digits(tmp_path / 'one') == {'train': 1437, 'val': 360}
    digits_tool.make_digits(tmp_path / 'two')
    files = sorted(path.relative_to(tmp_path / 'one') for path in (tmp_path / 'one').rglob('*.png'))
    assert len(files) == 1797
    assert len({path.name for path in files}) == 1797  # none in both splits
    for path in files[::100]:
        assert (tmp_path / 'one' / path).read_bytes() == (tmp_path / 'two' / path).read_bytes()
        original = load_digits().images[int(path.stem)]
        assert load_digits().target[int(path.stem)] == int(path.parent.name)
        image = cv2.imread(str(tmp_path / 'one' / path), cv2.IMREAD_GRAYSCALE)
        assert image.shape == (56, 56)
        centres = image[3::7, 3::7].astype(float)  # of the 8 x 8 original pixels
        assert abs(centres - original * 255 / 16).mean() < 10
    for digit in range(10):
        val = len([path for path in files if path.parts[:2] == ('val', str(digit))])
        total = (load_digits().target == digit).sum()
        assert val == pytest.approx(0.2 * total, abs=1)


def test_complexity_counts_the_real_operators():
    config = load_config('configs/msg_tiny_p4_win7_224.yaml')
    counted = complexity(build_model(config), 3, 224)
    assert (counted.parameters, counted.formula) == (28290166, 4588614144)
    # The formula's norms, which are no product: 2 of each token in a block, one at the embedding and in merging.
    tokens = [56 * 56 + 64, 28 * 28 + 16, 14 * 14 + 4, 49 + 1]
    norms = sum(2 * depth * t * 96 * 2**i for i, (depth, t) in enumerate(zip((2, 2, 6, 2), tokens, strict=True)))
    norms += 56 * 56 * 96 + sum(t * 96 * 2**i for i, t in enumerate(tokens[:3])) + 768 * 50
    assert counted.formula - counted.measured == norms


def write_metrics(folder, *epochs):
    folder.mkdir(parents=True)
    records = [{'kind': 'train', 'epoch': 0, 'loss': 9}]
    for epoch, acc1 in epochs:
        records.append({'kind': 'epoch', 'epoch': epoch, 'train_loss': 2, 'val_loss': 1, 'acc1': acc1, 'lr': 0.1})
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
    return folder


def test_curves(tmp_path):
    run = write_metrics(tmp_path / 'model' / 'run', (0, 10), (1, 20), (1, 30), (2, 40))
    assert [record['acc1'] for record in read_epochs(run / 'metrics.jsonl')] == [10, 30, 40]  # trained again: the last
    plot(run, tmp_path / 'curves.png')
    image = cv2.imread(str(tmp_path / 'curves.png'))
    assert image.shape == (420, 1440, 3)
    assert (image < 128).mean() > 0.005  # something is drawn
    with pytest.raises(ValueError, match='No such file.*--run'):
        plot(tmp_path / 'nowhere', tmp_path / 'c.png')
    with pytest.raises(ValueError, match='no finished epoch'):
        plot(write_metrics(tmp_path / 'none'), tmp_path / 'c.png')
    with (run / 'metrics.jsonl').open('a') as file:
        file.write('{"kind": "ep')  # half written
    assert len(read_epochs(run / 'metrics.jsonl')) == 3
    with (run / 'metrics.jsonl').open('a') as file:
        file.write('\n{}\n')
    with pytest.raises(ValueError, match='metrics.jsonl, line 6'):
        read_epochs(run / 'metrics.jsonl')


def test_curves_of_a_detector(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, 'savefig', lambda figure, *_, **__: figures.append(figure))
    figures_of_epochs = [{'train_loss': 3, 'lr': 0.1, 'box_AP': 20 + n, 'mask_AP': 10 + n} for n in range(2)]
    records = [{'kind': 'epoch', 'epoch': n} | figures for n, figures in enumerate(figures_of_epochs)]
    (tmp_path / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, records)))
    plot(tmp_path, tmp_path / 'curves.png')
    loss, accuracy, _ = figures[0].axes
    assert [line.get_label() for line in loss.lines] == ['training (augmented)']
    assert [line.get_ydata().tolist() for line in accuracy.lines] == [[20, 21], [10, 11]]
    assert accuracy.get_title() == 'Box AP 21.0 %, Mask AP 11.0 % at the end'


def test_predictions(tiny_config, image_tree, tmp_path):
    config = tiny_config()
    model = fill_(build_model(config))
    images = find_images([image_tree / 'val', image_tree / 'train' / 'class_0' / '0.png'])
    assert len(images) == 13
    cpu = torch.device('cpu')
    guesses = predict(config, model, ['class_0', 'class_1', 'class_2'], images, cpu, batch_size=5)
    assert [guess.truth for guess in guesses] == ['class_0'] * 4 + ['class_1'] * 4 + ['class_2'] * 4 + ['class_0']
    assert all(1 / 3 <= guess.probability <= 1 for guess in guesses)
    alone = predict(config, model, ['a', 'b', 'c'], images[4:5], cpu)
    assert alone[0].truth is None
    assert alone[0].probability == pytest.approx(guesses[4].probability, rel=1e-5)
    draw_sheet(guesses, tmp_path / 'sheet.png')
    assert cv2.imread(str(tmp_path / 'sheet.png')).shape == (340, 1120, 3)


@pytest.mark.parametrize(
    ('tool', 'flags', 'message'),
    [
        ('plot', ['--run', 'nowhere'], 'error: nowhere/metrics.jsonl: No such file'),
        ('predict', ['nowhere', '--cfg', 'nowhere', '--resume', 'x'], 'error: config file nowhere: No such file'),
        ('make_digits', [], 'error: the following arguments are required: --output'),
        ('complexity', ['nowhere'], 'error: config file nowhere: No such file'),
        ('make_digits', ['--output', 'README.md'], 'error: '),
    ],
)
def test_tools_run_as_modules_and_tell_mistakes_in_one_line(tool, flags, message):
    done = start('-m', f'tools.{tool}', *flags)
    assert done.returncode not in (0, None)
    assert message in done.stderr.splitlines()[-1]
    assert 'Traceback' not in done.stderr


def test_predict_as_a_user_starts_it(tiny_config, image_tree, tmp_path):
    names = ['class_0', 'class_1', 'class_2']
    torch.save({'model': build_model(tiny_config()).state_dict(), 'classes': names}, tmp_path / 'w.pth')
    done = start(
        '-m', 'tools.predict', image_tree / 'val', '--limit', '6', '--cfg', ROOT / 'tests/fixtures/tiny.yaml',
        '--resume', tmp_path / 'w.pth', '--output', tmp_path / 'sheet.png',
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 8
    assert all(line.split('\t')[1] in names for line in lines[:6])
    assert lines[6].endswith('of 6 right')
    assert (tmp_path / 'sheet.png').exists()


def test_figures_of_the_readme_are_those_the_script_draws(tmp_path):
    done = start('-m', 'tools.draw_figures', '--output', tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ('windows.svg', 'block.svg'):
        assert (tmp_path / name).read_text() == (ROOT / 'docs' / name).read_text(), f'{name}: run `make figures`'
        assert f'docs/{name}' in (ROOT / 'README.md').read_text()


def test_weights_go_out_as_safetensors_and_come_back(tmp_path, tiny_config, image_tree, capsys):
    config = tiny_config(DATA__DATA_PATH=str(image_tree), TRAIN__EMA_DECAY='0.9')
    program.main(config)
    source = folder_of(config) / 'ckpt_epoch_1.pth'
    checkpoint = load_checkpoint(source)
    for average in (False, True):
        out, back = tmp_path / 'weights.safetensors', tmp_path / 'back.pth'
        flags = ['--ema'] if average else []
        done = start('-m', 'tools.convert_checkpoint', source, out, *flags)
        assert done.stdout == f'{out}: {len(checkpoint["model"])} tensors\n', done.stderr
        assert start('-m', 'tools.convert_checkpoint', out, back).returncode == 0
        for path in (out, back):
            loaded = load_checkpoint(path)
            assert loaded.keys() == {'model', 'config', 'classes'}
            assert loaded['classes'] == checkpoint['classes']
            assert loaded['config'] == json.loads(json.dumps(checkpoint['config']))
            expected = checkpoint['model_ema' if average else 'model']
            assert loaded['model'].keys() == expected.keys()
            assert all(torch.equal(value, expected[name]) for name, value in loaded['model'].items())
    evaluation = tiny_config(DATA__DATA_PATH=str(image_tree), EVAL_MODE='True', MODEL__RESUME=str(out))
    program.main(evaluation)  # a .safetensors file serves as a checkpoint
    assert f'weights of {out} loaded' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('source', 'target', 'average', 'told'),
    [
        ('a.pth', 'b.onnx', False, 'b.onnx has another suffix: write .pth or .safetensors'),
        ('a.pth', 'b.pth', True, 'a.pth holds no average of the weights'),
        ('nowhere.pth', 'b.pth', False, 'nowhere.pth does not exist'),
        ('a.pth', 'nowhere/b.safetensors', False, 'nowhere/b.safetensors cannot be written: No such file or directory'),
    ],
)
def test_conversions_that_cannot_be(tmp_path, source, target, average, told):
    torch.save({'model': {'x': torch.zeros(1)}}, tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match=told):
        convert(tmp_path / source, tmp_path / target, average)
