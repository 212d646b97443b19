"""The program of detection: outputs, resuming, evaluation, where weights come from, mistakes."""

import csv
import json
import re
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

import detection.main as program
from data import DataError
from detection.config import load_config
from detection.data.transforms import resize
from detection.models import build_detector
from detection.models.build import Detector
from engine.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from engine.config_tree import ConfigError
from engine.weights import choose_weights
from models import MSGTransformer
from models.layers import RegionDropPath
from tests.helpers.coco_data import CATEGORIES, read_tree, update_tree, write_coco
from tests.helpers.detectors import tiny_detector
from tests.helpers.golden import fill_
from tests.helpers.paths import TINY_DETECTOR
from tests.helpers.processes import TORCHRUN, error_line, start
from tests.helpers.runs import RecordingNode, differences, folder_of, last_checkpoint, log_of, one_thread, records
from utils import OutputError

LOSSES = {f'loss_{part}_{stage}' for part in ('classifier', 'box', 'mask') for stage in range(3)}
LOSSES |= {'loss_objectness', 'loss_rpn_box_reg'}

# Random numbers in the network, EMA weights, detections from the first update on.
OPTIONS = {'MODEL__DROP_PATH_RATE': '0.3', 'TRAIN__EMA_DECAY': '0.9', 'MODEL__BOX__SCORE': '0.0'}

ONE_EPOCH = {'TRAIN__EPOCHS': '1', 'TRAIN__LR_SCHEDULER__DECAY_EPOCHS': '[]'}
NO_UPDATES = {'TRAIN__BASE_LR': '0.0', 'TRAIN__WEIGHT_DECAY': '0', **ONE_EPOCH}
RUNNING_STATISTICS = ('running_mean', 'running_var', 'num_batches_tracked')


def config_of(output, data, **options):
    opts = [x for key, value in options.items() for x in (key.replace('__', '.'), value)]
    return tiny_detector('OUTPUT', str(output), 'DATA.DATA_PATH', str(data), *opts)


@pytest.fixture
def tiny(tmp_path, coco):
    """A function of options that gives the config of a tiny detector on `coco`."""
    with one_thread():
        yield lambda **options: config_of(tmp_path / 'output', coco, **options)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """The config of a finished run of two epochs of three updates, on the same data as `coco`."""
    folder = tmp_path_factory.mktemp('finished')
    config = config_of(folder / 'output', write_coco(folder / 'coco'), SAVE_STEPS='1', SAVE_KEEP='0', **OPTIONS)
    with one_thread():
        program.main(config)
    return config


def test_run_outputs(finished):
    folder = folder_of(finished)
    names = {path.name for path in folder.iterdir()}
    assert {'config.yaml', 'log_rank0.txt', 'metrics.jsonl', 'ckpt_epoch_1.pth', 'tensorboard'} <= names
    assert load_config(folder / 'config.yaml') == finished
    updates = records(finished, 'train')
    assert [(x['epoch'], x['step']) for x in updates] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    for update in updates:
        assert update.keys() >= LOSSES
        assert sum(update[name] for name in LOSSES) == pytest.approx(update['loss'], rel=1e-5)
    metrics = {f'{kind}_{name}' for kind in ('box', 'mask') for name in ('AP', 'AP50', 'AP75', 'APs', 'APm', 'APl')}
    for epoch in records(finished, 'epoch'):
        assert epoch.keys() >= metrics | {f'ema_{name}' for name in metrics}
    assert load_checkpoint(folder / 'ckpt_epoch_1.pth')['classes'] == [category['name'] for category in CATEGORIES]
    log = log_of(finished)
    assert '| box |' in log
    assert '| mask |' in log
    assert 'Max box AP: ' in log


def test_the_learning_rate_is_scaled_from_16_images(finished):
    peak = 0.01 * 2 / 16
    factors = [0.001, 0.001 + 0.999 / 2, 1, 0.1, 0.1, 0.1]
    assert [x['lr'] for x in records(finished, 'train')] == pytest.approx([peak * factor for factor in factors])


def assert_resumes_exactly(whole, tiny, path, tag, **options):
    config = tiny(TAG=tag, MODEL__RESUME=str(path), **OPTIONS, **options)
    program.main(config)
    assert differences(last_checkpoint(whole), last_checkpoint(config)) == [], tag
    assert 'the run resumes bit for bit' in log_of(config)


