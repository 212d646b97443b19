"""A detector in Python: it finds what evaluation does, in images of any form; mistakes; the code of the documents."""

import copy
import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageOps

import detection.main as program
from data import DataError
from detection.data import open_split
from detection.detections import Detection, Detections
from detection.detector import load_detector
from detection.images import read_pixels
from detection.models import build_detector
from detection.tools import predict as predict_program
from engine.checkpoint import load_checkpoint
from engine.config_tree import ConfigError
from models import MSGTransformer
from tests.helpers.detectors import ALL, NAMES, tiny_detector
from tests.helpers.documents import code_blocks
from tests.helpers.paths import ROOT
from tests.helpers.processes import run_here
from tests.helpers.runs import folder_of
from utils import UserError

pytestmark = pytest.mark.usefixtures('sums_in_one_order')


def write_checkpoint(path, *opts, **entries):
    torch.manual_seed(0)
    config = tiny_detector(*ALL, *opts)
    state = {'model': build_detector(config).state_dict(), 'classes': NAMES, 'config': yaml.safe_load(config.dump())}
    torch.save(state | entries, path)
    return path


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of a tiny detector that finds ten objects everywhere."""
    return write_checkpoint(tmp_path / 'ckpt_best.pth')


@pytest.fixture
def photo(coco):
    """An evaluation image, which a camera stored sideways, with 48 x 64 pixels when it is upright."""
    path = coco / 'val' / '1.png'
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(path) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    return path


def assert_same(one, two):
    assert (one.names, one.size) == (two.names, two.size)
    for key in ('boxes', 'scores', 'labels', 'masks'):
        assert torch.equal(getattr(one, key), getattr(two, key)), key


CASES = [
    pytest.param((), {}, id='defaults'),
    pytest.param(('TEST.FLIP', 'True', 'TEST.SHORTS', '[48,64]'), {}, id='augmented'),
    pytest.param(('TEST.TILES', '40', 'TEST.TILE_OVERLAP', '0.3'), {}, id='tiles'),
    pytest.param(('AMP_OPT_LEVEL', 'O1', 'AMP_DTYPE', 'bfloat16'), {'precision': 'bfloat16'}, id='bfloat16'),
]


@pytest.mark.parametrize(('opts', 'arguments'), CASES)
def test_a_detector_finds_what_evaluation_writes(opts, arguments, checkpoint, coco, photo, tmp_path):
    data = ['DATA.DATA_PATH', str(coco), 'OUTPUT', str(tmp_path / 'output'), 'EVAL_MODE', 'True']
    config = tiny_detector(*ALL, *opts, *data, 'MODEL.RESUME', str(checkpoint))
    program.main(config)
    written = json.loads((folder_of(config) / 'results.json').read_text())

    dataset = open_split(config, 'VAL')
    detector = load_detector(checkpoint, opts=() if arguments else opts, **arguments)
    paths = [dataset.folder / entry['file_name'] for entry in dataset.images]
    assert photo in paths
    results = []
    for entry, found in zip(dataset.images, detector(paths), strict=True):
        assert found.size == (entry['height'], entry['width'])
        for (_, label, score, (x1, y1, x2, y2)), mask in zip(found, found.box_masks.segmentations(), strict=True):
            results.append(
                {
                    'image_id': entry['id'],
                    'category_id': dataset.categories[label - 1]['id'],
                    'bbox': [x1, y1, x2 - x1, y2 - y1],
                    'score': score,
                    'segmentation': mask,
                }
            )
    assert len(results) == 40
    assert results == written


def test_the_program_prints_what_a_detector_finds(checkpoint, coco, photo):
    paths = sorted((coco / 'val').iterdir())
    score = load_detector(checkpoint)(paths[0]).scores[4].item()
    flags = ['--resume', checkpoint, '--score', score, '--workers', '0']
    done = run_here('-m', 'detection.tools.predict', coco / 'val', *flags)
    lines = []
    for path, found in zip(paths, load_detector(checkpoint, score=score).stream(paths), strict=True):
        lines += [f'{path}\t{x.name}\t{x.score:.3f}\t' + ' '.join(f'{side:.1f}' for side in x.box) for x in found]
    assert done.stdout.splitlines() == lines
    assert 0 < len(lines) < 40


def test_an_image_may_have_any_form(checkpoint, photo):
    detector = load_detector(checkpoint)
    expected = detector(photo)
    assert expected.size == (64, 48)
    assert len(expected) == 10
    stored = Image.open(photo)
    array = np.asarray(ImageOps.exif_transpose(stored).convert('RGB'))
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    forms = [str(photo), photo.read_bytes(), stored, array, array[..., ::-1].copy()[..., ::-1], tensor, tensor / 255]
    forms += [tensor.double() / 255, array.astype(np.float32) / np.float32(255)]
    for form in forms:
        assert_same(detector(form), expected)
    for several in (forms, tuple(forms[:2]), iter(forms[:2]), np.stack([array] * 2), torch.stack([tensor] * 2)):
        results = detector(several)
        assert isinstance(results, list)
        for found in results:
            assert_same(found, expected)
    assert detector([]) == []
    grey = np.asarray(stored.convert('L'))
    assert_same(detector(grey), detector(np.stack([grey] * 3, axis=2)))
    assert_same(load_detector(checkpoint, opts=['DATA.EXIF', False])(photo), detector(np.asarray(stored)))


def test_images_of_one_shape_share_a_batch_and_stay_in_order(checkpoint, monkeypatch):
    images = [torch.rand(3, *size) for size in ((50, 70), (60, 40), (50, 70), (100, 140), (30, 30))]
    expected = [load_detector(checkpoint)(image) for image in images]
    detector = load_detector(checkpoint, batch_size=np.int64(4))
    counts, detect = [], detector.model.detect
    monkeypatch.setattr(detector.model, 'detect', lambda x, short: counts.append(len(x)) or detect(x, short))
    for found, one in zip(detector(images), expected, strict=True):
        assert found.size == one.size
        torch.testing.assert_close(found.boxes, one.boxes, rtol=0, atol=0.05)
        torch.testing.assert_close(found.scores, one.scores, rtol=0, atol=1e-3)
    assert counts == [3, 1, 1]  # 100 x 140 pixels are resized to the shape of 50 x 70


def test_images_are_read_as_they_are_needed(checkpoint):
    def images():
        yield torch.rand(3, 40, 40)
        pytest.fail('read too early')

    assert len(next(load_detector(checkpoint).stream(images()))) == 10


def test_a_minimum_score_leaves_out_the_others(checkpoint, photo):
    found = load_detector(checkpoint)(photo)
    score = found.scores[3:5].mean().item()
    kept = load_detector(checkpoint, score=score)(photo)
    assert len(kept) == 4
    assert torch.equal(kept.boxes, found.boxes[:4])
    assert torch.equal(kept.masks, found.masks[:4])
    assert_same(kept, found.above(score))
    assert write_checkpoint(checkpoint, 'MODEL.BOX.SCORE', '0.9')
    assert len(load_detector(checkpoint)(photo)) == 0
    assert_same(load_detector(checkpoint, score=0)(photo), found)  # lower than the checkpoint's


def test_results(checkpoint, photo):
    found = load_detector(checkpoint)(photo)
    assert found.masks.shape == (10, 64, 48)
    assert found.masks.dtype == torch.bool
    assert [x.name for x in found] == found.names == [NAMES[label - 1] for label in found.labels.tolist()]
    assert next(iter(found)) == Detection(
        found.names[0], found.labels[0].item(), found.scores[0].item(), found.boxes[0].tolist()
    )
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    found.boxes[:, 2:] -= found.boxes[:, :2]  # tensors of inference mode would refuse it
    nothing = found.above(1.1)
    assert (len(nothing), list(nothing), nothing.masks.shape) == (0, [], (0, 64, 48))


def test_a_detector_of_boxes_has_no_masks(tmp_path, photo):
    path = write_checkpoint(tmp_path / 'boxes.pth', 'MODEL.MASK.ENABLED', 'False')
    found = load_detector(path)(photo)
    assert found.masks is found.box_masks is None
    best = found.above(found.scores[2].item())
    assert (len(best), best.masks) == (3, None)


def test_arguments_choose_device_precision_and_weights(checkpoint):
    detector = load_detector(checkpoint, device=torch.device('cpu'), precision=torch.bfloat16)
    assert (str(detector.device), str(detector.precision)) == ('cpu', 'bfloat16 autocast')
    assert str(load_detector(checkpoint, opts=['DEVICE', 'cpu', 'AMP_OPT_LEVEL', 'O0']).precision) == 'float32'
    state = load_checkpoint(checkpoint)['model']
    write_checkpoint(checkpoint, model_ema={name: x + 1 if x.is_floating_point() else x for name, x in state.items()})
    for weights, shift in (('raw', 0), ('ema', 1), ('auto', 1)):
        name, parameter = next(load_detector(str(checkpoint), weights=weights).model.named_parameters())
        assert torch.equal(parameter, state[name] + shift)


PIXELS = np.zeros((8, 9, 3), np.uint8)
WRONG_IMAGES = [
    ('nowhere.jpg', 'image nowhere.jpg cannot be read'),
    ('.', r"\. is a folder: give its images, such as sorted\(Path\('\.'\)\.glob"),
    (b'', 'image 0 is empty'),
    (PIXELS.transpose(2, 0, 1), r'image 0 is a ndarray, uint8, \(3, 8, 9\): give a path, .*array \(H, W, 3\)'),
    (torch.zeros(8, 9, 3), r'image 0 is a Tensor, torch.float32, \(8, 9, 3\): give'),
    (PIXELS.astype(np.float32) + 200, r'float32, \(8, 9, 3\), with values from 200 to 200: give .* floats in \[0, 1\]'),
    (PIXELS.astype(np.uint16) + 2, r'uint16, \(8, 9, 3\), with values from 2 to 2: give'),
    (torch.full((3, 8, 9), torch.nan), 'with values from nan to nan'),
    (torch.zeros(3, 0, 9), r'\(3, 0, 9\): give'),
    (np.array(['a.jpg']), 'image 0 is a ndarray'),
    (None, 'image 0 is a NoneType: give'),
    ([PIXELS, 5], 'image 1 is a int: give'),
]


@pytest.mark.parametrize(('images', 'message'), WRONG_IMAGES, ids=[message[:30] for _, message in WRONG_IMAGES])
def test_what_is_no_image_is_refused_in_one_line(images, message, checkpoint):
    with pytest.raises(DataError, match=message) as error:
        load_detector(checkpoint)(images)
    assert '\n' not in str(error.value)


WRONG_ARGUMENTS = [
    ({'device': 'gpu'}, "DEVICE is 'gpu': write one of auto, cuda"),
    ({'device': 'cuda:x'}, "LOCAL_RANK is 'x': write"),
    ({'precision': 'fp16'}, "precision is 'fp16': write float32, float16 or bfloat16"),
    ({'weights': 'best'}, "weights is 'best': write auto, raw or ema"),
    ({'weights': 'ema'}, 'holds no EMA weights'),
    ({'score': 50}, 'MODEL.BOX.SCORE is 50.0: write a number between 0 and 1'),
    ({'batch_size': 0}, 'batch_size is 0: write a whole number from 1 on'),
    ({'batch_size': '8'}, "batch_size is '8': write a whole number from 1 on"),
    ({'opts': ['TEST.FLIP']}, 'has no value for TEST.FLIP'),
    ({'opts': ['MODEL.BOX.CONVS', [8]]}, 'MODEL.BOX.CONVS'),
]


@pytest.mark.parametrize(('arguments', 'message'), WRONG_ARGUMENTS, ids=[message for _, message in WRONG_ARGUMENTS])
def test_wrong_arguments_are_refused_in_one_line(arguments, message, checkpoint):
    with pytest.raises(UserError, match=message) as error:
        load_detector(checkpoint, **arguments)
    assert '\n' not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without a GPU')
def test_a_missing_gpu_is_refused(checkpoint):
    with pytest.raises(ConfigError, match='PyTorch finds no GPU'):
        load_detector(checkpoint, device='cuda:0')


def test_other_checkpoints_are_refused(tmp_path):
    with pytest.raises(UserError, match='does not exist'):
        load_detector(tmp_path / 'none.pth')
    network = MSGTransformer(embed_dim=16, depths=[1, 1], num_heads=[1, 2], shuffle_size=[2, 1], num_classes=5)
    torch.save({'model': network.state_dict(), 'config': {'TASK': 'classification'}}, tmp_path / 'classifier.pth')
    with pytest.raises(UserError, match='classifi'):
        load_detector(tmp_path / 'classifier.pth')


def blocks(*words):
    """The Python blocks of the section on this API with one of these words, in order."""
    text = (ROOT / 'docs' / 'detection_prediction.md').read_text()
    section = text.partition('\n## In Python\n')[2].partition('\n## ')[0]
    return [block for block in code_blocks(section, 'py') if any(word in block for word in words)]


@pytest.fixture
def namespace(checkpoint, photo, tmp_path, monkeypatch):
    """The variables of the documents' code, with the files that it reads."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'photos').mkdir()
    for name in ('photo.jpg', 'photos/a.jpg', 'photos/b.jpg'):
        ImageOps.exif_transpose(Image.open(photo)).save(name)
    return {'detector': load_detector(checkpoint)}


