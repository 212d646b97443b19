"""The job of detection: what a run leaves, where it can be continued from, several processes, mistakes."""

import json
import re

import pytest
import torch
from PIL import Image

import detection.main as program
from checkpoint import load_checkpoint
from config_tree import ConfigError
from data import DataError
from detection.config import load_config
from detection.models import build_detector
from detection.schedule import build_scheduler
from models import MSGTransformer
from tests.conftest import one_thread
from tests.helpers.coco import CATEGORIES, read_tree, write_coco, write_tree
from tests.test_command_line import start
from tests.test_detection_models import TINY_DETECTOR
from tests.test_resume import differences, last
from tests.test_training import RecordingNode, folder_of, records
from timing import Spread

TORCHRUN = ['-m', 'torch.distributed.run', '--nproc_per_node', '2', '--standalone']
PARTS = {f'loss_{part}_{i}' for part in ('classifier', 'box', 'mask') for i in range(3)}
PARTS |= {'loss_objectness', 'loss_rpn_box_reg'}


@pytest.fixture
def coco(tmp_path):
    return write_coco(tmp_path / 'coco')


@pytest.fixture
def tiny(tmp_path, coco):
    """A function of options that gives the config of a tiny detector on that data."""

    def load(**options):
        opts = ['OUTPUT', str(tmp_path / 'output'), 'DATA.DATA_PATH', str(coco)]
        for key, value in options.items():
            opts += [key.replace('__', '.'), value]
        return load_config(TINY_DETECTOR, opts)

    with one_thread():
        yield load


def test_a_run_leaves_what_the_house_promises(tiny, capsys):
    config = tiny(SAVE_KEEP='1')
    program.main(config)
    folder = folder_of(config)
    left = {path.name for path in folder.iterdir()}
    assert {'config.yaml', 'log_rank0.txt', 'metrics.jsonl', 'ckpt_epoch_1.pth', 'tensorboard'} <= left
    assert load_config(folder / 'config.yaml') == config
    steps = records(config, 'train')
    assert [(step['epoch'], step['step']) for step in steps] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    for step in steps:
        assert step.keys() >= PARTS
        assert sum(step[part] for part in PARTS) == pytest.approx(step['loss'], rel=1e-5)
    figures = ('AP', 'AP50', 'AP75', 'APs', 'APm', 'APl')
    for epoch in records(config, 'epoch'):
        assert epoch.keys() >= {f'{kind}_{figure}' for kind in ('box', 'mask') for figure in figures}
    checkpoint = load_checkpoint(folder / 'ckpt_epoch_1.pth')
    assert checkpoint['classes'] == [category['name'] for category in CATEGORIES]
    said = capsys.readouterr().out
    assert '| box |' in said
    assert '| mask |' in said
    assert 'Max box AP: ' in said


def test_learning_rates_are_the_recipes(tiny):
    config = tiny(TRAIN__EPOCHS='4', TRAIN__WARMUP_STEPS='5', TRAIN__LR_SCHEDULER__DECAY_EPOCHS='[2, 3]')
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_scheduler(config, optimizer, steps_per_epoch=10)
    rates = []
    for update in range(40):
        if update:  # as `TrainingState` does before update k
            scheduler.step_update(update - 1)
        rates.append(optimizer.param_groups[0]['lr'])
    ramp = [0.001 + 0.999 * update / 5 for update in range(5)]
    assert rates == pytest.approx(ramp + [1.0] * 15 + [0.1] * 10 + [0.01] * 10)


def test_the_learning_rate_is_for_16_images_and_a_continued_run_keeps_it(tiny):
    program.main(tiny(TRAIN__WARMUP_STEPS='0', TRAIN__LR_SCHEDULER__DECAY_EPOCHS='[5]'))
    assert {record['lr'] for record in records(tiny(), 'train')} == {0.01 * 2 / 16}