@pytest.mark.parametrize('name', ['ckpt_epoch_0_step_1.pth', 'ckpt_epoch_0.pth', 'ckpt_epoch_1_step_1.pth'])
def test_a_resumed_run_ends_with_the_same_bits(finished, tiny, name):
    assert_resumes_exactly(finished, tiny, folder_of(finished) / name, 'resumed', DATA__NUM_WORKERS='1')


def test_a_resumed_run_with_bfloat16_and_accumulation_ends_with_the_same_bits(tiny):
    options = {'AMP_OPT_LEVEL': 'O1', 'AMP_DTYPE': 'bfloat16', 'TRAIN__ACCUMULATION_STEPS': '2'}
    whole = tiny(TAG='whole', SAVE_STEPS='1', SAVE_KEEP='0', **OPTIONS, **options)
    program.main(whole)
    for name in ('ckpt_epoch_0_step_1.pth', 'ckpt_epoch_0.pth'):
        assert_resumes_exactly(whole, tiny, folder_of(whole) / name, name, **options)


@pytest.mark.slow
def test_a_resumed_run_with_jitter_copy_paste_and_repeats_ends_with_the_same_bits(tiny):
    options = {'INPUT__SCALE_JITTER': '[0.5,2.0]', 'INPUT__JITTER_SIZE': '72', 'INPUT__COPY_PASTE': '0.7'}
    options |= {'DATA__REPEAT_FACTOR': '0.9', 'DATA__BATCH_SIZE': '1', 'TEST__TILES': '40'}
    whole = tiny(TAG='whole', SAVE_STEPS='1', SAVE_KEEP='0', **OPTIONS, **options)
    program.main(whole)
    assert len(records(whole, 'train')) > 2 * 6  # images are repeated
    assert 'train: an epoch has ' in log_of(whole)
    for name in ('ckpt_epoch_0_step_1.pth', 'ckpt_epoch_1_step_4.pth'):
        assert_resumes_exactly(whole, tiny, folder_of(whole) / name, name, DATA__NUM_WORKERS='1', **options)


def test_a_resumed_run_with_another_seed_says_so(finished, tiny):
    config = tiny(MODEL__RESUME=str(folder_of(finished) / 'ckpt_epoch_0.pth'), SEED='3', **OPTIONS)
    program.main(config)
    assert 'not bit for bit: SEED has changed' in log_of(config)


def test_a_checkpoint_with_old_names_resumes_with_the_same_bits(finished, tiny, tmp_path):
    checkpoint = load_checkpoint(folder_of(finished) / 'ckpt_epoch_1_step_1.pth')
    for entry in ('model', 'model_ema'):
        checkpoint[entry] = {name.replace('.box_deltas.', '.offsets.'): x for name, x in checkpoint[entry].items()}
    checkpoint['place'] = checkpoint.pop('progress')
    save_checkpoint(tmp_path / 'old.pth', checkpoint)
    assert_resumes_exactly(finished, tiny, tmp_path / 'old.pth', 'resumed')


def test_validation_losses_are_recorded_and_leave_the_training_as_it_is(finished, tiny):
    config = tiny(TAG='loss', TEST__LOSS='True', **OPTIONS)
    program.main(config)
    checkpoint = last_checkpoint(config)
    assert checkpoint['scores'].pop('loss') > 0  # breaks ties of box AP
    assert differences(last_checkpoint(finished), checkpoint) == []
    for epoch, plain in zip(records(config, 'epoch'), records(finished, 'epoch'), strict=True):
        for prefix in ('', 'ema_'):
            assert sum(epoch[f'{prefix}val_{name}'] for name in LOSSES) == pytest.approx(epoch[f'{prefix}val_loss'])
        assert epoch['box_AP'] == plain['box_AP']
        assert not [key for key in plain if 'val_loss' in key]
    assert 'val_loss ' in log_of(config)


