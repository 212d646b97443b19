import csv
import io
import itertools
import json
import os
import subprocess
import sys

import cv2
import pytest
import torch
import yaml

from data import Preprocess, build_eval_loader
from data.file_loader import SOME_UNREADABLE, evaluation_loader
from data.images import choose_images, find_images
from engine.checkpoint import CheckpointError
from engine.predictor import Predictor, load_predictor, prediction_parser
from main import TASK
from models import build_model
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.golden import fill_
from tests.helpers.images import damage
from tests.helpers.paths import ROOT, TINY
from tests.helpers.processes import environment
from tests.helpers.runs import CPU
from tools.contact_sheet import MAX_IMAGES, ContactSheet
from tools.export.exported import BACKENDS
from tools.output_files import stream_text
from tools.predict import main, predict
from tools.prediction_formats import Prediction, csv_rows

NAMES = ['class_0', 'class_1', 'class_2']


@pytest.fixture
def call(tiny_config, tmp_path, monkeypatch, capsys):
    """A function that runs the program, and returns its exit code, the lines on stdout and those on stderr."""
    write_checkpoint(tmp_path / 'w.pth', tiny_config(), NAMES)

    def run(*arguments):
        flags = ['--resume', tmp_path / 'w.pth', '--opts', 'DEVICE', 'cpu', '--workers', '0']
        return run_program(monkeypatch, capsys, *flags, *arguments)

    return run


def run_program(monkeypatch, capsys, *arguments):
    """The exit code of the program, the lines on stdout and those on stderr."""
    monkeypatch.setattr('sys.argv', ['predict', *map(str, arguments)])
    code = 0
    try:
        main()
    except SystemExit as exit_:
        code = exit_.code
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err.splitlines()


def test_predictions(predictor, image_tree):
    paths = find_images([image_tree / 'val', image_tree / 'train' / 'class_0' / '0.png'])
    assert len(paths) == 13
    predictions = list(predict(predictor, evaluation_loader(predictor.config, paths, batch_size=5), topk=3))
    assert [prediction.path for prediction in predictions] == paths
    assert [prediction.label for prediction in predictions] == [0] * 4 + [1] * 4 + [2] * 4 + [0]
    for prediction in predictions:
        assert sorted(prediction.indices) == [0, 1, 2]
        assert sum(prediction.probabilities) == pytest.approx(1)
        assert prediction.probabilities == sorted(prediction.probabilities, reverse=True)
    others = predictor._replace(class_names=['a', 'b', 'c'])
    (single,) = predict(others, evaluation_loader(others.config, paths[4:5]))
    assert single.label is None
    assert single.probabilities == pytest.approx(predictions[4].probabilities[:1], rel=1e-5)
    with_workers = evaluation_loader(predictor.config, paths, batch_size=5, workers=2)
    assert list(predict(predictor, with_workers, topk=3)) == predictions


@pytest.mark.parametrize('pipeline', ['fast', 'published'])
@pytest.mark.parametrize('channels', [1, 3])
def test_upright_images_are_classified_as_in_evaluation(tiny_config, image_tree, pipeline, channels):
    config = tiny_config(DATA__PIPELINE=pipeline, MODEL__MSG__IN_CHANS=channels, DATA__DATA_PATH=str(image_tree))
    model = fill_(build_model(config)).eval()
    with torch.inference_mode():
        evaluated = [model(Preprocess(config, CPU)(batch)[0]).softmax(dim=1) for batch in build_eval_loader(config)]
    predictor = Predictor(config, model, NAMES, CPU)
    images = evaluation_loader(predictor.config, find_images([image_tree / 'val']), config.DATA.BATCH_SIZE)
    for prediction, expected in zip(predict(predictor, images, topk=3), torch.cat(evaluated), strict=True):
        assert prediction.probabilities == expected[prediction.indices].tolist()


def test_outputs_that_are_not_finite_are_an_error(predictor, image_tree):
    predictor.model.head.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match='outputs of the network are not finite'):
        list(predict(predictor, evaluation_loader(predictor.config, find_images([image_tree / 'val']))))