def test_the_code_of_readme_and_of_the_guide_runs(namespace, capsys, tmp_path):
    [readme] = [x for x in code_blocks((ROOT / 'README.md').read_text(), 'py') if 'load_detector' in x]
    exec(readme, readme_names := {})
    assert isinstance(readme_names['detections'], Detections)
    first, stream, tiles, draw = blocks('import load_detector', '.stream(', 'tiles=', 'draw_detections')
    exec(first.replace('score=0.5', 'score=0'), namespace)
    assert len(capsys.readouterr().out.splitlines()) == 10
    for code in (stream, tiles.replace('512', '40'), draw):
        exec(code, namespace)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ['photos/a.jpg', 'photos/b.jpg']
    assert Image.open(tmp_path / 'drawn.png').size == (8 * 48, 8 * 64)


def test_supervision(namespace, tmp_path):
    pytest.importorskip('supervision')
    [code] = blocks('import supervision')
    exec(code, namespace)
    converted, detections = namespace['converted'], namespace['detections']
    assert len(converted) == len(detections) == 10
    assert list(converted['class_name']) == detections.names
    np.testing.assert_array_equal(converted.mask, detections.masks.numpy())
    plain, drawn = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ('photo.jpg', 'annotated.png'))
    assert np.abs(plain - drawn).max() > 60