def test_validation_losses_are_those_of_training(tiny):
    config = tiny(MODEL__DROP_PATH_RATE='0.3')
    torch.manual_seed(0)
    network = build_detector(config).eval()
    dataset = program.build_eval_loader(config).dataset
    before = {name: x.clone() for name, x in network.state_dict().items()}
    random = torch.get_rng_state()
    run = SimpleNamespace(config=config, process=SimpleNamespace(device=torch.device('cpu')))
    with torch.inference_mode():
        losses = program.evaluation_losses(run, network, *dataset[1], 1)
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module.training for module in network.modules())
    assert differences(before, dict(network.state_dict())) == []
    for module in network.train().modules():
        if isinstance(module, nn.BatchNorm2d | RegionDropPath):
            module.eval()
    image, target = resize(*dataset[1], config.INPUT.TEST_SHORT, config.INPUT.MAX_LONG)
    torch.manual_seed(1)
    assert losses.keys() == LOSSES
    assert losses == pytest.approx({name: x.item() for name, x in network([image], [target]).items()}, rel=1e-4)
    empty = target | {key: target[key][:0] for key in ('boxes', 'labels', 'masks', 'has_mask')}
    assert program.evaluation_losses(run, network.eval(), image, empty, 1) == {}


def test_evaluation_logs_metrics_writes_results_and_draws(finished, tiny, coco, capsys):
    options = {'EVAL_MODE': 'True', 'MODEL__RESUME': str(folder_of(finished) / 'ckpt_epoch_1.pth')}
    options |= {'MODEL__BOX__SCORE': '0.0', 'SHOW_SCORE': '0.0'}
    config = tiny(TAG='eval', SHOW='3', **options)
    program.main(config)
    folder = folder_of(config)
    results = json.loads((folder / 'results.json').read_text())
    images = {image['id']: image for image in read_tree(coco, 'val')['images']}
    assert {result['image_id'] for result in results} == images.keys()
    assert {result['category_id'] for result in results} <= {3, 7, 90}
    assert (folder / 'results_ema.json').exists()
    assert (folder / 'results_ema.json').read_bytes() != (folder / 'results.json').read_bytes()
    assert {path.name for path in (folder / 'show').iterdir()} == {'5.png', '15.png', '25.png'}
    with Image.open(folder / 'show' / '5.png') as picture:
        side = (picture.width - 8) // 2  # ground truth, a gap, detections
        assert side * images[5]['height'] == picture.height * images[5]['width']
    for suffix in ('', '_ema'):
        with (folder / f'classes{suffix}.csv').open() as file:
            head, *rows = csv.reader(file)
        assert head[:6] == ['class', 'objects', 'box AP', 'box AP50', 'mask AP', 'mask AP50']
        assert Image.open(folder / f'precision_recall{suffix}.png').width > 0
        assert (folder / f'precision_recall{suffix}.csv').read_text().startswith('kind,class,recall,precision,score')
        assert [row[0] for row in rows] == [category['name'] for category in CATEGORIES]
        with (folder / f'confusion{suffix}.csv').open() as file:
            rows = list(csv.reader(file))
        assert [len(row) for row in rows] == [5] * 5
        assert Image.open(folder / f'confusion{suffix}.png').width > 0
    objects = sum(1 for x in read_tree(coco, 'val')['annotations'])
    assert sum(int(x) for row in rows[1:-1] for x in row[1:]) == objects
    assert 'classes, results.json:\n| objects | box AP | box AP50 | mask AP | mask AP50 | best' in log_of(config)

    # The metrics are those of the last epoch.
    rows = re.findall(r'\| box \| ([\d.]+) \| ([\d.]+)', log_of(config))
    epoch = records(finished, 'epoch')[-1]
    assert rows == [(f'{epoch[f"{of}box_AP"]:.2f}', f'{epoch[f"{of}box_AP50"]:.2f}') for of in ('', 'ema_')]

    # The batch size of training and the names of classes make no difference.
    categories = read_tree(coco, 'val')['categories']
    update_tree(coco, categories=[categories[0] | {'name': 'crate'}, *categories[1:]])
    other = tiny(TAG='other', DATA__BATCH_SIZE='3', **options)
    program.main(other)
    assert (folder_of(other) / 'results.json').read_bytes() == (folder / 'results.json').read_bytes()
    console = capsys.readouterr().out
    assert 'other classes (crate for box)' in console
    assert '| box |' in console