@pytest.mark.parametrize(
    'options', [{}, {'AMP_OPT_LEVEL': 'O1', 'AMP_DTYPE': 'bfloat16', 'TRAIN__ACCUMULATION_STEPS': '2'}]
)
def test_a_continued_run_ends_with_the_same_bits(tiny, options):
    options = {'TRAIN__EMA_DECAY': '0.9', 'MODEL__DROP_PATH_RATE': '0.3', **options}
    whole = tiny(TAG='whole', SAVE_STEPS='1', **options)
    program.main(whole)
    for name in ('ckpt_epoch_0_step_1.pth', 'ckpt_epoch_0.pth', 'ckpt_epoch_1_step_1.pth'):
        config = tiny(TAG=name, MODEL__RESUME=str(folder_of(whole) / name), DATA__NUM_WORKERS='1', **options)
        program.main(config)
        assert differences(last(whole), last(config)) == [], name
        assert 'bit for bit as if it had not stopped' in (folder_of(config) / 'log_rank0.txt').read_text()
    other = tiny(TAG='other', MODEL__RESUME=str(folder_of(whole) / 'ckpt_epoch_0.pth'), SEED='3', **options)
    program.main(other)
    assert 'not bit for bit: SEED has changed' in (folder_of(other) / 'log_rank0.txt').read_text()


def test_evaluation_prints_the_table_writes_results_and_draws(tiny, coco, capsys):
    config = tiny(MODEL__BOX__SCORE='0.0', TRAIN__EMA_DECAY='0.5')
    program.main(config)
    path = str(folder_of(config) / 'ckpt_epoch_1.pth')
    options = {'EVAL_MODE': 'True', 'MODEL__RESUME': path, 'MODEL__BOX__SCORE': '0.0', 'SHOW_SCORE': '0.0'}
    again = tiny(TAG='eval', SHOW='3', **options)
    program.main(again)
    folder = folder_of(again)
    results = json.loads((folder / 'results.json').read_text())
    images = {image['id']: image for image in read_tree(coco, 'val')['images']}
    assert {result['image_id'] for result in results} == images.keys()
    assert {result['category_id'] for result in results} <= {3, 7, 90}
    assert (folder / 'results_average.json').exists()
    assert {path.name for path in (folder / 'show').iterdir()} == {'5.png', '15.png', '25.png'}
    with Image.open(folder / 'show' / '5.png') as picture:
        assert picture.width * images[5]['height'] == picture.height * images[5]['width']
    # The same figures as those of the last epoch
    row = re.search(r'\| box \| ([\d.]+) \| ([\d.]+)', (folder / 'log_rank0.txt').read_text())
    told = records(config, 'epoch')[-1]
    assert row.groups() == (f'{told["box_AP"]:.2f}', f'{told["box_AP50"]:.2f}')
    # Whatever the batch of training, and the names of the classes
    tree = read_tree(coco, 'val')
    write_tree(coco, 'val', tree | {'categories': [tree['categories'][0] | {'name': 'crate'}, *tree['categories'][1:]]})
    other = tiny(TAG='other', DATA__BATCH_SIZE='3', **options)
    program.main(other)
    assert (folder_of(other) / 'results.json').read_bytes() == (folder / 'results.json').read_bytes()
    assert '1 of the 3 classes are not those of the checkpoint (crate for box)' in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes(tiny, tmp_path, coco):
    """Training keeps the same statistics on both, is continued to the bit, and evaluates as one process does."""
    flags = ['-m', 'detection.main', '--cfg', TINY_DETECTOR, '--data-path', coco, '--output', tmp_path / 'output']
    batch = ['--batch-size', '1', '--opts', 'SAVE_STEPS', '2', 'MODEL.BOX.SCORE', '0.0']
    done = start(*TORCHRUN, *flags, '--tag', 'two', *batch)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('Train: [0/2][0/3]') == 1  # rank 0 alone speaks
    whole = tiny(TAG='two')
    middle = folder_of(whole) / 'ckpt_epoch_1_step_2.pth'
    done = start(*TORCHRUN, *flags, '--tag', 'again', '--resume', middle, *batch)
    assert done.returncode == 0, done.stderr
    assert 'bit for bit as if it had not stopped' in done.stdout
    assert differences(last(whole), last(tiny(TAG='again'))) == []

    path = str(folder_of(whole) / 'ckpt_epoch_1.pth')
    one = tiny(TAG='one', EVAL_MODE='True', MODEL__RESUME=path, MODEL__BOX__SCORE='0.0', DATA__BATCH_SIZE='2')
    program.main(one)
    done = start(*TORCHRUN, *flags, '--tag', 'both', '--eval', '--resume', path, *batch)
    assert done.returncode == 0, done.stderr
    found = [(folder_of(tiny(TAG=tag)) / 'results.json').read_bytes() for tag in ('one', 'both')]
    assert len(json.loads(found[0])) > 4
    assert found[0] == found[1]


