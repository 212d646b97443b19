"""Two hundred damaged files for each reader: every one is read, or refused in one line, in little time and memory.

A damaged file of a dataset may also make it refuse a single image, so these tests read all images.
"""

import io
import json
import logging
import platform
import shutil
import zipfile

import pyarrow
import pytest
import torch
import yaml
from pyarrow import parquet

from config import load_config
from data.formats import open_samples
from data.images import decode_image
from detection.data import CocoDataset
from detection.exported import load_exported_detector
from detection.tools.convert_dataset.__main__ import convert, open_converted
from detection.tools.convert_dataset.coco import read_coco
from detection.tools.convert_dataset.voc import read_voc
from detection.tools.convert_dataset.yolo import read_yolo
from engine.checkpoint import load_checkpoint
from engine.experiment import ENVIRONMENT
from engine.exported_file import report_file
from engine.predictor import load_predictor, prediction_parser
from engine.run_folder import RunFolder
from engine.run_lock import RunLock
from engine.start import find_start, resume_training
from main import TASK
from models import build_model
from tests.helpers.bad_files import (
    COUNT,
    VALUES,
    as_json,
    as_lines,
    assert_bad_files_are_told,
    bad_files,
    damaged_files,
)
from tests.helpers.coco_data import read_tree, write_coco
from tests.helpers.datasets import as_huggingface, as_shards, as_table, as_webdataset, as_zip
from tests.helpers.detectors import tiny_detector
from tests.helpers.exports import voc_object, write_voc, write_yolo
from tests.helpers.images import write_images
from tests.helpers.paths import ROOT, TINY
from tests.helpers.runs import build_run, build_trainer
from tools.convert_checkpoint import convert as convert_checkpoint
from tools.export.exported import BACKENDS, load_exported
from tools.plot import plot, read_run
from tools.study.plan import read_study
from utils import UserError

FEW = 25  # where the same reader is tested in other programs too

TENSORS = [
    *(torch.zeros(3), torch.tensor(3), torch.zeros(0), torch.zeros(2, dtype=torch.complex64)),
    *(torch.zeros(2, 2).to_sparse(), torch.zeros(2, device='meta'), torch.zeros(9, 8, dtype=torch.int64)),
]


def as_yaml(tree):
    return yaml.safe_dump(tree).encode()


def as_pth(tree):
    file = io.BytesIO()
    torch.save(tree, file)
    return file.getvalue()


def bad_checkpoints(entries, count=COUNT):
    return bad_files(entries, as_pth, VALUES + TENSORS, count)


@pytest.fixture
def checkpoint(tiny_config):
    """The entries of a checkpoint in the middle of an epoch, and the config of its run."""
    config = tiny_config(TRAIN__EMA_DECAY='0.9')
    trainer = build_trainer(config, build_model(config))
    images, targets = torch.rand(4, 3, 28, 28), torch.zeros(4, dtype=torch.long)
    trainer.train_step([(images, targets)])
    state = trainer.state.state_dict()
    extra = {'config': yaml.safe_load(config.dump()), 'classes': ['a', 'b', 'c'], 'task': 'classification'}
    extra |= {'origin': {'kind': 'scratch'}, 'environment': {'torch': '2.11.0'}}
    extra |= {'data': {'train': {'images': 4, 'sha256': 'x'}, 'val': {'images': 4, 'sha256': 'x'}}}
    return config, state | extra


def test_checkpoints_for_tools(checkpoint, tmp_path):
    path = tmp_path / 'bad.pth'
    args = prediction_parser('', '').parse_intermixed_args(['images', '--resume', str(path)])
    assert assert_bad_files_are_told(lambda: load_predictor(args, TASK), bad_checkpoints(checkpoint[1]), path) > 50