@pytest.mark.slow
def test_two_processes(tiny, tmp_path, coco):
    """Training keeps the same statistics on both, resumes bit for bit, and evaluates as one process does."""
    flags = ['-m', 'detection.main', '--cfg', TINY_DETECTOR, '--data-path', coco, '--output', tmp_path / 'output']
    opts = ['--batch-size', '1', '--opts', 'SAVE_STEPS', '2', 'SAVE_KEEP', '0', 'MODEL.BOX.SCORE', '0.0']

    def launch(*more):
        done = start(*TORCHRUN, '2', *flags, *more, *opts)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert launch('--tag', 'two').count('Train: [0/2][0/3]') == 1  # rank 0 alone logs to the console
    whole = tiny(TAG='two')
    resumed = launch('--tag', 'resumed', '--resume', folder_of(whole) / 'ckpt_epoch_1_step_2.pth')
    assert 'the run resumes bit for bit' in resumed
    assert differences(last_checkpoint(whole), last_checkpoint(tiny(TAG='resumed'))) == []

    path = str(folder_of(whole) / 'ckpt_epoch_1.pth')
    program.main(tiny(TAG='one', EVAL_MODE='True', MODEL__RESUME=path, MODEL__BOX__SCORE='0.0'))
    launch('--tag', 'both', '--eval', '--resume', path)
    one, both = ((folder_of(tiny(TAG=tag)) / 'results.json').read_bytes() for tag in ('one', 'both'))
    assert len(json.loads(one)) > 4
    assert one == both


def classifier_of(config, **options):
    """A classifier with the backbone of a detector's config."""
    msg = config.MODEL.MSG
    shape = {'embed_dim': msg.EMBED_DIM, 'depths': msg.DEPTHS, 'num_heads': msg.NUM_HEADS}
    return fill_(MSGTransformer(shuffle_size=msg.SHUF_SIZE, num_classes=5, **shape | options))


def test_a_classifiers_weights_start_the_backbone(tiny, tmp_path):
    classifier = classifier_of(tiny())
    save_checkpoint(tmp_path / 'classifier.pth', {'model': classifier.state_dict()})
    config = tiny(MODEL__PRETRAINED=str(tmp_path / 'classifier.pth'), **NO_UPDATES)
    program.main(config)
    weights = last_checkpoint(config)['model']
    for name, value in classifier.state_dict().items():
        if not name.startswith('head.'):
            assert torch.equal(weights[f'backbone.body.{name}'], value), name
    other = classifier_of(config, embed_dim=32)
    with pytest.raises(CheckpointError, match='other.pth holds a different model from the config: shape mismatch'):
        program.load_classifier(build_detector(config), {'model': other.state_dict()}, 'other.pth')


def test_weights_of_other_windows_are_fitted(tiny):
    model = build_detector(tiny())
    window, blocks = model.backbone.body.window_size, sum(len(stage.blocks) for stage in model.backbone.body.layers)
    classifier = classifier_of(tiny(), img_size=384, window_size=12).state_dict()
    notes = program.load_classifier(model, {'model': classifier}, 'classifier.pth')
    expected = [f'position bias of {blocks} block(s) interpolated from windows of 12 x 12 to {window} x {window}']
    assert notes == expected
    wide = build_detector(tiny(MODEL__MSG__WINDOW_SIZE='12'))
    weights, notes = model.fit_state_dict(wide.state_dict())
    assert notes == expected
    model.load_state_dict(weights)


def test_a_detectors_weights_start_a_new_run(finished, tiny):
    path = folder_of(finished) / 'ckpt_epoch_1.pth'
    config = tiny(MODEL__PRETRAINED=str(path), SEED='5', **NO_UPDATES)
    program.main(config)
    weights, (pretrained, _) = last_checkpoint(config)['model'], choose_weights(load_checkpoint(path), path)
    for name, value in pretrained.items():
        assert name.endswith(RUNNING_STATISTICS) or torch.equal(weights[name], value), name


def test_a_detector_of_other_classes_starts_a_new_run_with_new_last_layers(tiny, tmp_path, capsys):
    pretrained = build_detector(tiny(MODEL__NUM_CLASSES='7')).state_dict()
    save_checkpoint(tmp_path / 'seven.pth', {'model': pretrained})
    config = tiny(MODEL__PRETRAINED=str(tmp_path / 'seven.pth'), **NO_UPDATES)
    program.main(config)
    weights = last_checkpoint(config)['model']
    changed = {name for name, value in pretrained.items() if value.shape != weights[name].shape}
    assert {name.split('.')[-2] for name in changed} == {'logits', 'box_deltas', 'mask_fcn_logits'}
    for name in pretrained.keys() - changed:
        assert name.endswith(RUNNING_STATISTICS) or torch.equal(weights[name], pretrained[name]), name
    assert 'seven.pth has other classes' in capsys.readouterr().out


