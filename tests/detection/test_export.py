"""A detector as a graph of fixed shapes: the same detections as the detector; ONNX files, and mistakes."""

import json
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from detection.detector import load_detector
from detection.evaluation import CocoEvaluation
from detection.export import FixedDetector, keep_best, onnx_translations
from detection.exported import ExportedDetector, load_exported_detector, read_detector_report
from detection.models import build_detector
from detection.tools import evaluate_onnx
from detection.tools.predict import load_network
from engine.config_tree import ConfigError
from engine.exported_file import ExportedFileError, report_file
from engine.predictor import Predictor
from models.pyramid import Size
from tests.helpers.coco_data import update_tree, write_coco
from tests.helpers.detectors import ALL, NAMES, tiny_detector
from tests.helpers.documents import code_blocks
from tests.helpers.paths import ROOT
from tests.helpers.processes import run_here
from tools.export.__main__ import main
from tools.export.detector import Agreement, check_agreement, check_size, compare_detections, detect_eagerly, per_image
from tools.export.network import ExportError
from utils import UserError

pytestmark = pytest.mark.usefixtures('sums_in_one_order')

ONE_STAGE = (
    *('MODEL.BOX.IOUS', '[0.5]', 'MODEL.BOX.CENTRE_STDS', '[0.1]', 'MODEL.BOX.SIZE_STDS', '[0.2]'),
    *('MODEL.BOX.STAGE_WEIGHTS', '[1.0]'),
)
KINDS = {
    'Cascade Mask R-CNN': (),
    'Cascade R-CNN': ('MODEL.MASK.ENABLED', 'False'),
    'Mask R-CNN': ONE_STAGE,
    'Faster R-CNN': (*ONE_STAGE, 'MODEL.MASK.ENABLED', 'False'),
    'timm': (*ONE_STAGE, 'MODEL.BACKBONE', 'timm:test_resnet'),
}


