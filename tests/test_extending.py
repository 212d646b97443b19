"""docs/extending.md as written: its files are written, and its commands run."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from engine.checkpoint import load_checkpoint
from models import MSGTransformer
from models.exchange import EXCHANGES
from tests.helpers.documents import code_blocks, commands, words
from tests.helpers.extensions import EXAMPLES, PAGE, forgotten_modules, write_examples
from tests.helpers.images import write_images
from tests.helpers.paths import ROOT, TINY
from tests.helpers.processes import error_line, run_here
from tests.helpers.runs import differences
from tools.flops import count_multiply_adds

CONFIG = 'configs/msg_digits_p2_win7_56.yaml'
COMMANDS = [command for command in commands(PAGE) if '~/ideas' in command]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with the page's files, a tiny network in place of that of the digits, and images of ten classes."""
    folder = tmp_path_factory.mktemp('extending')
    write_examples(folder / 'ideas')
    (folder / 'configs').mkdir()
    train = {'EPOCHS': 1, 'WARMUP_EPOCHS': 0, 'BASE_LR': 0.01}
    model, data = {'NAME': Path(CONFIG).stem, 'NUM_CLASSES': 10}, {'BATCH_SIZE': 16}
    tiny = {'BASE': [str(TINY)], 'MODEL': model, 'DATA': data, 'TRAIN': train, 'TRACKER': 'none'}
    (folder / CONFIG).write_text(yaml.safe_dump(tiny))
    write_images(folder / 'output' / 'digits', classes=10, train=4, val=2)
    with forgotten_modules():
        yield folder


def test_exchange_of_readme_mixes_windows():
    (code,) = (block for block in code_blocks((ROOT / 'README.md').read_text(), 'py') if 'register_exchange' in block)
    names = {}
    try:
        exec(code, names)
    finally:
        EXCHANGES.pop('rotate', None)
    msg = torch.randn(2, 3, 4, 8)
    new = names['Rotate'](8, 2)(msg)
    assert torch.equal(new[..., :4], msg[..., :4].roll(1, dims=2))
    assert torch.equal(new[..., 4:], msg[..., 4:])
    assert MSGTransformer(num_classes=3, embed_dim=24, manip_type=names['Rotate'])(torch.randn(1, 3, 56, 56)).shape == (
        1,
        3,
    )


def run(command, folder, *more):
    """Run a command of the page with the files of `folder`."""
    program, *arguments = words(command)
    assert program == 'python'
    is_trained = arguments[0] in ('main.py', '~/ideas/ordinal.py')
    more = [*more, '--output', folder / 'output'] if is_trained else more
    more = ['--output', folder / 'times'] if 'tools.benchmark' in arguments else more
    arguments = [str(folder / x[2:]) if x.startswith('~/') else x for x in arguments]
    arguments = [str(folder / x) if x.startswith('output/') else x for x in arguments]
    if 'tools.summary' not in arguments:  # whose figures are in the page
        arguments = [str(folder / x) if x == CONFIG else x for x in arguments]
    done = run_here(*arguments, *more)
    assert done.returncode == 0, done.stderr
    return done.stdout


def commands_with(text):
    found = [command for command in COMMANDS if text in command]
    assert found, text
    return found


def test_every_example_is_used():
    assert all(any(name in command for command in COMMANDS) for name in EXAMPLES)
    assert len(EXAMPLES) == 10


def test_an_exchange_in_one_file(folder):
    first, summary, train, evaluate, predict, _, stages = commands_with('my_exchange')
    assert first == train
    assert run(summary, folder).startswith(*code_blocks(PAGE, 'text'))
    run(train, folder)
    assert 'Accuracy of the network on the 20 test images' in run(evaluate, folder)
    assert len(run(predict, folder).splitlines()) == 20
    assert 'stage 2' in run(stages, folder)

    (folder / 'configs' / 'mine.yaml').write_text(*code_blocks(PAGE, 'yaml'))
    assert 'tools.benchmark networks' in PAGE
    done = run_here('-m', 'tools.summary', folder / 'configs' / 'mine.yaml')
    assert done.returncode == 0, done.stderr

    options = {'embed_dim': 8, 'depths': [1], 'num_heads': [1], 'shuffle_size': [2]}
    network, plain = (MSGTransformer(28, 2, manip_type=x, **options) for x in (EXCHANGES['gated_mean'], 'none'))
    images = torch.randn(1, 3, 28, 28)
    measured = [count_multiply_adds(lambda model=model: model(images)) for model in (network, plain)]
    assert measured[0] - measured[1] == network.flops() - plain.flops() == 4 * 8 * 8