def test_predict_takes_the_better_weights(tiny_config, image_tree, tmp_path, capsys):
    raw, ema = build_model(tiny_config()), build_model(tiny_config())
    path = str(tmp_path / 'w.pth')
    scores = {'raw': 16.5, 'ema': 18.0}
    torch.save({'model': raw.state_dict(), 'model_ema': ema.state_dict(), 'scores': scores}, path)
    for flags, expected in (([], ema), (['--pretrained-weights', 'ema'], ema), (['--pretrained-weights', 'raw'], raw)):
        args = prediction_parser('', '').parse_intermixed_args(['x', '--cfg', str(TINY), '--resume', path, *flags])
        model = load_predictor(args, TASK).model
        assert torch.equal(model.head.weight.cpu(), expected.head.weight)
        name, first, second = ('EMA', 18.0, 16.5) if expected is ema else ('raw', 16.5, 18.0)
        assert capsys.readouterr().err == f'{path}: {name} weights ({first} against {second} %)\n'


def test_the_config_comes_from_the_checkpoint_and_cfg_overrides_it(tiny_config, tmp_path):
    trained = tiny_config(MODEL__NUM_CLASSES=5, MODEL__MSG__EMBED_DIM=32, OUTPUT='there')
    saved = yaml.safe_load(trained.dump()) | {'KEY_OF_ANOTHER_PROGRAM': 1}
    torch.save({'model': build_model(trained).state_dict(), 'config': saved}, tmp_path / 'w.pth')
    (tmp_path / 'other.yaml').write_text('TEST: {CROP: False}')
    (tmp_path / 'unshuffled.yaml').write_text('MODEL: {MSG: {MANIP_TYPE: none}}')

    def load(*flags):
        argv = ['x', '--resume', str(tmp_path / 'w.pth'), *flags]
        return load_predictor(prediction_parser('', '').parse_intermixed_args(argv), TASK)

    config, model, names, _ = load()
    assert config.MODEL.MSG == trained.MODEL.MSG
    assert config.TEST == trained.TEST
    assert (config.DEVICE, config.OUTPUT) == ('auto', '')  # those of the command that trained
    assert names == ['0', '1', '2', '3', '4']
    assert config.TEST.CROP
    overridden = load('--cfg', str(tmp_path / 'other.yaml'), '--opts', 'DEVICE', 'cpu', 'DATA.IMG_SIZE', '56')
    assert not overridden.config.TEST.CROP
    assert overridden.config.MODEL.MSG.EMBED_DIM == 32
    assert overridden.config.DEVICE == 'cpu'
    message = (
        r"w.pth in what the network computes \(MODEL.MSG.MANIP_TYPE has changed from 'shuf' to 'none'\): "
        'write --opts MODEL.MSG.MANIP_TYPE shuf'
    )
    for flags in (['--cfg', str(tmp_path / 'unshuffled.yaml')], ['--opts', 'MODEL.MSG.MANIP_TYPE', 'none']):
        with pytest.raises(CheckpointError, match=message):
            load(*flags)
    torch.save({'model': model.state_dict()}, tmp_path / 'w.pth')
    with pytest.raises(CheckpointError, match='w.pth has no config: give the one of its network with --cfg'):
        load()


def test_chosen_images_are_random_but_fixed():
    images = list(range(100))[::-1]
    chosen = choose_images(images, 10)
    assert chosen == choose_images(images, 10) == sorted(set(chosen), reverse=True)
    assert chosen != images[:10]
    assert choose_images(images, 100) == choose_images(images, None) == images


def test_lines_hold_path_and_most_likely_classes(call, image_tree):
    code, lines, errors = call(image_tree / 'val', '--limit', '6', '--topk', '2')
    assert code == 0
    assert errors[1].endswith('of 6 right')
    assert len(lines) == 6
    for line in lines:
        path, name, probability, second, less = line.split('\t')
        assert path.startswith(f'{image_tree}/val/class_')
        assert {name, second} < {*NAMES}
        assert float(probability) >= float(less)
    right = sum(line.split('\t')[1] == line.split('/')[-2] for line in lines)
    assert errors[1] == f'{right} of 6 right'