@pytest.mark.filterwarnings('ignore:Sparse invariant', 'ignore:Using a non-tuple sequence')
@pytest.mark.parametrize('flag', ['RESUME', 'PRETRAINED'])
def test_checkpoints_of_runs(checkpoint, tmp_path, flag):
    path = tmp_path / 'bad.pth'
    config = load_config(TINY, ['OUTPUT', str(tmp_path), f'MODEL.{flag}', str(path), 'TRAIN.EMA_DECAY', '0.9'])
    provenance = {key: checkpoint[1][key] for key in ('classes', 'data')}
    provenance['environment'] = dict.fromkeys(ENVIRONMENT, 'x')

    def read():
        """What a run does before its first update, and the optimizer's part of that."""
        run, network = build_run(config), build_model(config)
        start = find_start(run, TASK.tree)
        start.load_weights(run, TASK, network, provenance['classes'])
        if start.resumes:
            state = build_trainer(config, network).state
            resume_training(run, TASK, state, start, provenance)
            for parameter in network.parameters():
                parameter.grad = torch.zeros_like(parameter)
            state.optimizer.step()

    assert assert_bad_files_are_told(read, bad_checkpoints(checkpoint[1], FEW), path) > 5


def test_checkpoints_in_the_run_folder(checkpoint, tmp_path):
    config = load_config(TINY, ['OUTPUT', str(tmp_path), 'TRAIN.EMA_DECAY', '0.9'])
    run = build_run(config)
    run = run._replace(folder=RunFolder(tmp_path, 10, run.logger))

    def read():
        start = find_start(run, TASK.tree)
        if start.kind == 'continue':
            start.load_weights(run, TASK, build_model(config), ['a', 'b', 'c'])
        run.folder.is_best({'raw': 1.0})

    path = tmp_path / 'ckpt_best.pth'
    assert_bad_files_are_told(read, bad_checkpoints(checkpoint[1], FEW), path)
    path.unlink()
    path = tmp_path / 'ckpt_epoch_0.pth'
    assert assert_bad_files_are_told(read, bad_checkpoints(checkpoint[1], FEW), path) > 5


def test_checkpoints_to_convert(checkpoint, tmp_path):
    path, target = tmp_path / 'bad.pth', tmp_path / 'bad.safetensors'
    assert_bad_files_are_told(lambda: convert_checkpoint(path, target), bad_checkpoints(checkpoint[1], FEW), path)
    path.write_bytes(as_pth(checkpoint[1]))
    convert_checkpoint(path, target)
    contents = damaged_files(target.read_bytes())
    assert assert_bad_files_are_told(lambda: load_checkpoint(target), contents, target) > 50