def test_sahi(namespace, capsys):
    pytest.importorskip('sahi')
    [code] = blocks('class SahiDetector')
    exec(code.replace('threshold=0.5', 'threshold=0.2').replace('512', '40'), namespace)
    result = namespace['result'].object_prediction_list
    assert result
    assert {x.category.name for x in result} <= set(NAMES)
    assert {x.category.id for x in result} <= {1, 2, 3}
    assert any(x.mask is not None for x in result)
    assert max(x.bbox.maxy for x in result) > 40  # of the lower slices
    assert len(capsys.readouterr().out.splitlines()) >= len(result)


def test_fiftyone(namespace):
    fiftyone = pytest.importorskip('fiftyone')
    code, _ = blocks('import fiftyone', 'fo.Dataset')
    exec(code, namespace)
    sample = fiftyone.Sample('photo.jpg')
    namespace['add_detections'](sample)
    detections, found = sample['predictions'].detections, namespace['detector']('photo.jpg')
    assert [x.label for x in detections] == found.names
    x, y, width, height = detections[0].bounding_box
    corners = [48 * x, 64 * y, 48 * (x + width), 64 * (y + height)]
    assert corners == pytest.approx(found.boxes[0].tolist(), abs=1e-3)
    assert detections[0].mask.sum() == found.masks[0].sum()