def detector_of(*opts):
    """A detector with random weights, which finds something of each class everywhere."""
    torch.manual_seed(0)
    config = tiny_detector(*ALL, *opts)
    model = build_detector(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if 'logits' in name or 'box_deltas' in name or 'mask_fcn' in name or 'rpn.head' in name:
            nn.init.normal_(parameter, std=0.2)
    return model, config


@pytest.mark.parametrize('opts', KINDS.values(), ids=KINDS)
def test_fixed_shapes_find_what_the_detector_finds(opts):
    model, _ = detector_of(*opts)
    images, sizes = torch.randn(2, 3, 64, 96), torch.tensor([[64.0, 90], [50, 96]])
    for image, (height, width) in zip(images, sizes.int().tolist(), strict=True):
        image[:, height:], image[:, :, width:] = 0, 0
    with torch.inference_mode():
        outputs = FixedDetector(model, Size(64, 96)).eval()(images, sizes)
    expected = detect_eagerly(model, images, sizes)
    assert outputs[0].shape == (2, 10, 4)
    assert len(outputs) == (3 if 'MODEL.MASK.ENABLED' in opts else 4)
    agreement = compare_detections(per_image(outputs), expected)
    assert agreement._replace(boxes=0, scores=0, masks=0) == Agreement(20, 0, 0, 0, 0, 0)
    assert agreement.boxes < 1e-3
    assert agreement.scores < 1e-5
    assert agreement.masks < 1e-4
    for (boxes, scores, labels, _), own in zip(zip(*outputs[:3], [None] * 2, strict=True), expected, strict=True):
        assert labels.tolist() == own[2].tolist()  # in the same order
        torch.testing.assert_close(scores, own[1], rtol=0, atol=1e-5)
        torch.testing.assert_close(boxes, own[0], rtol=0, atol=1e-3)


def test_rows_after_the_last_detection_are_empty():
    model, _ = detector_of('MODEL.BOX.DETECTIONS', '60')
    images, sizes = torch.randn(1, 3, 64, 64), torch.tensor([[64.0, 64]])
    with torch.inference_mode():
        score = FixedDetector(model, Size(64, 64)).eval()(images, sizes)[1][0, 4].item()
        model.roi_heads.min_score = score
        boxes, scores, labels, masks = (x[0] for x in FixedDetector(model, Size(64, 64)).eval()(images, sizes))
    assert (labels[:4] > 0).all()
    assert (scores[:4] > score).all()
    assert (masks[:4] > 0).any()
    assert (labels[4:] == -1).all()
    assert not scores[4:].any()
    assert not boxes[4:].any()
    assert not masks[4:].any()


class Suppression(nn.Module):
    def forward(self, boxes, scores):
        return keep_best(boxes, scores, 0.5, 0.3, 7)


def test_onnx_keeps_the_boxes_that_torchvision_keeps(tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    torch.manual_seed(0)
    corners = torch.randint(0, 20, (6, 30, 2)).float()
    boxes = torch.cat((corners, corners + torch.randint(0, 15, (6, 30, 2))), dim=2)  # some are empty
    scores = (torch.rand(6, 30) * 20).round() / 20  # some are equal
    scores[5] = 0.1  # of a group in which nothing counts
    expected = keep_best(boxes, scores, 0.5, 0.3, 7)
    assert expected.sum(dim=1)[:5].max() == 7
    assert expected.sum(dim=1)[5] == 0
    program = torch.onnx.export(
        Suppression().eval(),
        (boxes, scores),
        dynamo=True,
        opset_version=20,
        verbose=False,
        optimize=False,
        input_names=['boxes', 'scores'],
        custom_translation_table=dict(onnx_translations()),
    )
    program.save(tmp_path / 'a.onnx')
    session = onnxruntime.InferenceSession(tmp_path / 'a.onnx')
    (kept,) = session.run(None, {'boxes': boxes.numpy(), 'scores': scores.numpy()})
    assert np.array_equal(kept, expected.numpy())


def exported_eagerly(model, config, size, batch_size):
    return ExportedDetector(config, size, batch_size, FixedDetector(model, size).eval()).eval()


@torch.inference_mode()
@pytest.mark.parametrize('opts', [(), ('MODEL.MASK.ENABLED', 'False')], ids=['masks', 'boxes'])
def test_images_are_prepared_and_finished_as_in_evaluation(opts):
    model, config = detector_of(*opts)
    exported = exported_eagerly(model, config, Size(64, 96), 2)
    images = [torch.rand(3, height, width) for height, width in ((32, 48), (48, 72), (128, 192))]  # all become 64 x 96
    found = exported.detect(images)  # of which the second batch is not full
    for detections, own in zip(found, (model.detect([image])[0] for image in images), strict=True):
        assert detections['labels'].tolist() == own['labels'].tolist()
        torch.testing.assert_close(detections['boxes'], own['boxes'], rtol=0, atol=1e-3)
        if not opts:
            # a mask's value near the threshold of 0.5 may round to the other side in a batch of another size
            assert (detections['masks'].dense() != own['masks'].dense()).float().mean() < 1e-4
    assert exported.detect(images[:1], short=32)[0]['boxes'].max() <= 48


def test_images_that_do_not_fit_are_made_smaller():
    model, config = detector_of()
    exported = exported_eagerly(model, config, Size(64, 64), 1)
    portrait = torch.rand(3, 60, 40)
    assert exported.resized_shape(portrait, 64) == (64, 43)
    assert exported.resized_shape(portrait, 32) == (48, 32)  # as in evaluation
    pixels, sizes = exported.prepare([portrait])
    assert sizes.tolist() == [[64, 43]]
    assert not pixels[..., 43:].any()
    assert pixels[..., :43].all()


@pytest.mark.parametrize(
    ('size', 'image', 'shape'),
    [((96, 64), (40, 60), (43, 64)), ((64, 96), (60, 40), (64, 43))],
    ids=['landscape in a portrait file', 'portrait in a landscape file'],
)
def test_images_of_the_other_orientation_are_made_smaller(size, image, shape):
    exported = ExportedDetector(tiny_detector(), Size(*size), 1, None)
    assert exported.resized_shape(torch.empty(3, *image), 64) == shape
    assert exported.resized_shape(torch.empty(3, *reversed(image)), 64) == size  # as in evaluation


@pytest.mark.parametrize(
    ('size', 'note'),
    [
        ((64, 64), ': images that do not fit into 64 x 64 are'),
        ((96, 160), ': portrait images that do not fit into 96 x 160 are'),
        ((160, 96), ': landscape images that do not fit into 160 x 96 are'),
        ((160, 160), ''),
    ],
)
def test_a_note_says_which_images_are_made_smaller(size, note, capsys):
    model, config = detector_of('INPUT.TEST_SHORT', '96', 'INPUT.MAX_LONG', '160')
    check_size(Predictor(config, model, NAMES, torch.device('cpu')), Size(*size))
    printed = capsys.readouterr().err
    assert note in printed
    assert bool(note) == ('made smaller' in printed)


def rows(*scores, label=1):
    n = len(scores)
    boxes = torch.arange(4.0).repeat(n, 1) + torch.arange(n)[:, None] * 10
    return boxes, torch.tensor(scores), torch.full((n,), label), torch.ones(n, 2, 2)


def test_agreement_counts_detections_that_only_one_has():
    agreement = compare_detections([rows(0.9, 0.8)], [rows(0.9, 0.8005, 0.7)])
    assert agreement._replace(scores=0) == Agreement(3, 0, 1, 0, 0, 0)
    assert agreement.scores == pytest.approx(5e-4, abs=1e-6)
    assert compare_detections([rows(0.9, label=2)], [rows(0.9)])[:3] == (1, 1, 1)
    assert compare_detections([rows(0.9, 0.9)], [rows(0.95, 0.9)])[:3] == (2, 1, 1)
    for differing in (Agreement(99, 1, 1, 0, 0, 0), Agreement(99, 0, 0, 0, 0, float('nan'))):
        with pytest.raises(ExportError, match='the file differs, and is not kept: it has .* of 99 detections of eager'):
            check_agreement(differing)
    with pytest.raises(ExportError, match='the detector finds nothing in the images, so the file cannot be checked'):
        check_agreement(Agreement(0, 0, 0, 0, 0, 0))
    check_agreement(Agreement(100, 1, 1, 0, 0, 0))


@pytest.fixture
def checkpoint(tmp_path):
    model, config = detector_of(*KINDS['Mask R-CNN'])
    path = tmp_path / 'a.pth'
    torch.save({'model': model.state_dict(), 'classes': NAMES, 'config': yaml.safe_load(config.dump())}, path)
    return path


def export(monkeypatch, checkpoint, *flags, name='a.onnx'):
    path = checkpoint.with_name(name)
    command = ['export', '--resume', str(checkpoint), '--format', 'onnx', '--output', str(path), *flags]
    monkeypatch.setattr(sys, 'argv', command)
    main()
    return path


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--detector'], '--detector needs one size, to which images are padded: --size HEIGHT WIDTH, as in'),
        (['--detector', '--size', '64', '--always-pad'], '--always-pad is not for whole detectors: leave it out'),
        (['--detector', '--size', '64', '--int8', '--calibrate', 'x'], '--int8 is not for whole detectors: leave it'),
        (['--detector', '--size', '64', '--batch-size', '0'], '--batch-size: 0 is not a positive integer'),
        (['--detector', '--size', '64', '--format', 'openvino'], '--detector is for --format onnx: leave it out for'),
        (['--batch-size', '2'], '--batch-size is for whole detectors, since other files take any: add --detector'),
    ],
)
def test_wrong_flags(checkpoint, monkeypatch, capsys, flags, message):
    with pytest.raises(SystemExit):
        export(monkeypatch, checkpoint, *flags)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ('size', 'message'),
    [
        (['60', '64'], '--size 60 x 64: sides must be multiples of 32: write --size 64 64'),
        (['64', '8192'], '--size 64 x 8192: sides are at most 4096 pixels'),
    ],
)
def test_sizes_that_a_detector_does_not_take(checkpoint, monkeypatch, size, message):
    with pytest.raises(SystemExit, match=message):
        export(monkeypatch, checkpoint, '--detector', '--size', *size)
    assert not checkpoint.with_name('a.onnx').exists()