def test_reports_of_exported_files(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setitem(BACKENDS, 'onnxruntime', (lambda path: lambda images: [images[:, 0, 0, :3]], ('.onnx',)))
    path = tmp_path / 'bad.onnx'
    path.touch()
    report = {'network': 'classifier', 'precision': 'fp32', 'classes': ['a', 'b', 'c']}
    report['config'] = yaml.safe_load(tiny_config().dump())
    contents = bad_files(report, as_json)
    assert assert_bad_files_are_told(lambda: load_exported('onnxruntime', path), contents, report_file(path)) > 50


def test_reports_of_exported_detectors(tmp_path, monkeypatch):
    monkeypatch.setattr('detection.exported.run_onnx_detector', lambda path: None)
    path = tmp_path / 'bad.onnx'
    path.touch()
    report = {'network': 'detector', 'input': {'images': [1, 3, 64, 96]}, 'classes': ['a', 'b', 'c']}
    report['config'] = yaml.safe_load(tiny_detector().dump())
    contents = bad_files(report, as_json, count=FEW)
    assert assert_bad_files_are_told(lambda: load_exported_detector(path), contents, report_file(path)) > 10


def read_all(name, folder, split='train'):
    """Open a split and read each of its images, any of which may be refused."""
    samples = open_samples(name, folder, split)
    errors = set()
    for index in range(len(samples.targets)):
        try:
            decode_image(samples.read(index), samples.describe(index))
        except UserError as error:
            errors.add(str(error))
    if errors:
        raise UserError(min(errors))


@pytest.fixture
def small_tree(tmp_path):
    return write_images(tmp_path / 'images', classes=2, train=3, val=1, size=8)


def test_shard_indices(small_tree, tmp_path):
    path = as_shards(small_tree, tmp_path / 'shards') / 'train' / 'index.json'
    contents = bad_files(json.loads(path.read_text()), as_json)
    assert assert_bad_files_are_told(lambda: read_all('shards', tmp_path / 'shards'), contents, path) > 50


@pytest.mark.parametrize('name', ['samples.npy', 'names.npy', 'shard_00000.tar'])
def test_shard_files(small_tree, tmp_path, name):
    path = as_shards(small_tree, tmp_path / 'shards') / 'train' / name
    contents = damaged_files(path.read_bytes())
    assert_bad_files_are_told(lambda: read_all('shards', tmp_path / 'shards'), contents, path)


@pytest.mark.parametrize('name', ['train.zip', 'train_map.txt'])
@pytest.mark.parametrize('compression', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_files(small_tree, tmp_path, name, compression):
    path = as_zip(small_tree, tmp_path / 'zip', compression) / name
    contents = damaged_files(path.read_bytes())
    assert assert_bad_files_are_told(lambda: read_all('zip', tmp_path / 'zip'), contents, path) > 50


@pytest.mark.parametrize('name', ['train.csv', 'train.parquet'])
def test_tables(small_tree, tmp_path, name):
    folder = as_table(small_tree, tmp_path / 'table')
    if name == 'train.parquet':
        rows = [line.split(',') for line in (folder / 'train.csv').read_text().splitlines()[1:]]
        columns = dict(zip(('path', 'label'), map(list, zip(*rows, strict=True)), strict=True))
        parquet.write_table(pyarrow.table(columns), folder / name)
        (folder / 'train.csv').unlink()
    contents = damaged_files((folder / name).read_bytes())
    assert assert_bad_files_are_told(lambda: read_all('table', folder), contents, folder / name) > 50


def test_webdataset_tars(small_tree, tmp_path):
    folder = as_webdataset(small_tree, tmp_path / 'tars', label='.json')
    (path,) = folder.glob('*train*.tar')
    contents = damaged_files(path.read_bytes())
    assert assert_bad_files_are_told(lambda: read_all('webdataset', folder), contents, path) > 50


def test_saved_datasets(small_tree, tmp_path):
    folder = as_huggingface(small_tree, tmp_path / 'saved') / 'train'
    (table,) = folder.glob('*.arrow')
    for path in (folder / 'state.json', folder / 'dataset_info.json', table):
        good = path.read_bytes()
        contents = damaged_files(good, FEW) if path == table else bad_files(json.loads(good), as_json, count=FEW)
        assert_bad_files_are_told(lambda: read_all('huggingface', tmp_path / 'saved'), contents, path)
        path.write_bytes(good)


def test_coco_annotations(tmp_path):
    root = write_coco(tmp_path / 'coco', train=3)
    path = root / 'annotations' / 'instances_train.json'

    def read():
        dataset = CocoDataset(root, 'train', is_train=True)
        for index in range(len(dataset)):
            dataset[index]

    assert assert_bad_files_are_told(read, bad_files(read_tree(root, 'train'), as_json), path) > 50


def read_converted(source, folder):
    """Convert a dataset, and open the result."""
    shutil.rmtree(folder, ignore_errors=True)
    convert(source, folder)
    for split in ('train', 'val'):
        open_converted(folder, split, folder)


def test_coco_annotations_to_convert(tmp_path):
    root = write_coco(tmp_path / 'coco', train=3)
    path = root / 'annotations' / 'instances_train.json'
    contents = bad_files(read_tree(root, 'train'), as_json, count=FEW)
    assert assert_bad_files_are_told(lambda: read_converted(read_coco(path), tmp_path / 'new'), contents, path) > 10


@pytest.fixture
def yolo(tmp_path):
    """A YOLO dataset of two images with a box, and a polygon and a box."""
    description = yaml.safe_dump({'train': 'images', 'val': 'images', 'names': {0: 'box', 1: 'disc'}})
    lines = '0 0.5 0.5 0.2 0.4\n', '1 0.1 0.1 0.6 0.1 0.6 0.7\n0 0.5 0.5 0.2 0.4\n'
    return write_yolo(tmp_path / 'yolo', *lines, yaml=description)


def test_yolo_descriptions(yolo, tmp_path):
    path = yolo / 'data.yaml'
    contents = bad_files(yaml.safe_load(path.read_text()), as_yaml)
    assert assert_bad_files_are_told(lambda: read_converted(read_yolo(yolo), tmp_path / 'new'), contents, path) > 50


def test_yolo_labels(yolo, tmp_path):
    path = yolo / 'labels' / '1.txt'
    words = [line.split() for line in path.read_text().splitlines()]

    def as_labels(lines):
        rows = [line if isinstance(line, list) else [line] for line in (lines if isinstance(lines, list) else [lines])]
        return '\n'.join(' '.join(map(str, row)) for row in rows).encode(errors='surrogatepass')

    contents = bad_files(words, as_labels)
    assert assert_bad_files_are_told(lambda: read_converted(read_yolo(yolo), tmp_path / 'new'), contents, path) > 50


def test_voc_annotations(tmp_path):
    root = tmp_path / 'voc'
    path = write_voc(root, 'a', voc_object() + voc_object('dog', (1, 2, 30, 40), '<difficult>0</difficult>'))
    write_voc(root, 'b', voc_object())
    contents = damaged_files(path.read_bytes())
    assert assert_bad_files_are_told(lambda: read_converted(read_voc(root), tmp_path / 'new'), contents, path) > 50


def test_configs(tmp_path):
    path = tmp_path / 'bad.yaml'
    contents = bad_files(yaml.safe_load(TINY.read_text()), as_yaml)
    assert assert_bad_files_are_told(lambda: build_model(load_config(path)), contents, path) > 50


def test_studies(tmp_path):
    good = yaml.safe_load((ROOT / 'configs' / 'studies' / 'msg_tokens.yaml').read_text())
    path = tmp_path / 'bad.yaml'
    assert assert_bad_files_are_told(lambda: read_study(path), bad_files(good, as_yaml), path) > 50


def test_metrics(tmp_path):
    records = []
    for epoch in (0, 1):
        records += [{'kind': 'train', 'updates': 3 * epoch + n, 'epoch': epoch, 'loss': 1.5, 'lr': 0.1} for n in (1, 2)]
        metrics = {'loss': 1.2, 'val_loss': 1.2, 'lr': 0.1, 'acc1': 50.0, 'max_accuracy': 50.0}
        records.append({'kind': 'epoch', 'updates': 3 * epoch + 3, 'epoch': epoch} | metrics)
    path, drawn = tmp_path / 'metrics.jsonl', 0

    def read():
        nonlocal drawn
        summary = read_run(tmp_path, 'name')
        if summary.epochs:
            figure = plot([summary])
            drawn += 1
            if drawn % 5 == 0:
                figure.draw_without_rendering()

    assert assert_bad_files_are_told(read, bad_files(records, as_lines), path) > 50
    assert drawn > 20


def test_locks(tmp_path):
    holder = {'host': platform.node(), 'pid': 1, 'since': '2026-01-01 00:00:00', 'token': 'x', 'is_lease': True}
    path = tmp_path / 'run.lock'

    def read():
        lock = RunLock(tmp_path, logging.getLogger('test'))
        lock.is_held_by_another()
        if lock.acquire(wait=0):
            lock.release()

    assert_bad_files_are_told(read, bad_files(holder, as_json), path)


def yaml_bomb(key):
    """A few lines of YAML that stand for a gigabyte: each level holds the one before ten times."""
    levels = [f'a{n}: &a{n} [{", ".join([f"*a{n - 1}"] * 10)}]' for n in range(1, 10)]
    return '\n'.join(['a0: &a0 [xxxxxxxxxx, x]', *levels, f'{key}: *a9']).encode()


DEEP_JSON = [opening * 200_000 for opening in (b'[', b'{"a":', b'[{"a":')]


def test_yaml_bombs(tmp_path):
    path = tmp_path / 'bad.yaml'
    merged = b'a: &a {x: 1}\nb: &b {<<: [' + b', '.join([b'*a'] * 10_000) + b']}\n'
    bombs = [yaml_bomb('MODEL'), yaml_bomb('BASE'), merged, *DEEP_JSON, b'- ' * 100_000, b'? ' * 10_000]
    assert assert_bad_files_are_told(lambda: load_config(path), bombs, path) == len(bombs)
    assert assert_bad_files_are_told(lambda: read_study(path), bombs, path) == len(bombs)


def test_yolo_bombs(yolo):
    assert assert_bad_files_are_told(lambda: read_yolo(yolo), [yaml_bomb('names')], yolo / 'data.yaml') == 1


def test_deep_json(small_tree, tmp_path):
    index = as_shards(small_tree, tmp_path / 'shards') / 'train' / 'index.json'
    annotations = write_coco(tmp_path / 'coco') / 'annotations' / 'instances_train.json'
    shards = assert_bad_files_are_told(lambda: read_all('shards', tmp_path / 'shards'), DEEP_JSON, index)
    coco = assert_bad_files_are_told(lambda: CocoDataset(tmp_path / 'coco', 'train', True), DEEP_JSON, annotations)
    assert shards == coco == len(DEEP_JSON)


def test_deep_json_lines_and_locks(tmp_path):
    assert_bad_files_are_told(lambda: read_run(tmp_path, 'name'), DEEP_JSON, tmp_path / 'metrics.jsonl')
    lock = RunLock(tmp_path, logging.getLogger('test'))
    assert_bad_files_are_told(lock.is_held_by_another, DEEP_JSON, tmp_path / 'run.lock')


def test_xml_bombs(tmp_path):
    """Entities that stand for gigabytes or for other files, other documents, and deep nesting."""
    root = tmp_path / 'voc'
    path = write_voc(root, 'a')
    levels = ''.join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 10))
    entities = [
        f'<!DOCTYPE x [<!ENTITY e0 "{"x" * 100}">{levels}]><annotation><filename>&e9;</filename></annotation>',
        f'<!DOCTYPE x [<!ENTITY e "{"x" * 100_000}">]><annotation><filename>{"&e;" * 10_000}</filename></annotation>',
        '<!DOCTYPE x [<!ENTITY e SYSTEM "file:///dev/zero">]><annotation><filename>&e;</filename></annotation>',
        '<!DOCTYPE x SYSTEM "http://127.0.0.1:9/x.dtd"><annotation/>',
        f'<annotation>{"<part>" * 50_000}',
    ]
    bombs = [text.encode() for text in entities]
    assert assert_bad_files_are_told(lambda: read_voc(root), bombs, path) == len(bombs)