def test_csv_and_json_have_every_image_with_its_error(call, image_tree, tmp_path):
    folder = image_tree / 'val' / 'class_0'
    damage(folder / '1.png', 'truncated')
    (folder / '2.png').rename(folder / 'a,"b" é\t.png')
    csv_file, json_file = tmp_path / 'new' / 'p.csv', tmp_path / 'p.json'
    for table in (['--csv', csv_file], ['--json', json_file]):
        code, lines, errors = call(folder, '--topk', '5', *table)
        assert code == SOME_UNREADABLE
        assert len(lines) == 3
        assert errors[-1] == 'error: 1 of 4 images cannot be read: see above'
        assert errors[1].startswith(f'error: image {folder}/1.png cannot be read')
    with csv_file.open(newline='', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    records = json.loads(json_file.read_text())
    assert [*rows[0]] == ['path', 'error'] + [
        f'{column}{suffix}' for suffix in ('', '_2', '_3') for column in ('class', 'index', 'probability')
    ]
    assert (
        [row['path'] for row in rows] == [record['path'] for record in records] == list(map(str, find_images([folder])))
    )
    for row, record in zip(rows, records, strict=True):
        assert row['error'] == (record['error'] or '')
        assert len(record['predictions']) == (0 if record['error'] else 3)
        for suffix, top in zip(('', '_2', '_3'), record['predictions'], strict=False):
            assert (row[f'class{suffix}'], int(row[f'index{suffix}'])) == (top['class'], top['index'])
            assert float(row[f'probability{suffix}']) == top['probability']
            assert top['class'] == NAMES[top['index']]
    assert [bool(record['error']) for record in records] == [False, True, False, False]
    assert rows[1]['class'] == ''


@pytest.mark.parametrize('kind', ['csv', 'json'])
def test_a_table_on_standard_output_replaces_the_lines(call, image_tree, tmp_path, kind):
    code, lines, _ = call(image_tree / 'val', f'--{kind}', '-')
    assert code == 0
    call(image_tree / 'val', f'--{kind}', tmp_path / 'table')
    assert lines == (tmp_path / 'table').read_text().splitlines()
    assert not (tmp_path / '-').exists()


def test_words_are_added_to_wordnet_ids(call, image_tree, tmp_path):
    checkpoint = torch.load(tmp_path / 'w.pth')
    torch.save(checkpoint | {'classes': ['n01440764', 'n02099712', 'mine']}, tmp_path / 'w.pth')
    _, lines, _ = call(image_tree / 'val', '--topk', '3', '--words')
    assert {lines[0].split('\t')[i] for i in (1, 3, 5)} == {'n01440764 tench', 'n02099712 Labrador retriever', 'mine'}


def test_sheet_is_drawn(call, image_tree, tmp_path):
    sheet = tmp_path / 'new' / 'sheet.png'
    code, lines, errors = call(image_tree / 'val', image_tree / 'train' / 'class_0' / '0.png', '--output', sheet)
    assert (code, len(lines), errors[-1]) == (0, 13, str(sheet))
    drawn = cv2.imread(str(sheet))
    assert drawn.shape == (340, 1120, 3)
    assert (drawn < 128).mean() > 0.1
    damage(image_tree / 'val' / 'class_0' / '0.png', 'empty')
    code, _, errors = call(image_tree / 'val' / 'class_0' / '0.png', '--output', tmp_path / 'none.png')
    assert code == SOME_UNREADABLE
    assert not (tmp_path / 'none.png').exists()


def test_sheet_has_a_choice_of_many_images(image_tree):
    path = image_tree / 'val' / 'class_0' / '0.png'
    sheet = ContactSheet(
        3000, [r'$\frac$', 'a class with a name that is too long for any line on a contact sheet', 'c']
    )
    predictions = [Prediction(path, [i % 2], [0.5], None if i % 3 == 2 else i % 3, '') for i in range(3000)]
    assert list(sheet.collect(predictions)) == predictions
    assert len(sheet.predictions) == MAX_IMAGES
    assert sheet.predictions != predictions[:MAX_IMAGES]
    sheet.predictions = predictions[:5]
    figure = sheet.draw()
    assert figure.get_suptitle() == '96 of 3,000 images, a random choice'
    titles = [(axes.get_title().splitlines(), axes.title.get_color()) for axes in figure.axes[:5]]
    assert titles[0] == ([r'$\frac$ (50%)'], 'darkgreen')
    assert titles[2] == ([r'$\frac$ (50%)'], 'black')
    assert titles[3] == (['a class with a n…n', 'a contact sheet', '(50%)', r'is $\frac$'], 'firebrick')
    figure.draw_without_rendering()  # $ is no formula


@pytest.mark.parametrize(
    ('arguments', 'code', 'message'),
    [
        (['nowhere'], 1, 'error: nowhere does not exist: give image files or folders'),
        (['{val}', '--output', 'sheet.txt'], 1, 'error: sheet.txt has no suffix of a picture: write .png or .svg'),
        (['{val}', '--output', 'sheet'], 1, 'error: sheet has no suffix of a picture: write .png or .svg'),
        (['{val}', '--output', '{val}'], 1, 'has no suffix of a picture'),
        (['{val}', '--csv', '{val}'], 1, 'is a folder: give the name of a file'),
        (['{val}', '--json', '/dev/null'], 1, 'error: /dev/null is a device: give the name of a file'),
        (['{val}', '--json', '{val}/class_0/0.png/x'], 1, 'File exists: write to another folder'),
        (['{val}', '--output', '{val}/class_0/0.png'], 1, '0.png is one of the images and would be overwritten'),
        (['{val}', '--csv', '{val}/../../w.pth'], 1, 'w.pth is the checkpoint and would be overwritten'),
        (['{val}', '--csv', 'a.png', '--output', 'a.png'], 1, 'two outputs have the name a.png'),
        (['{val}/*.gif'], 1, 'matches no file: give image files or folders'),
        (['{val}', '--csv', 'a', '--json', 'b'], 2, 'not allowed with argument'),
        (['{val}', '--topk', '0'], 2, '0 is not a positive integer'),
        (['{val}', '--workers', '-1'], 2, '-1 is not a non-negative integer'),
        (['{val}', '--cfg', 'nowhere'], 1, 'error: config file nowhere: No such file'),
    ],
)
def test_mistakes_are_reported_before_the_work(call, image_tree, arguments, code, message):
    before = (image_tree / 'val' / 'class_0' / '0.png').read_bytes()
    actual, lines, errors = call(*(argument.replace('{val}', f'{image_tree}/val') for argument in arguments))
    text = actual if isinstance(actual, str) else errors[-1]
    assert message in text
    assert '\n' not in text
    assert (1 if isinstance(actual, str) else actual) == code
    assert not lines
    assert (image_tree / 'val' / 'class_0' / '0.png').read_bytes() == before


def test_names_need_not_be_unicode(call, image_tree, tmp_path, monkeypatch):
    odd = image_tree / os.fsdecode(b'\xff.png')
    (image_tree / 'val' / 'class_0' / '0.png').rename(odd)
    output = io.BytesIO()
    monkeypatch.setattr('sys.stdout', io.TextIOWrapper(output, encoding='utf-8'))
    assert call(odd, '--csv', tmp_path / 'p.csv', '--output', tmp_path / 'sheet.png')[0] == 0
    assert output.getvalue().split(b'\t')[0] == os.fsencode(odd.parent) + rb'/\udcff.png'  # a table has the very name
    assert (tmp_path / 'p.csv').read_bytes().splitlines()[1].split(b',')[0] == os.fsencode(odd)


@pytest.mark.slow
def test_a_reader_of_the_lines_may_stop(call, image_tree, tmp_path):
    """In a process of its own, with DataLoader workers, into a pipe that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    flags = ['--resume', tmp_path / 'w.pth', '--opts', 'DEVICE', 'cpu', '--workers', '2', '--batch-size', '2']
    command = [sys.executable, '-m', 'tools.predict', f'{image_tree}/val/**/*.png', *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment(), stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr  # which weights


def interrupt_after(monkeypatch, images):
    """Let Ctrl-C come while the next prediction is computed."""

    def some(*args):
        yield from itertools.islice(predict(*args), images)
        raise KeyboardInterrupt

    monkeypatch.setattr('tools.predict.predict', some)


@pytest.mark.parametrize('images', [0, 5])
def test_an_interrupted_table_keeps_its_rows(call, image_tree, tmp_path, monkeypatch, images):
    interrupt_after(monkeypatch, images)
    for flag, name in (('--csv', 'p.csv'), ('--json', 'p.json')):
        code, _, err = call(image_tree / 'val', flag, tmp_path / name)
        assert (code, err[-1]) == (130, 'interrupted')
    assert len((tmp_path / 'p.csv').read_text().splitlines()) == 1 + images
    assert len(json.loads((tmp_path / 'p.json').read_text())) == images


def test_rows_are_in_the_file_when_they_are_known(predictor, image_tree, tmp_path):
    images = evaluation_loader(predictor.config, find_images([image_tree / 'val']), batch_size=4)
    predictions = predict(predictor, images, 1)
    rows, table = [], tmp_path / 'p.csv'
    parts = (rows.append(len(table.read_text().splitlines())) or part for part in csv_rows(predictions, NAMES, 1))
    stream_text(table, parts)
    assert rows == list(range(13))


def test_control_characters_of_names_stay_in_their_line(call, image_tree, tmp_path):
    odd = image_tree / 'clear \x1b[2J\n.png'
    (image_tree / 'val' / 'class_0' / '0.png').rename(odd)
    _, (line,), _ = call(odd, '--csv', tmp_path / 'p.csv')
    assert line.startswith(rf'{image_tree}/clear \x1b[2J\n.png')
    with (tmp_path / 'p.csv').open(newline='') as file:
        assert [row['path'] for row in csv.DictReader(file)] == [str(odd)]


@pytest.fixture
def exported(tiny_config, tmp_path, monkeypatch):
    """An exported file with its report, which its network runs in place of onnxruntime."""
    config = tiny_config()
    model = fill_(build_model(config)).eval()
    monkeypatch.setitem(BACKENDS, 'onnxruntime', (lambda path: lambda images: [model(images)], ('.onnx',)))
    path = tmp_path / 'w.onnx'
    path.write_bytes(b'')
    plain = yaml.safe_load(config.dump())
    report = {'network': 'classifier', 'precision': 'fp32', 'classes': NAMES, 'config': plain}
    (tmp_path / 'w.onnx.json').write_text(json.dumps(report))
    return path, report


@pytest.fixture
def call_exported(exported, monkeypatch, capsys):
    """A function that runs the program on `exported`; see `call`."""

    def run(*arguments):
        return run_program(monkeypatch, capsys, '--backend', 'onnxruntime', exported[0], '--workers', '0', *arguments)

    return run


def test_an_exported_file_answers_as_its_checkpoint(call, call_exported, exported, image_tree, tmp_path):
    flags = [image_tree / 'val', '--topk', '3', '--batch-size', '5', '--csv', '-', '--output', tmp_path / 'sheet.png']
    code, lines, errors = call_exported(*flags)
    assert code == 0
    assert lines == call(*flags)[1]
    assert errors[0] == f'{exported[0]}: fp32, run by onnxruntime'
    assert errors[1].endswith(' of 12 right')
    turned = call_exported(*flags, '--opts', 'TEST.CROP', 'False')[1]
    assert turned != lines
    assert turned == call(*flags, '--opts', 'TEST.CROP', 'False')[1]


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'config': None}, 'w.onnx.json is not a report of tools.export: export the network again'),
        ({'config': {'MODEL': {7: 8}}, 'classes': ['a', 2, 'c']}, 'w.onnx.json is not a report of tools.export'),
        ({'config': {'MODEL': {'NUM_CLASSES': 'x'}}}, "MODEL.NUM_CLASSES is 'x': write an integer"),
        ({'config': {'TASK': 'detection'}}, 'w.onnx is not a classifier: predict with a checkpoint, --resume'),
        ({'network': "detector's backbone"}, 'w.onnx is not a classifier: predict with a checkpoint, --resume'),
        ({'classes': []}, 'w.onnx has no classes'),
        ({'input': {'shape': ['batch', 3, 32, 28]}}, 'w.onnx takes images of 32 x 28, and DATA.IMG_SIZE is 28: export'),
        ({'classes': ['a', 'b']}, 'w.onnx has 3 outputs, and {folder}/w.onnx.json names 2 classes: export the network'),
        ({'precision': 'x\n' * 9, 'classes': ['\x1b[2J', '', '=cmd()']}, None),
    ],
)
def test_reports_from_elsewhere(call_exported, exported, image_tree, tmp_path, change, message):
    (tmp_path / 'w.onnx.json').write_text(json.dumps(exported[1] | change))
    code, lines, errors = call_exported(image_tree / 'val', '--topk', '3')
    if message:
        assert message.format(folder=tmp_path) in code
        assert not lines
    else:
        assert (code, len(lines)) == (0, 12)
        assert '\\x1b[2J' in lines[0]
        assert errors[0] == f'{exported[0]}: run by onnxruntime'


@pytest.mark.parametrize('content', [None, b'', b'{', b'[]', b'null', b'"x"', b'[' * 100_000, b'\xff\xfe\x00'])
def test_files_without_a_report(call_exported, image_tree, tmp_path, content):
    report = tmp_path / 'w.onnx.json'
    if content is None:
        report.unlink()
    else:
        report.write_bytes(content)
    code, *_ = call_exported(image_tree / 'val')
    assert code.startswith(f'error: {report} ')
    assert '\n' not in code


@pytest.mark.parametrize(
    ('outputs', 'message'),
    [
        (lambda images: images[9], 'w.onnx fails on images of 3 x 28 x 28, as its config makes them: index 9 is out'),
        (lambda images: [images], 'w.onnx has outputs of shape (1, 3, 28, 28) for 1 images: it is not a classifier'),
        (lambda images: [], 'w.onnx has outputs of shape  for 1 images: it is not a classifier'),
        (lambda images: [images.new_zeros(1, 4)], 'w.onnx has 4 outputs, and '),
        (lambda images: [images.new_full((len(images), 3), torch.nan)], 'the outputs of the network are not finite'),
    ],
)
def test_other_files_than_of_the_report(call_exported, exported, image_tree, monkeypatch, outputs, message):
    monkeypatch.setitem(BACKENDS, 'onnxruntime', (lambda path: outputs, ('.onnx',)))
    code, lines, _ = call_exported(image_tree / 'val')
    assert message in code
    assert not lines


@pytest.mark.parametrize(
    ('backend', 'name', 'message'),
    [
        ('onnxruntime', 'bad.onnx', 'error: onnxruntime cannot load bad.onnx: [ONNXRuntimeError]'),
        ('openvino', 'bad.onnx', 'error: openvino cannot load bad.onnx: '),
        ('openvino', 'bad.xml', 'error: openvino cannot load bad.xml: '),
        ('onnxruntime', 'bad.xml', 'error: bad.xml is not a file for onnxruntime: give a file with the suffix .onnx'),
        ('openvino', 'alone.xml', 'error: alone.bin does not exist: give a file that tools.export has written'),
        ('onnxruntime', 'folder.onnx', 'error: folder.onnx is a folder: give a file that tools.export has written'),
    ],
)
def test_files_that_no_runtime_loads(tiny_config, image_tree, tmp_path, monkeypatch, capsys, backend, name, message):
    monkeypatch.chdir(tmp_path)
    report = {'network': 'classifier', 'classes': NAMES, 'config': yaml.safe_load(tiny_config().dump())}
    for file in ('bad.onnx', 'bad.xml', 'alone.xml'):
        (tmp_path / file).write_bytes(b'not a network' * 9)
        (tmp_path / f'{file}.json').write_text(json.dumps(report))
    (tmp_path / 'bad.bin').write_bytes(b'')
    (tmp_path / 'folder.onnx').mkdir()
    code, *_ = run_program(monkeypatch, capsys, '--backend', backend, name, 'images')
    assert code.startswith(message)
    assert '\n' not in code
    assert not code.endswith(': ')


@pytest.mark.parametrize(
    ('flags', 'code', 'message'),
    [
        (['--backend', 'tflite', 'w.onnx'], 2, "argument --backend: 'tflite' is not a backend: write onnxruntime or"),
        (['--backend', 'onnxruntime'], 2, 'argument --backend: expected 2 arguments'),
        (['--backend', 'onnxruntime', 'w.onnx', '--resume', 'w.pth'], 2, 'not allowed with argument'),
        (['--backend', 'onnxruntime', 'w.onnx', '--cfg', 'x.yaml'], 2, '--cfg is for checkpoints, and an exported'),
        (['--backend', 'onnxruntime', 'w.onnx', '--pretrained-weights', 'ema'], 2, '--pretrained-weights is for'),
        (['--resume', 'w.onnx'], 1, 'w.onnx is an exported file: write --backend onnxruntime w.onnx'),
        (['--resume', 'w.xml'], 1, 'w.xml is an exported file: write --backend openvino w.xml'),
        (['--backend', 'onnxruntime', 'w.onnx', '--opts', 'MODEL.MSG.WINDOW_SIZE', '5'], 1, 'MODEL.MSG.WINDOW_SIZE 7'),
        (['--backend', 'onnxruntime', 'w.onnx', '--opts', 'DEVICE', 'cuda'], 1, 'DEVICE is cuda, and exported files'),
        (['--backend', 'onnxruntime', 'w.onnx', '--json', 'w.onnx.json'], 1, 'and would be overwritten'),
    ],
)
def test_wrong_use_of_an_exported_file(exported, image_tree, tmp_path, monkeypatch, capsys, flags, code, message):
    monkeypatch.chdir(tmp_path)
    actual, lines, errors = run_program(monkeypatch, capsys, image_tree / 'val', *flags)
    text = actual if isinstance(actual, str) else errors[-1]
    assert message in text
    assert (1 if isinstance(actual, str) else actual) == code
    assert not lines