def test_a_classifier_starts_a_detector_and_a_detector_another(tiny, tmp_path, capsys):
    msg = tiny().MODEL.MSG
    options = {'embed_dim': msg.EMBED_DIM, 'depths': msg.DEPTHS, 'num_heads': msg.NUM_HEADS}
    classifier = MSGTransformer(**options, shuffle_size=msg.SHUF_SIZE, num_classes=5)
    torch.save({'model': classifier.state_dict()}, tmp_path / 'classifier.pth')
    still = {'TRAIN__BASE_LR': '0.0', 'TRAIN__EPOCHS': '1', 'TRAIN__WEIGHT_DECAY': '0'}
    config = tiny(MODEL__PRETRAINED=str(tmp_path / 'classifier.pth'), **still)
    program.main(config)
    path = folder_of(config) / 'ckpt_epoch_0.pth'
    first = load_checkpoint(path)['model']
    for name, value in classifier.state_dict().items():
        if not name.startswith('head.'):
            assert torch.equal(first[f'backbone.body.{name}'], value), name
    other = tiny(TAG='other', MODEL__PRETRAINED=str(path), SEED='5', **still)
    program.main(other)
    second = load_checkpoint(folder_of(other) / 'ckpt_epoch_0.pth')['model']
    running = ('running_mean', 'running_var', 'num_batches_tracked')
    assert all(torch.equal(second[name], value) for name, value in first.items() if not name.endswith(running))
    more = build_detector(tiny(MODEL__NUM_CLASSES='7')).state_dict()
    torch.save({'model': more}, tmp_path / 'more.pth')
    third = tiny(TAG='third', MODEL__PRETRAINED=str(tmp_path / 'more.pth'), **still)
    program.main(third)
    weights = load_checkpoint(folder_of(third) / 'ckpt_epoch_0.pth')['model']
    assert {re.split(r'[.]', name)[-2] for name, value in more.items() if value.shape != weights[name].shape} == {
        'logits', 'offsets', 'mask_fcn_logits'
    }  # fmt: skip
    taken = {name: value for name, value in more.items() if value.shape == weights[name].shape}
    assert all(torch.equal(weights[name], value) for name, value in taken.items() if not name.endswith(running))
    assert 'more.pth has other classes' in capsys.readouterr().out


def test_benchmark(tiny, capsys, monkeypatch):
    monkeypatch.setattr(program, 'train', lambda *_: pytest.fail('--benchmark trains'))

    def half(task, device):
        assert len(task()) == 1  # image
        return Spread(0.5, 0.4, 0.6)

    monkeypatch.setattr(program, 'alone', half)
    program.main(tiny(BENCHMARK_MODE='True'))
    assert re.search(r'image 102 x 64 throughput 2.00 images/s, \d+ detections', capsys.readouterr().out)


def test_mistakes_are_told_in_one_line(tiny, tmp_path, coco):
    def mistake(*flags):
        done = start('-m', 'detection.main', '--cfg', TINY_DETECTOR, '--output', tmp_path / 'output', *flags)
        assert done.returncode == 1
        (line,) = [line for line in done.stderr.splitlines() if line.strip()]
        return line

    assert 'MODEL.BOX.IOU does not exist' in mistake('--opts', 'MODEL.BOX.IOU', '3')
    assert 'nowhere' in mistake('--data-path', tmp_path / 'nowhere')


def test_mistakes_name_the_thing_and_the_remedy(tiny, tmp_path, coco):
    with pytest.raises(DataError, match='has 3 categories, but MODEL.NUM_CLASSES is 80'):
        program.main(tiny(MODEL__NUM_CLASSES='80'))
    with pytest.raises(DataError, match='write a smaller --batch-size'):
        program.main(tiny(DATA__BATCH_SIZE='7'))
    torch.save({'model': build_detector(tiny(MODEL__NUM_CLASSES='4')).state_dict()}, tmp_path / 'other.pth')
    with pytest.raises(ValueError, match='other.pth is a checkpoint of another model than the config: misshapen roi_'):
        program.main(tiny(EVAL_MODE='True', MODEL__RESUME=str(tmp_path / 'other.pth')))
    (tmp_path / 'file').write_text('')
    with pytest.raises(ConfigError, match='write another --output'):
        program.main(tiny(OUTPUT=str(tmp_path / 'file')))
    (coco / 'train' / '3.png').write_bytes(b'no image')
    with pytest.raises(DataError, match='train/3.png cannot be read'):
        program.main(tiny(TAG='broken'))