def test_compressed_checkpoints(checkpoint, tmp_path):
    """Files may be small and hold much: PyTorch compresses no entry."""
    path, file = tmp_path / 'bad.pth', io.BytesIO(as_pth(checkpoint[1]))
    with zipfile.ZipFile(file, 'a', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('archive/data/bomb', bytes(2**24))
    assert assert_bad_files_are_told(lambda: load_checkpoint(path), [file.getvalue()], path) == 1


def test_a_checkpoint_cannot_ask_for_a_network_that_fills_the_memory(tmp_path):
    config, weights = yaml.safe_load(load_config(TINY).dump()), build_model(load_config(TINY)).state_dict()
    for key, value, message in (
        ('EMBED_DIM', 8192, 'and the network of its config has'),
        ('DEPTHS', [10**9, 1], 'MODEL.MSG.DEPTHS is .*: write'),
    ):
        config['MODEL']['MSG'] |= {'EMBED_DIM': 8, 'DEPTHS': [1, 1], key: value}
        torch.save({'model': weights, 'config': config}, tmp_path / 'large.pth')
        args = prediction_parser('', '').parse_intermixed_args(['images', '--resume', str(tmp_path / 'large.pth')])
        with pytest.raises(UserError, match=message):
            load_predictor(args, TASK)