def test_a_classifier_is_not_a_detector(tmp_path, tiny_config, monkeypatch):
    config = tiny_config()
    torch.save({'model': {'a': torch.zeros(1)}, 'config': yaml.safe_load(config.dump())}, tmp_path / 'a.pth')
    with pytest.raises(SystemExit, match='a.pth is not a detector: leave out --detector to export a classifier'):
        export(monkeypatch, tmp_path / 'a.pth', '--detector', '--size', '64')


def test_missing_packages(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    with pytest.raises(SystemExit, match='onnxscript is not installed: pip install -r requirements-export.txt'):
        export(monkeypatch, checkpoint, '--detector', '--size', '64')


def write_report(path, **entries):
    """A file, which is no graph, and its report."""
    path.write_bytes(b'no graph')
    config = yaml.safe_load(tiny_detector('MODEL.BOX.SCORE', '0.1', 'AMP_OPT_LEVEL', 'O1').dump())
    report = {'network': 'detector', 'config': config, 'classes': NAMES, 'input': {'images': [1, 3, 64, 96]}}
    report_file(path).write_text(json.dumps(report | entries))
    return path


@pytest.mark.parametrize(
    ('entries', 'message'),
    [
        ({'network': 'classifier'}, 'a.onnx is a classifier: give a file that tools.export --detector has written'),
        ({'network': "detector's backbone"}, "a.onnx is a detector's backbone: give a file that tools.export"),
        ({'input': {'images': ['batch', 3, 64, 64]}}, 'a.onnx.json is not a report of tools.export --detector: export'),
        ({'classes': None}, 'a.onnx.json is not a report of tools.export --detector: export the detector again'),
        ({'classes': ['box']}, 'a.onnx.json names 1 classes, and its config has another number: export the'),
        ({}, 'onnxruntime cannot load .*a.onnx: '),
    ],
)
def test_files_that_are_no_detectors(tmp_path, entries, message):
    path = write_report(tmp_path / 'a.onnx', **entries)
    with pytest.raises(ExportedFileError, match=message):
        load_detector(path)


def test_the_suffix_may_be_in_capitals(tmp_path):
    path = write_report(tmp_path / 'a.ONNX')
    with pytest.raises(ExportedFileError, match='onnxruntime cannot load .*a.ONNX: '):
        load_detector(path)
    with pytest.raises(UserError, match='a.ONNX is an exported file: write --backend onnxruntime'):
        load_network(Namespace(backend=None, resume=str(path)))


def test_files_without_a_report(tmp_path):
    with pytest.raises(ExportedFileError, match='a.onnx does not exist: give a file that tools.export --detector has'):
        load_detector(tmp_path / 'a.onnx')
    (tmp_path / 'a.onnx').write_bytes(b'')
    with pytest.raises(ExportedFileError, match='a.onnx.json cannot be read .No such file'):
        read_detector_report(tmp_path / 'a.onnx')


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (
            {'score': 0.05},
            'MODEL.BOX.SCORE is 0.05, and .* was exported with 0.1: write at least 0.1, or export',
        ),
        ({'opts': ['MODEL.BOX.NMS_IOU', 0.3]}, 'MODEL.BOX.NMS_IOU is 0.3, and .* was exported with 0.5: write 0.5, or'),
        ({'device': 'cuda'}, 'DEVICE is cuda, and exported files run on the CPU: write DEVICE cpu'),
        ({'opts': ['AMP_OPT_LEVEL', 'O1']}, 'AMP_OPT_LEVEL is O1, and exported files run in float32: leave it out'),
        (
            {'opts': ['INPUT.TEST_SHORT', 96]},
            'INPUT.TEST_SHORT has 96 pixels, .* takes images of 64 x 96: write at most',
        ),
        ({'opts': ['TEST.SHORTS', [64, 80]]}, 'TEST.SHORTS has 80 pixels, and .* of 64 x 96: write at most 64, or'),
        ({'precision': 'bfloat16'}, 'a.onnx is an exported file, in float32, with its own weights and config: leave'),
        ({'weights': 'ema'}, 'a.onnx is an exported file, in float32, with its own weights and config: leave out'),
    ],
)
def test_what_a_file_cannot_do(tmp_path, arguments, message):
    with pytest.raises((ExportedFileError, ConfigError), match=message):
        load_detector(write_report(tmp_path / 'a.onnx'), **arguments)


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--resume', 'a.pth'], r'a.pth is not the network of .*a.onnx \(MODEL.BOX.IOUS .*: give the checkpoint that'),
        (['--output', 'a.pth/results.json'], 'output folder a.pth: File exists: write'),
    ],
)
def test_evaluations_that_cannot_start(checkpoint, coco, tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr('detection.exported.run_onnx_detector', lambda path: None)
    monkeypatch.chdir(tmp_path)
    file = str(write_report(tmp_path / 'a.onnx'))
    monkeypatch.setattr(sys, 'argv', ['evaluate_onnx', file, '--data-path', str(coco), *flags])
    with pytest.raises(SystemExit, match=message):
        evaluate_onnx.main()


def test_an_evaluation_compares_the_classes_of_the_data_with_those_of_the_file(coco, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('detection.exported.run_onnx_detector', lambda path: None)
    monkeypatch.setattr(evaluate_onnx, 'evaluate', lambda config, detectors: {})
    file = write_report(tmp_path / 'a.onnx')
    monkeypatch.setattr(sys, 'argv', ['evaluate_onnx', str(file), '--data-path', str(coco)])
    evaluate_onnx.main()
    assert 'warning' not in capsys.readouterr().err
    update_tree(coco, categories=[{'id': 3, 'name': 'wedge'}, {'id': 7, 'name': 'box'}, {'id': 90, 'name': 'rare'}])
    evaluate_onnx.main()
    assert f'has other classes (wedge for box) than {file}: metrics mean nothing unless' in capsys.readouterr().err
    update_tree(coco, categories=[{'id': 3, 'name': 'box'}, {'id': 7, 'name': 'wedge'}])
    with pytest.raises(SystemExit, match='has 2 categories, and .*a.onnx detects 3 classes: give --data-path'):
        evaluate_onnx.main()


def test_files_run_in_float32_and_take_other_keys(tmp_path, monkeypatch):
    monkeypatch.setattr('detection.exported.run_onnx_detector', lambda path: None)
    opts = ['TEST.FLIP', True, 'INPUT.TEST_SHORT', 48]
    detector = load_detector(write_report(tmp_path / 'a.onnx'), score=0.3, opts=opts, batch_size=2)
    assert (detector.config.AMP_OPT_LEVEL, detector.class_names) == ('O0', NAMES)
    assert (detector.model.size, detector.model.batch_size, detector.model.min_score) == ((64, 96), 1, 0.3)


def test_onnxruntime_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr('engine.exported_file.find_spec', lambda name: None)
    with pytest.raises(ExportedFileError, match='onnxruntime is not installed: pip install -r requirements-export.txt'):
        load_exported_detector(write_report(tmp_path / 'a.onnx'))


@pytest.mark.slow
def test_an_onnx_file_finds_what_the_detector_finds(checkpoint, tmp_path, monkeypatch, capsys):
    """In Python, in the program that predicts, and in an evaluation."""
    coco = write_coco(tmp_path / 'coco')
    path = export(monkeypatch, checkpoint, '--detector', '--size', '96', '96', '--images', str(coco / 'val'))
    assert 'images: the file has 40 of 40 detections of eager execution; largest difference' in capsys.readouterr().out
    report = json.loads(report_file(path).read_text())
    assert (report['network'], report['outputs']) == ('detector', ['boxes', 'scores', 'labels', 'masks'])
    assert report['input'] == {'images': [1, 3, 96, 96], 'sizes': [1, 2]}

    model, config = detector_of(*KINDS['Mask R-CNN'])
    padded = exported_eagerly(model, config, Size(96, 96), 1)
    photos = sorted((coco / 'val').iterdir())
    for photo, found in zip(photos, load_detector(path)(photos), strict=True):
        pixels = torch.from_numpy(np.array(Image.open(photo).convert('RGB'))).permute(2, 0, 1) / 255
        own = padded.detect([pixels])[0]
        assert found.labels.tolist() == own['labels'].tolist()
        torch.testing.assert_close(found.boxes, own['boxes'], rtol=0, atol=0.01)
        assert (found.masks != own['masks'].dense()[:, 0]).float().mean() < 1e-3
    score = found.scores[3].item()
    assert len(load_detector(path, score=score)(photos[-1])) == 3

    command = ['detection.tools.predict', '--backend', 'onnxruntime', path, coco / 'val', '--score', score]
    done = run_here('-m', *command, '--workers', '0')
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == sum(map(len, load_detector(path, score=score)(photos)))

    Image.open(photos[3]).save(tmp_path / 'photo.jpg')  # 64 x 64, which is not resized
    monkeypatch.chdir(tmp_path)
    path.rename('detector.onnx')
    report_file(path).rename('detector.onnx.json')
    path = tmp_path / 'detector.onnx'
    section = (ROOT / 'docs' / 'export.md').read_text().partition('\n## Whole detectors\n')[2].partition('\n## ')[0]
    in_project, elsewhere = code_blocks(section, 'py')
    exec(in_project.replace('score=0.5', 'score=0'), {})
    printed = capsys.readouterr().out.splitlines()
    exec(elsewhere, {})
    own_words = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert own_words == [line.split()[0] for line in printed]
    assert len(own_words) == 10

    options = ['--opts', 'DATA.NUM_WORKERS', '0', '--output', str(tmp_path / 'results.json')]
    command = ['evaluate_onnx', str(path), '--data-path', str(coco), '--resume', str(checkpoint), *options]
    monkeypatch.setattr(sys, 'argv', command)
    compared = []
    describe = evaluate_onnx.describe
    monkeypatch.setattr(evaluate_onnx, 'describe', lambda results: compared.append(results) or describe(results))
    evaluate_onnx.main()
    evaluations: dict[str, CocoEvaluation] = {name: result.evaluation for name, result in compared[0].items()}
    assert evaluations['file'].metrics == pytest.approx(evaluations['eager, padded'].metrics, abs=1e-6, nan_ok=True)
    assert json.loads((tmp_path / 'results.json').read_text()) == evaluations['file'].results()
    assert 'ms per image; the file takes' in capsys.readouterr().out