def test_images_without_objects_can_be_trained_on_and_evaluated(tiny, coco):
    for split in ('train', 'val'):
        tree = read_tree(coco, split)
        kept = {image['id'] for image in tree['images'][2:]}
        write_tree(coco, split, tree | {'annotations': [a for a in tree['annotations'] if a['image_id'] in kept]})
    program.main(tiny(TRAIN__EPOCHS='1', DATA__BATCH_SIZE='1'))
    assert len(records(tiny(), 'train')) >= 4


def test_every_leaf_of_the_tree_is_read(tiny):
    reads = set()

    def run(**options):
        program.main(node := RecordingNode(tiny(**options), '', reads))
        return node

    run(TAG='adamw', TRAIN__EPOCHS='1')
    run(TAG='sgd', TRAIN__EPOCHS='1', TRAIN__OPTIMIZER__NAME='sgd', INPUT__CROP_PROB='1.0')
    path = str(folder_of(tiny(TAG='adamw')) / 'ckpt_epoch_0.pth')
    tree = run(EVAL_MODE='True', MODEL__RESUME=path, SHOW='1')
    assert set(tree.leaves()) - reads == {'BASE'}  # which `load_config` reads


@torch.no_grad()
def losses_of_shifted(model, loader):
    """The loss of boxes of each stage, a region, on the objects' boxes moved as far as the stage takes them."""
    model.train()
    losses = []
    for stage, part in enumerate((0.15, 0.12, 0.08)):
        heads, total, count = model.roi_heads, 0.0, 0
        for images, targets in loader:
            batch, targets = model.transform(images, targets)
            maps = list(model.backbone(batch.tensors).values())
            objects = [target['boxes'] for target in targets]
            moved = [boxes + part * (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2) for boxes in objects]
            _, offsets = heads.box_heads[stage](heads.box_pool(maps, moved))
            labels, truth = torch.cat([target['labels'] for target in targets]), torch.cat(objects)
            total += len(labels) * heads.box_loss(stage, offsets, labels, torch.cat(moved), truth).item()
            count += len(labels)
        losses.append(total / count)
    return losses


@pytest.mark.slow
def test_a_detector_learns_what_it_is_shown(tmp_path):
    """Every loss falls and what is in the eight images is found."""
    coco = write_coco(tmp_path / 'coco', train=8, val=0)
    write_tree(coco, 'val', read_tree(coco, 'train'))
    (coco / 'val').rmdir()
    (coco / 'val').symlink_to(coco / 'train')
    opts = 'TRAIN.EPOCHS 60 TRAIN.BASE_LR 0.016 TRAIN.WARMUP_STEPS 20 TRAIN.LR_SCHEDULER.DECAY_EPOCHS [45,55] '
    opts += 'TRAIN.WEIGHT_DECAY 0.0 TRAIN.CLIP_GRAD 10.0 MODEL.DROP_PATH_RATE 0.0 INPUT.FLIP 0.0 INPUT.CROP_PROB 0.0 '
    opts += 'INPUT.TRAIN_SHORT [64] MODEL.BOX.SAMPLES 64 TENSORBOARD False SAVE_FREQ 60'
    config = load_config(
        TINY_DETECTOR, ['OUTPUT', str(tmp_path / 'output'), 'DATA.DATA_PATH', str(coco), *opts.split()]
    )
    torch.manual_seed(config.SEED)
    new = build_detector(config)
    program.main(config)
    trained = build_detector(config)
    trained.load_state_dict(last(config)['model'])
    steps = records(config, 'train')
    for part in PARTS:
        if not part.startswith('loss_box'):  # which are of more and more regions, as more match an object
            start_of, end_of = (sum(step[part] for step in some) / 8 for some in (steps[:8], steps[-8:]))
            assert end_of < 0.7 * start_of, (part, start_of, end_of)
    loader, _ = program.build_loaders(config)
    before, after = (losses_of_shifted(model, loader) for model in (new, trained))
    # The last stage takes only regions that are nearly right, which leaves little to learn in so few updates.
    assert after[0] < 0.8 * before[0], (before, after)
    assert after[1] < 0.95 * before[1], (before, after)
    told = records(config, 'epoch')[-1]
    assert min(told['box_AP50'], told['mask_AP50']) >= 50