def test_a_copy_has_its_own_network_and_results_are_the_callers(checkpoint, photo):
    detector = load_detector(checkpoint, score=np.float32(0))
    copied = copy.deepcopy(detector)
    with torch.no_grad():
        for parameter in copied.model.parameters():
            parameter.zero_()
    found, nothing_learnt = detector(photo), copied(photo)
    assert not torch.equal(found.scores, nothing_learnt.scores)
    found.box_masks.probabilities.mul_(1)  # no tensor of inference mode
    assert found == found  # not by tensors
    assert len({found, nothing_learnt}) == 2


def test_arrays_of_other_byte_orders_and_floats_that_resizing_left_near_0_and_1():
    image = np.random.rand(4, 5, 3)
    for dtype in ('>f4', '>f8', np.longdouble):
        np.testing.assert_allclose(read_pixels(image.astype(dtype)).permute(1, 2, 0).numpy(), image, rtol=1e-6)
    pixels = read_pixels(torch.tensor([1 + 3e-7, -3e-7]).expand(3, 4, 2))
    assert pixels.unique().tolist() == [0, 1]
    for wrong in (torch.full((3, 2, 2), 1.01), Image.new('RGB', (0, 5))):
        with pytest.raises(DataError, match='image 0 '):
            read_pixels(wrong)


