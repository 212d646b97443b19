"""The program as a user starts it: messages and exit codes, and every way to launch it."""

import os
import subprocess
import sys

import pytest
import torch

from launcher import TORCHRUN_VARIABLES
from models import build_model
from tests.conftest import ROOT, TINY, write_images
from tests.test_data import damage
from tests.test_training import folder_of, records, weights


def environment(**variables):
    """Of a program that is started by a user, and not by a launcher."""
    ours = {key: value for key, value in os.environ.items() if key not in TORCHRUN_VARIABLES}
    return ours | {'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'PYTHONUNBUFFERED': '1'} | variables


def start(*command, timeout=300, variables=None):
    command = [sys.executable, *map(str, command)]
    return subprocess.run(
        command, cwd=ROOT, env=environment(**(variables or {})), capture_output=True, text=True, timeout=timeout
    )


def mistake(tmp_path, *flags, environment=None):
    """What the program says, in one line, of flags or variables that cannot work."""
    done = start('main.py', '--cfg', TINY, '--output', tmp_path / 'output', *flags, variables=environment)
    assert done.returncode not in (0, None)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert 'Traceback' not in done.stderr + done.stdout, done.stderr
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_config_mistakes_are_told_before_any_data_is_opened(tmp_path):
    nowhere = ['--data-path', tmp_path / 'nowhere']
    assert 'TRAIN.EPOCH does not exist: did you mean TRAIN.EPOCHS?' in mistake(
        tmp_path, *nowhere, '--opts', 'TRAIN.EPOCH', '3'
    )
    message = mistake(tmp_path, *nowhere, '--opts', 'MODEL.MSG.EMBED_DIM', '6')
    assert message.startswith('error: MODEL.MSG: embed_dim 6 does not fit')
    assert message.endswith('choose a multiple of 4')
    assert '--eval needs weights' in mistake(tmp_path, *nowhere, '--eval')


@pytest.mark.parametrize('flags', [['--bacth-size', '3'], ['--batch', '3'], ['--amp-opt-level', 'O3'], ['stray']])
def test_mistyped_flags_are_errors(tmp_path, flags):
    done = start('main.py', '--cfg', TINY, '--output', tmp_path, *flags)
    assert done.returncode == 2
    assert 'error: ' in done.stderr.splitlines()[-1]
    assert flags[0] in done.stderr.splitlines()[-1]


def test_data_mistakes(tmp_path):
    root = write_images(tmp_path / 'tree')
    assert 'train does not exist: give --data-path' in mistake(tmp_path, '--data-path', tmp_path / 'nowhere')
    assert 'no data: give --data-path' in mistake(tmp_path)
    assert 'main.py/tiny/default: Not a directory: write another --output' in mistake(tmp_path, '--output', 'main.py')
    assert 'write --opts MODEL.NUM_CLASSES 3' in mistake(
        tmp_path, '--data-path', root, '--opts', 'MODEL.NUM_CLASSES', '5'
    )
    damage(root / 'train' / 'class_0' / '0.png', 'truncated')
    message = mistake(tmp_path, '--data-path', root, '--opts', 'DATA.NUM_WORKERS', '1')
    assert 'train/class_0/0.png cannot be read' in message
    for image in (root / 'val' / 'class_2').iterdir():
        image.unlink()
    assert 'val/class_2 holds no images' in mistake(tmp_path, '--data-path', root)


def test_checkpoint_mistakes(tmp_path, tiny_config):
    root = write_images(tmp_path / 'tree')
    torch.save({'model': build_model(tiny_config(MODEL__NUM_CLASSES='4')).state_dict()}, tmp_path / 'other.pth')
    (tmp_path / 'garbage.pth').write_bytes(b'garbage')
    for flag in ('--eval', '--tag=train'):
        data = ['--data-path', root, flag, '--resume']
        assert 'misshapen head.weight (4, 16) for (3, 16)' in mistake(tmp_path, *data, tmp_path / 'other.pth')
        assert 'garbage.pth is not a checkpoint' in mistake(tmp_path, *data, tmp_path / 'garbage.pth')
        assert 'nowhere.pth does not exist' in mistake(tmp_path, *data, tmp_path / 'nowhere.pth')


def test_help_describes_every_flag():
    done = start('main.py', '--help')
    assert done.returncode == 0
    flags = '--cfg --opts --batch-size --data-path --resume --pretrained --accumulation-steps --use-checkpoint'
    flags += ' --amp-opt-level --device --output --tag --eval --throughput --local_rank --local-rank'
    for flag in flags.split():
        assert flag in done.stdout


# Training without chance or augmentation. SGD, since AdamW blows up the rounding noise that is the gradient of biases
# without effect.
JOINT = 'AUG.MIXUP 0 AUG.CUTMIX 0 MODEL.LABEL_SMOOTHING 0 AUG.AUTO_AUGMENT none AUG.COLOR_JITTER 0 AUG.REPROB 0 '
JOINT += 'AUG.HFLIP 0 AUG.SCALE (1,1) TRAIN.OPTIMIZER.NAME sgd'


def test_two_processes_equal_one_with_the_joint_batch(tmp_path, tiny_config):
    """Also: one image more than divides among the ranks, torchrun and torch.distributed.launch, accumulation."""
    root = write_images(tmp_path / 'tree', val=3)  # 9: shards of 5 and 4, of 3 and 2 batches
    torchrun = ['-m', 'torch.distributed.run', '--nproc_per_node', '2', '--standalone']
    launch = ['-m', 'torch.distributed.launch', '--nproc_per_node', '2', '--standalone']
    runs = {
        'one': ([], ['--batch-size', '8']),
        'torchrun': (torchrun, ['--batch-size', '4']),
        'launch': (launch, ['--batch-size', '2', '--accumulation-steps', '2']),
    }
    for tag, (launcher, flags) in runs.items():
        done = start(
            *launcher, 'main.py', '--cfg', TINY, '--output', tmp_path / 'output', '--tag', tag,
            '--data-path', root, *flags, '--opts', *JOINT.split(),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count('Train: [0/2][0/3]') == 1  # rank 0 alone speaks
        assert 'Train:' not in done.stderr
    one = tiny_config(TAG='one')
    for tag in ('torchrun', 'launch'):
        two = tiny_config(TAG=tag)
        for name, value in weights(one).items():
            torch.testing.assert_close(weights(two)[name], value, rtol=1e-5, atol=1e-5, msg=f'{tag}: {name}')
        for expected, measured in zip(records(one, 'epoch'), records(two, 'epoch'), strict=True):
            assert measured['acc1'] == expected['acc1']  # every image counted once
            assert measured['val_loss'] == pytest.approx(expected['val_loss'], rel=1e-5)
            assert measured['train_loss'] == pytest.approx(expected['train_loss'], rel=1e-4)
        assert (folder_of(two) / 'log_rank1.txt').exists()


def test_evaluation_on_more_processes_than_images(tmp_path, tiny_config):
    """Shards of one image, one image and none."""
    root = write_images(tmp_path / 'tree', classes=2, val=1)
    flags = ['--data-path', root, '--opts', 'MODEL.NUM_CLASSES', '2']
    torch.save({'model': build_model(tiny_config(MODEL__NUM_CLASSES='2')).state_dict()}, tmp_path / 'w.pth')
    told = []
    for launcher in ([], ['-m', 'torch.distributed.run', '--nproc_per_node', '3', '--standalone']):
        done = start(
            *launcher, 'main.py', '--cfg', TINY, '--output', tmp_path, '--eval', '--resume', tmp_path / 'w.pth', *flags
        )
        assert done.returncode == 0, done.stderr
        told.append(
            [line.split('INFO')[1] for line in done.stdout.splitlines() if 'Acc' in line and 'Test' not in line]
        )
    assert told[0] == told[1]
    assert len(told[0]) == 2