@pytest.mark.parametrize('choice', ['auto', 'keep'])
def test_a_detector_of_as_many_classes_of_other_names(tiny, tmp_path, capsys, choice):
    pretrained = build_detector(tiny()).state_dict()
    save_checkpoint(tmp_path / 'pets.pth', {'model': pretrained, 'classes': ['cat', 'dog', 'fox']})
    config = tiny(MODEL__PRETRAINED=str(tmp_path / 'pets.pth'), MODEL__PRETRAINED_HEAD=choice, SEED='5', **NO_UPDATES)
    program.main(config)
    weights = last_checkpoint(config)['model']
    kept = {name: torch.equal(weights[name], x) for name, x in pretrained.items() if re.match(Detector.HEAD, name)}
    assert all(kept.values()) == (choice == 'keep')
    assert ('pets.pth has other classes: the head starts from' in capsys.readouterr().out) == (choice == 'auto')


def test_help_offers_the_precisions_that_detection_has(capsys):
    with pytest.raises(SystemExit):
        program.parse_option(['--help'])
    text = capsys.readouterr().out
    assert '--amp-opt-level {O0,O1}' in text
    assert 'O2' not in text
    with pytest.raises(ConfigError, match='AMP_OPT_LEVEL'):
        tiny_detector('AMP_OPT_LEVEL', 'O2')


def test_mistakes_are_reported_in_one_line(tmp_path):
    flags = ['-m', 'detection.main', '--cfg', TINY_DETECTOR, '--output', tmp_path / 'output']
    assert 'MODEL.BOX.IOU does not exist' in error_line(*flags, '--opts', 'MODEL.BOX.IOU', '3')
    assert 'nowhere' in error_line(*flags, '--data-path', tmp_path / 'nowhere')


def test_mistakes_name_the_thing_and_the_remedy(tiny, tmp_path, coco):
    with pytest.raises(DataError, match='has 3 categories, but MODEL.NUM_CLASSES is 80'):
        program.main(tiny(MODEL__NUM_CLASSES='80'))
    with pytest.raises(DataError, match='write a smaller --batch-size'):
        program.main(tiny(DATA__BATCH_SIZE='7'))
    save_checkpoint(tmp_path / 'four.pth', {'model': build_detector(tiny(MODEL__NUM_CLASSES='4')).state_dict()})
    with pytest.raises(CheckpointError, match='four.pth holds a different model from the config: shape mismatch: roi_'):
        program.main(tiny(EVAL_MODE='True', MODEL__RESUME=str(tmp_path / 'four.pth')))
    (tmp_path / 'file').write_text('')
    with pytest.raises(OutputError, match='write another --output'):
        program.main(tiny(OUTPUT=str(tmp_path / 'file')))
    (coco / 'train' / '3.png').write_bytes(b'no image')
    with pytest.raises(DataError, match='train/3.png cannot be read'):
        program.main(tiny(TAG='damaged'))


def test_images_without_objects_are_trained_on_and_evaluated(tiny, coco):
    for split in ('train', 'val'):
        tree = read_tree(coco, split)
        kept = {image['id'] for image in tree['images'][2:]}
        update_tree(coco, split, annotations=[x for x in tree['annotations'] if x['image_id'] in kept])
    config = tiny(DATA__BATCH_SIZE='1', **ONE_EPOCH)
    program.main(config)
    assert len(records(config, 'train')) >= 4


def test_every_key_is_read(finished, tiny):
    reads = set()

    def run(**options):
        config = RecordingNode(tiny(**options), '', reads)
        program.main(config)
        return config

    checkpoint = str(folder_of(finished) / 'ckpt_epoch_0.pth')
    run(TAG='adamw', MODEL__PRETRAINED=checkpoint, **ONE_EPOCH)
    run(TAG='adamw', **ONE_EPOCH)
    run(TAG='sgd', TRAIN__OPTIMIZER__NAME='sgd', INPUT__CROP_PROB='1.0', **ONE_EPOCH)
    timm = {'MODEL__BACKBONE': 'timm:resnet18', 'MODEL__TIMM_ARGS': 'channels=(8,8,8,8)'}
    timm |= {'INPUT__SCALE_JITTER': '[0.5,2.0]'}
    run(TAG='timm', TRAIN__OPTIMIZER__NAME='lamb', **timm, **ONE_EPOCH)
    config = run(EVAL_MODE='True', MODEL__RESUME=checkpoint, SHOW='1')
    assert set(config.leaves()) - reads == {'BASE'}  # which `load_config` reads
