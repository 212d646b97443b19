"""Replays: what a run has recorded is recomputed to the bit, and faults are found and named."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml

import main as program
from config import load_config
from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.distributed import Process
from engine.trainer import Trainer
from tests.helpers import virtual_ranks as runs
from tests.helpers.detectors import tiny_detector
from tests.helpers.images import write_images
from tests.helpers.paths import TINY
from tests.helpers.processes import TORCHRUN, run_here, start
from tests.helpers.runs import folder_of, one_thread
from tools.differences import compare_records, differing_entries, entries, is_identical
from tools.replay import START, Point, ReplayError, Stretch, find_reasons, find_stretches, recompute

# Six updates an epoch; random numbers in the loader and in the network
OPTIONS = {'HASH_FREQ': 1, 'SAVE_STEPS': 4, 'SAVE_KEEP': 0, 'TRACKER': 'none', 'MODEL.DROP_PATH_RATE': 0.3}
ONE_EPOCH = {'TRAIN.EPOCHS': 1, 'TRAIN.WARMUP_EPOCHS': 0}


def train(folder, tag, **options):
    """Train on the images of a folder; returns the run's folder."""
    options = {'DATA.DATA_PATH': str(folder / 'images'), 'OUTPUT': str(folder / 'output'), 'TAG': tag} | options
    config = load_config(TINY, [x for pair in (OPTIONS | options).items() for x in pair])
    with one_thread():
        program.main(config)
    return folder_of(config).resolve()


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """The folder of a run of two epochs, whose parent's parent's parent has the images."""
    folder = tmp_path_factory.mktemp('replay')
    write_images(folder / 'images')
    return train(folder, 'run')


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run, to plant faults in."""
    return shutil.copytree(run, tmp_path / 'copy')


def replay(folder, *arguments):
    return run_here('-m', 'tools.replay', folder, *arguments)


def result(done):
    """The lines on standard output, without the summary; the log is on standard error."""
    *lines, summary = done.stdout.splitlines()
    assert summary.endswith(' stretches are equal to the bit')
    return lines


def error_of(*arguments):
    """The line in which a replay reports a mistake, after those of the log."""
    done = run_here('-m', 'tools.replay', *arguments)
    assert (done.returncode, done.stdout) == (1, '')
    assert 'Traceback' not in done.stderr
    return done.stderr.splitlines()[-1]


def edit(path, change):
    """Change a checkpoint in place; its checksums are right afterwards."""
    checkpoint = load_checkpoint(path)
    change(checkpoint)
    save_checkpoint(path, checkpoint)


def flip(tensor, index, bit):
    """Flip a bit of an element of an fp32 tensor."""
    tensor.view(torch.int32).view(-1)[index] ^= 1 << bit


def test_a_clean_run_is_equal_to_the_bit(run):
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.rglob('*') if path.is_file()}
    done = replay(run)
    assert done.returncode == 0, done.stdout + done.stderr
    names = ['start of the run', *(f'ckpt_epoch_{name}.pth' for name in ('0_step_4', '0', '1_step_4', '1'))]
    lines = result(done)
    assert [line.partition(': ')[0] for line in lines] == [f'{a} to {b}' for a, b in pairwise(names)]
    assert all(': equal to the bit (' in line for line in lines)
    assert '4 logged updates, 4 hashes, 0 epochs' in lines[0]
    assert '2 logged updates, 2 hashes, 1 epochs' in lines[1]
    assert done.stdout.splitlines()[-1] == '4 of 4 stretches are equal to the bit'
    assert 'warning' not in done.stderr
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.rglob('*') if path.is_file()}


def test_a_flipped_bit_in_the_weights_is_named(copy):
    end = copy / 'ckpt_epoch_1.pth'
    edit(end, lambda checkpoint: flip(checkpoint['model']['head.weight'], 5, 3))
    done = replay(copy, '--from', 'ckpt_epoch_1_step_4.pth')
    assert done.returncode == 3
    lines = result(done)
    assert lines[0] == 'ckpt_epoch_1_step_4.pth to ckpt_epoch_1.pth: NOT equal'
    assert lines[1].strip() == 'all records are equal: 2 logged updates, 2 hashes, 1 epochs'
    assert 'first entry of ckpt_epoch_1.pth that differs: model.head.weight: element [0, 5]: recorded' in lines[2]
    assert '(1 bit(s)); 1 of 48 element(s) differ' in lines[2]
    assert lines[3].strip().startswith('1 of ')


def test_a_flipped_bit_in_the_optimizer_is_named(copy):
    edit(copy / 'ckpt_epoch_0.pth', lambda checkpoint: flip(checkpoint['optimizer']['state'][3]['exp_avg_sq'], 0, 30))
    done = replay(copy, '--from', 'ckpt_epoch_0_step_4.pth', '--to', 'ckpt_epoch_1_step_4.pth')
    assert done.returncode == 3
    first, second = '\n'.join(result(done)).split('ckpt_epoch_0.pth to ckpt_epoch_1_step_4.pth')
    assert 'ckpt_epoch_0_step_4.pth to ckpt_epoch_0.pth: NOT equal' in first
    assert 'first entry of ckpt_epoch_0.pth that differs: optimizer.state.3.exp_avg_sq: element [0' in first
    assert 'all records are equal' in first
    # The next stretch starts from the wrong state, so that its first update already gives other weights
    assert 'first record that deviates: epoch 1, update 0: weights_hash recorded' in second


def test_a_changed_record_is_named(copy):
    path = copy / 'metrics.jsonl'
    records = [json.loads(line) for line in path.read_text().splitlines()]
    changed = next(x for x in records if (x['kind'], x['epoch'], x.get('step')) == ('train', 1, 5))
    changed['loss'] *= 1 + 2**-50
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))
    done = replay(copy, '--from', 'ckpt_epoch_1_step_4.pth')
    assert done.returncode == 3
    lines = result(done)
    assert f'first record that deviates: epoch 1, update 5: loss recorded {changed["loss"]!r}, recomputed' in lines[1]
    assert lines[1].endswith('; the record before it, of epoch 1, update 4, is equal')
    assert lines[2].strip().endswith('entries of ckpt_epoch_1.pth are equal')


def test_a_changed_image_is_found_at_the_update_that_sees_it(run, tmp_path):
    images = shutil.copytree(run.parent.parent.parent / 'images', tmp_path / 'images')
    shutil.copy(images / 'val/class_0/0.png', images / 'train/class_0/0.png')
    order = load_checkpoint(run / 'ckpt_epoch_1_step_4.pth')['sampler']['order'].tolist()
    update = order.index(0) // 4  # the changed image is the first one of the dataset
    first, last = ('0', '1_step_4') if update < 4 else ('1_step_4', '1')
    names = (f'ckpt_epoch_{name}.pth' for name in (first, last))
    done = replay(run, '--from', next(names), '--to', next(names), '--data-path', images)
    assert done.returncode == 3
    lines = result(done)
    assert f'first record that deviates: epoch 1, update {update}: loss recorded' in lines[1]


def test_a_silent_corruption_during_training_is_found_at_its_update(run, monkeypatch):
    train_step = Trainer.train_step

    def corrupted(trainer, *arguments):
        update = train_step(trainer, *arguments)
        if (trainer.state.epoch, trainer.state.step) == (0, 3):  # the third update has been made
            flip(trainer.state.model.head.weight.data, 7, 0)
        return update

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, 'train_step', corrupted)
        folder = train(run.parent.parent.parent, 'corrupted', **ONE_EPOCH)
    done = replay(folder, '--to', 'ckpt_epoch_0_step_4.pth')
    assert done.returncode == 3
    line = result(done)[1]
    assert 'first record that deviates: epoch 0, update 2: weights_hash recorded' in line
    assert line.endswith('; the record before it, of epoch 0, update 2, is equal')  # of the loss


def test_pretrained_runs_are_replayed_from_their_start(run, tmp_path):
    weights = shutil.copy(run / 'ckpt_epoch_0.pth', tmp_path / 'weights.pth')
    # A name and a tag that lead out of the output folder
    options = {'MODEL.PRETRAINED': str(weights), 'MODEL.NAME': '../other', **ONE_EPOCH}
    folder = train(run.parent.parent.parent, '../pretrained', **options)
    assert replay(folder, '--to', 'ckpt_epoch_0_step_4.pth').returncode == 0
    weights.unlink()
    line = error_of(folder, '--to', 'ckpt_epoch_0_step_4.pth')
    assert line.startswith(f'error: the run started from {weights}, which is not there any more or has changed')


def test_stretches(run, copy):
    def names(*arguments):
        return [str(stretch) for stretch in find_stretches(*arguments)]

    assert names(run, str(run / 'ckpt_epoch_0.pth'), 'ckpt_epoch_1_step_4.pth') == [
        'ckpt_epoch_0.pth to ckpt_epoch_1_step_4.pth'
    ]
    for path in copy.glob('ckpt_epoch_0*'):
        path.unlink()
    edit(copy / 'ckpt_epoch_1_step_4.pth', lambda checkpoint: checkpoint['progress'].update(epoch=7))
    edit(copy / 'ckpt_epoch_1.pth', lambda checkpoint: checkpoint['progress'].update(epoch=8))
    assert names(copy) == ['ckpt_epoch_1_step_4.pth to ckpt_epoch_1.pth']  # earlier ones have been removed
    assert names(copy, START)[0] == 'start of the run to ckpt_epoch_1_step_4.pth'
    with pytest.raises(ReplayError, match='there is nothing to recompute in .* write a --from that is earlier'):
        find_stretches(run, 'ckpt_epoch_1.pth', 'ckpt_epoch_0.pth')


@pytest.mark.parametrize(
    ('arguments', 'text'),
    [
        (['{tmp}/nowhere'], 'holds no checkpoints ckpt_epoch_<n>.pth: give the folder of a run'),
        (['{run}/ckpt_epoch_0.pth'], 'holds no checkpoints ckpt_epoch_<n>.pth: give the folder of a run'),
        (['{run}', '--from', 'ckpt_epoch_5.pth'], 'write one of ckpt_epoch_1.pth, ckpt_epoch_1_step_4.pth'),
        (['{run}', '--data-path', '{tmp}/nowhere'], '{tmp}/nowhere/train does not exist'),
        (['{run}', '--data-path', '{tmp}/images', '--from', 'ckpt_epoch_0.pth'], 'train has 23 images, not 24'),
        (['{run}', '--opts', 'HASH_FREQ'], '--opts takes pairs'),
        (
            ['{run}', '--to', 'ckpt_epoch_0_step_4.pth', '--opts', 'DATA.BATCH_SIZE', '8'],
            'training has not reached epoch 0, update 4, where ckpt_epoch_0_step_4.pth was saved',
        ),
        (['{processes}'], 'torchrun --nproc_per_node 2 -m tools.replay {processes}'),
        (['{imports}'], 'the run had --import my_module.py: add it'),
        (['{damaged}'], 'ckpt_epoch_1.pth is not a checkpoint that can be read safely'),
    ],
)
def test_mistakes_are_reported_in_one_line(run, tmp_path, arguments, text):
    paths = {'tmp': tmp_path, 'run': run}
    for name in ('processes', 'imports', 'damaged'):
        if arguments[0] == f'{{{name}}}':
            paths[name] = shutil.copytree(run, tmp_path / name)
    if 'processes' in paths:
        edit(paths['processes'] / 'ckpt_epoch_0_step_4.pth', lambda x: x['environment'].update(world_size='2'))
    if 'imports' in paths:
        edit(paths['imports'] / 'ckpt_epoch_1.pth', lambda x: x['config'].update(IMPORT=['my_module.py']))
    if 'damaged' in paths:
        (paths['damaged'] / 'ckpt_epoch_1.pth').write_bytes(b'no checkpoint')
    if 'images, not' in text:
        shutil.copytree(run.parent.parent.parent / 'images', tmp_path / 'images')
        (tmp_path / 'images/train/class_0/0.png').unlink()
    line = error_of(*(argument.format(**paths) for argument in arguments))
    assert line.startswith('error: ')
    assert text.format(**paths) in line


@pytest.mark.parametrize(
    ('opts', 'reason'),
    [
        (['TRAIN.EPOCHS', 1], 'TRAIN.EPOCHS has changed from 2 to 1, so training ends earlier: leave TRAIN.EPOCHS'),
        (['TRAIN.PATIENCE', 1], 'TRAIN.PATIENCE has changed from 0 to 1, so training ends earlier: leave TRAIN.P'),
        (['TRAIN.EPOCHS', 4], 'with these data and settings, an epoch has another number of updates'),
    ],
)
def test_settings_that_end_training_early_are_named(opts, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(program, 'main', lambda config, until: None)  # it comes by no end
    before, now = (
        load_config(TINY, ['OUTPUT', str(tmp_path), *('TRAIN.EPOCHS', 2, 'TRAIN.WARMUP_EPOCHS', 0), *more])
        for more in ([], opts)
    )
    stretch = Stretch(Point((0, 0), None), Point((1, 4), tmp_path / 'ckpt_epoch_1_step_4.pth'))
    with pytest.raises(ReplayError, match=f'where ckpt_epoch_1_step_4.pth was saved: {reason}'):
        recompute(stretch, {'task': 'classification', 'config': yaml.safe_load(before.dump())}, now)


def test_losses_of_the_evaluation_are_a_reason(monkeypatch):
    before, now = tiny_detector(), tiny_detector('TEST.LOSS', 'True')
    checkpoint = {'task': 'detection', 'config': yaml.safe_load(before.dump())}
    monkeypatch.setattr('tools.replay.peek_checkpoint', lambda path: checkpoint)
    stretch = Stretch(Point((0, 0), None), Point((1, 0), Path('ckpt_epoch_0.pth')))
    process = Process(0, 1, torch.device('cpu'))
    reasons = [*find_reasons(stretch, checkpoint, now, process)]
    assert reasons[1:] == ['TEST.LOSS has changed from False to True']
    assert [*find_reasons(stretch, checkpoint, before, process)] == reasons[:1]  # no recorded environment


def test_another_environment_is_warned_about(copy):
    edit(copy / 'ckpt_epoch_1.pth', lambda checkpoint: checkpoint['environment'].update(torch='1.0', threads='3'))
    done = replay(copy, '--from', 'ckpt_epoch_1_step_4.pth', '--opts', 'TRAIN.CLIP_GRAD', '1')
    label = 'warning: bits may differ, since'
    lines = done.stderr.splitlines()
    assert sum(line.startswith(label) for line in lines) == 3
    assert f"{label} torch was '1.0' and is '{torch.__version__}'" in lines
    assert f"{label} threads was '3' and is '1'" in lines
    assert f'{label} TRAIN.CLIP_GRAD has changed from 5.0 to 1.0' in lines
    assert done.returncode == 3
    assert result(done)[-1].startswith("    possible reasons: torch was '1.0'")


@pytest.mark.parametrize(
    ('one', 'other'),
    [
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (torch.zeros(2), torch.zeros(2, 1)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float16)),
        (0.0, -0.0),
        (1, 1.0),
        ([1, 2], [1, 3]),
    ],
)
def test_entries_that_differ(one, other):
    assert not is_identical(one, other)
    assert len(differing_entries({'x': one}, {'x': other})) == 1


def test_entries_of_a_checkpoint():
    nan = torch.tensor(float('nan'))
    checkpoint = {'model': {'a': nan}, 'ranks': [{'sums': nan}], 'python': (3, (1, 2), None), 'scores': [1.0, 2.0]}
    flat = dict(entries(checkpoint))
    assert list(flat) == ['model.a', 'ranks.0.sums', 'python.0', 'python.1', 'python.2', 'scores']
    assert differing_entries(flat, flat) == []
    assert differing_entries(flat, flat | {'b': 1, 'model.a': nan + 0, 'scores': [1.0]}) == [
        'scores: recorded [1.0, 2.0], recomputed [1.0]',
        'b: only recomputed',
    ]


def test_records_are_compared_within_the_stretch():
    def records(**changes):
        found = [
            {'kind': kind, 'epoch': epoch, 'step': step, 'loss': 0.5 + step, 'data_s': 1.0}
            for epoch in (0, 1)
            for step in (0, 1)
            for kind in ('hash', 'train')
        ]
        found.append({'kind': 'epoch', 'epoch': 0, 'train_loss': 1.0, 'acc1': 50.0, 'seconds': 1.0})
        return [x | changes if x['epoch'] == 0 and x.get('step', 1) == 1 else x for x in found]

    def first(start, end, same=True, **changes):
        return compare_records(records(), records(**changes), start, end, same).first

    assert compare_records(records(), records(seconds=2.0, data_s=2.0), (0, 1), (1, 1)) == (
        {'train': 2, 'hash': 2, 'epoch': 1},
        '',
        0,
    )
    assert first((0, 0), (1, 0), loss=9.0).startswith(
        'epoch 0, update 1: loss recorded 1.5, recomputed 9.0; the record before it'
    )
    assert first((1, 0), (2, 0), loss=9.0) == ''
    assert first((0, 0), (0, 1), loss=9.0) == ''
    assert first((0, 2), (1, 0), acc1=9.0) == 'epoch 0: acc1 recorded 50.0, recomputed 9.0'
    assert first((0, 2), (0, 3), acc1=9.0) == ''  # the epoch has not ended
    assert first((0, 2), (1, 0), False, acc1=9.0) == ''
    assert first((0, 2), (1, 0), False, train_loss=9.0).startswith('epoch 0: train_loss')
    assert compare_records(records()[:-1], records(), (0, 0), (1, 0)).unmatched == 1


@pytest.mark.slow
def test_virtual_ranks_are_replayed_on_another_number_of_processes(tmp_path):
    """Trained on two processes; replayed on two, which takes several runs of one process group, and on one."""
    images = write_images(tmp_path / 'images')
    options = OPTIONS | {'TRAIN.VIRTUAL_RANKS': 4, 'DATA.BATCH_SIZE': 2, 'SAVE_STEPS': 2}
    flags = ['--cfg', TINY, '--data-path', images, '--output', tmp_path / 'output', '--opts']
    done = start(*TORCHRUN, 2, 'main.py', *flags, *(x for pair in options.items() for x in pair))
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / 'output' / 'tiny' / 'default'
    on_two = start(*TORCHRUN, 2, '-m', 'tools.replay', folder, '--to', 'ckpt_epoch_0.pth')
    on_one = replay(folder)
    for done in (on_two, on_one):
        assert done.returncode == 0, done.stdout + done.stderr
        assert all(': equal to the bit (' in line for line in result(done))
    assert 'max_accuracy' in load_checkpoint(folder / 'ckpt_epoch_0.pth')
    edit(folder / 'ckpt_epoch_1.pth', lambda checkpoint: flip(checkpoint['model']['head.weight'], 0, 0))
    assert replay(folder, '--from', 'ckpt_epoch_1_step_2.pth').returncode == 3


@pytest.mark.slow
def test_detectors_are_replayed(tmp_path):
    from tests.helpers.coco_data import write_coco

    coco = write_coco(tmp_path / 'coco', train=12)
    program, config = runs.load('detector', '', coco, OUTPUT=str(tmp_path / 'output'), TAG='run', HASH_FREQ='1')
    with one_thread():
        program.main(config)
    folder = tmp_path / 'output' / 'detector' / 'run'
    done = replay(folder, '--from', 'ckpt_epoch_1_step_1.pth')
    assert done.returncode == 0, done.stdout + done.stderr
    edit(folder / 'ckpt_epoch_1.pth', lambda checkpoint: checkpoint['scores'].update(raw=1.0))
    assert replay(folder, '--from', 'ckpt_epoch_1_step_2.pth').returncode == 3