def test_a_detector_and_the_program_use_tiles(checkpoint, coco, monkeypatch, capsys):
    path = coco / 'val' / '0.png'
    tiled = load_detector(checkpoint, opts=['TEST.TILES', 32, 'TEST.TILE_OVERLAP', 0.5])(path)
    detector = load_detector(checkpoint)
    plain = detector(path)
    assert not torch.equal(tiled.boxes, plain.boxes)
    assert_same(detector(path, tiles=32, overlap=0.5), tiled)
    assert_same(next(detector.stream([path], tiles=32, overlap=0.5)), tiled)
    assert_same(detector(path, tiles=np.uint8(32), overlap=np.float32(0.5)), tiled)
    assert_same(detector(path), plain)
    assert_same(load_detector(checkpoint, opts=['TEST.TILES', 32])(path, tiles=0), plain)

    def predict(*flags):
        flags = ['--resume', checkpoint, '--score', 0, '--workers', 0, *flags]
        monkeypatch.setattr('sys.argv', ['predict', *map(str, [path, *flags])])
        predict_program.main()

    predict('--tiles', 32, '--overlap', 0.5)
    scores = [line.split('\t')[2] for line in capsys.readouterr().out.splitlines()]
    assert scores == [f'{score:.3f}' for score in tiled.scores.tolist()]
    with pytest.raises(SystemExit, match='error: --overlap is the overlap of tiles: add --tiles SIZE'):
        predict('--overlap', 0.5)

    for arguments, message in (
        ({'tiles': 31}, 'size of tiles .* is 31: write at least 32'),
        ({'tiles': 64.0}, 'is 64.0: write'),
        ({'tiles': True}, 'is True: write'),
        ({'overlap': 0.5}, 'overlap=0.5 has no effect without tiles: give tiles too, such as tiles=512'),
        ({'tiles': 64, 'overlap': 20}, 'overlap of tiles .* is 20: write a number between 0 and 0.9'),
    ):
        with pytest.raises(ConfigError, match=message):
            detector(path, **arguments)