@pytest.mark.slow
def test_an_exchange_is_exported(folder):
    train, _, _, _, _, export, _ = commands_with('my_exchange')
    run(train, folder)
    run(export, folder)
    assert (folder / 'output' / 'gated.onnx').exists()


def test_a_network_in_one_file(folder):
    (train,) = commands_with('my_network')
    assert 'Training time' in run(train, folder)
    checkpoint = folder / 'output' / Path(CONFIG).stem / 'convnet' / 'ckpt_best.pth'
    assert load_checkpoint(checkpoint)['model']['0.weight'].shape == (64, 3, 7, 7)  # MODEL.TIMM_ARGS width=64
    (predict,) = commands_with('tools.predict')
    predict = predict.replace('my_exchange', 'my_network').replace('gated', 'convnet')
    assert len(run(predict, folder).splitlines()) == 20

    as_teacher = train.replace('--tag convnet', '--tag teacher').replace('width=64', 'width=32')
    run(as_teacher, folder)
    weights = checkpoint.parents[1] / 'teacher' / 'ckpt_best.pth'
    teacher = f'DISTILL.TEACHER timm:small_convnet DISTILL.TEACHER_WEIGHTS {weights}'
    student = train.replace('--tag convnet', '--tag student')
    run(student.replace('MODEL.TYPE timm:small_convnet MODEL.TIMM_ARGS width=64', teacher), folder)
    assert 'teacher timm:small_convnet' in (checkpoint.parents[1] / 'student' / 'log_rank0.txt').read_text()


@pytest.mark.slow
def test_other_parts_in_one_file_each(folder):
    for name in (
        'my_transform',
        'my_albumentations',
        'my_loss',
        'my_dataset',
        'my_labels',
        'my_tracker',
        'ordinal',
    ):
        (command,) = commands_with(name)
        printed = run(command, folder)
        assert 'Training time' in printed, name
    output = folder / 'output' / Path(CONFIG).stem
    assert load_checkpoint(output / 'focal' / 'ckpt_best.pth')['config']['TRAIN']['FOCAL_GAMMA'] == 1.5
    assert load_checkpoint(output / 'in_memory' / 'ckpt_best.pth')['data']['train']['images'] == 1437
    epoch, accuracy = (output / 'tracked' / 'epochs.csv').read_text().strip().split(',')
    assert (epoch, 0 <= float(accuracy) <= 100) == ('0', True)
    assert ' * mean error ' in printed
    assert ' * mAP ' in (output / 'properties' / 'log_rank0.txt').read_text()


def test_a_run_with_all_parts_resumes_to_the_bit(folder, tmp_path):
    parts = ('my_exchange', 'my_transform', 'my_loss', 'my_folder', 'my_tracker')
    imports = [text for name in parts for text in ('--import', folder / 'ideas' / f'{name}.py')]
    options = 'MODEL.MSG.MANIP_TYPE gated_mean AUG.TRANSFORM elastic TRAIN.LOSS focal DATA.DATASET image_folder'
    options += ' TRACKER csv TRAIN.EPOCHS 2 DATA.PIPELINE published DETERMINISTIC True'
    command = ['main.py', '--cfg', folder / CONFIG, '--output', tmp_path, '--data-path', folder / 'output' / 'digits']
    command += ['--opts', *options.split()]
    done = run_here(*command, *imports)
    assert done.returncode == 0, done.stderr
    run_folder = tmp_path / Path(CONFIG).stem / 'default'
    expected = load_checkpoint(run_folder / 'ckpt_epoch_1.pth')
    assert expected['classes'][:2] == ['class_0', 'class_1']
    (run_folder / 'ckpt_epoch_1.pth').unlink()
    shutil.copy(run_folder / 'ckpt_epoch_0.pth', run_folder / 'ckpt_best.pth')
    done = run_here(*command, *imports)
    assert 'the run resumes bit for bit' in done.stdout, done.stderr
    assert not differences(load_checkpoint(run_folder / 'ckpt_epoch_1.pth'), expected)

    line = error_line(*command, *imports[:-2])  # without the tracker's module
    assert f'had --import {folder}/ideas/my_tracker.py, and this command does not: add it to continue the run' in line
    image = folder / 'output' / 'digits' / 'train' / 'class_0' / '0.png'
    image.rename(image.with_name('new.png'))
    assert 'train has as many images, but different ones' in error_line(*command, *imports)
