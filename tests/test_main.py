"""The program: evaluation, messages, exit codes, and every launcher."""

import pytest
import torch
from torch import nn

import main as program
from data import Preprocess
from engine.checkpoint import load_checkpoint
from engine.trainer import Trainer
from models import build_model
from tests.helpers.golden import fill_
from tests.helpers.images import damage, write_images
from tests.helpers.paths import TINY
from tests.helpers.processes import TORCHRUN, main_error, run_here, start
from tests.helpers.runs import CPU, as_samples, build_run, folder_of, records, weights
from utils import UserError


def test_eval_evaluates_and_never_trains(tiny_config, image_tree, monkeypatch):
    config = tiny_config(DATA__DATA_PATH=str(image_tree))
    program.main(config)

    def files():
        paths = (path for path in folder_of(config).rglob('*') if path.is_file() and path.name != 'log_rank0.txt')
        return {path: path.read_bytes() for path in paths if path.suffix not in ('.csv', '.png')}  # of the report

    before = files()
    assert not list(folder_of(config).glob('*.csv'))  # training writes no report
    monkeypatch.setattr(Trainer, 'train_step', lambda *_: pytest.fail('--eval trains'))
    results = []
    validate = program.validate
    monkeypatch.setattr(program, 'validate', lambda *args: (results.append(validate(*args)), results[-1])[1])
    last = str(folder_of(config) / 'ckpt_epoch_1.pth')
    program.main(tiny_config(DATA__DATA_PATH=str(image_tree), EVAL_MODE='True', MODEL__RESUME=last))
    program.main(tiny_config(DATA__DATA_PATH=str(image_tree), EVAL_MODE='True', MODEL__PRETRAINED=last))
    recorded = records(config, 'epoch')[-1]
    for result in results:
        assert result.acc1 == recorded['acc1']
        assert result.val_loss == pytest.approx(recorded['val_loss'], rel=1e-6)
    assert len(results) == 2
    assert files() == before


def test_fine_tuning_at_another_size_with_other_windows_and_classes(tiny_config, image_tree, tmp_path, capsys):
    source = fill_(build_model(tiny_config(MODEL__NUM_CLASSES='5')))
    torch.save({'model': source.state_dict(), 'model_ema': source.state_dict()}, tmp_path / 'w.pth')
    options = {'DATA__DATA_PATH': str(image_tree), 'DATA__IMG_SIZE': '64', 'MODEL__MSG__WINDOW_SIZE': '8'}
    config = tiny_config(**options, MODEL__PRETRAINED=str(tmp_path / 'w.pth'), TRAIN__LAYER_DECAY='0.5')
    program.main(config)
    out = capsys.readouterr().out
    assert 'w.pth: position bias of 2 block(s) interpolated from windows of 7 x 7 to 8 x 8' in out
    assert 'w.pth has other classes: the head starts from scratch' in out
    assert records(config, 'epoch')[-1]['lr'] == records(config, 'train')[-1]['lr']
    plain = tiny_config(**options, MODEL__PRETRAINED=str(tmp_path / 'w.pth'), TAG='plain')
    program.main(plain)
    capsys.readouterr()
    assert records(config, 'epoch')[-1]['lr'] == records(plain, 'epoch')[-1]['lr']  # the head's
    last = folder_of(config) / 'ckpt_epoch_1.pth'
    groups = load_checkpoint(last)['optimizer']['param_groups']
    assert sorted({group['lr_scale'] for group in groups}) == [0.125, 0.25, 0.5, 1]
    # A network of the first size evaluates the new weights, raw and EMA.
    ema = {name: x for name, x in load_checkpoint(last).items() if name != 'model_ema'}
    torch.save(ema | {'model_ema': ema['model']}, tmp_path / 'tuned.pth')
    other = {'DATA__DATA_PATH': str(image_tree), 'EVAL_MODE': 'True', 'MODEL__RESUME': str(tmp_path / 'tuned.pth')}
    program.main(tiny_config(**other))
    out = capsys.readouterr().out
    assert 'tuned.pth: position bias of 2 block(s) interpolated from windows of 8 x 8 to 7 x 7' in out
    assert out.count(' * Acc@1') == 2


def test_frozen_stages_keep_their_weights_and_resume(tiny_config, image_tree, tmp_path, capsys):
    source = fill_(build_model(tiny_config())).state_dict()
    torch.save({'model': source}, tmp_path / 'w.pth')
    options = {'DATA__DATA_PATH': str(image_tree), 'TRAIN__FROZEN_STAGES': '1', 'TRAIN__EMA_DECAY': '0.5'}
    options |= {'MODEL__PRETRAINED': str(tmp_path / 'w.pth')}
    program.main(tiny_config(**options))
    program.main(tiny_config(**options, TRAIN__EPOCHS='3'))
    assert 'resuming at epoch 2' in capsys.readouterr().out
    config = tiny_config(**options)
    trained = weights(config, 'ckpt_epoch_2.pth')
    changed = {name for name, value in trained.items() if not torch.equal(value, source[name])}
    frozen = ('patch_embed.', 'msg_tokens', 'layers.0.', 'layers.1.blocks.0.attn.relative_position_bias_table')
    assert {name for name, _ in build_model(config).named_parameters() if not name.startswith(frozen)} == changed
    with pytest.raises(UserError, match='FROZEN_STAGES freezes trained weights: give them with --pretrained'):
        program.main(tiny_config(DATA__DATA_PATH=str(image_tree), TRAIN__FROZEN_STAGES='1', TAG='scratch'))
    with pytest.raises(UserError, match='write its TRAIN.OPTIMIZER, LAYER_DECAY and FROZEN_STAGES'):
        program.main(tiny_config(**options | {'TRAIN__FROZEN_STAGES': '2', 'TRAIN__EPOCHS': '4'}))


@pytest.mark.parametrize('batch_size', ['1', '4', '5', '12', '50'])
def test_evaluation_counts_every_image_once_at_any_batch_size(tiny_config, image_tree, batch_size):
    config = tiny_config(DATA__DATA_PATH=str(image_tree), DATA__BATCH_SIZE=batch_size)
    model = fill_(build_model(config)).eval()
    loader = program.build_eval_loader(config)
    result = program.validate(build_run(config), model, loader)
    with torch.no_grad():
        preprocess = Preprocess(config, CPU)
        logits = torch.cat([model(preprocess(batch)[0]) for batch in loader])
    targets = torch.tensor([0] * 4 + [1] * 4 + [2] * 4)
    assert result.val_loss == pytest.approx(nn.functional.cross_entropy(logits, targets).item(), rel=1e-6)
    assert result.acc1 == pytest.approx(100 * (logits.argmax(1) == targets).double().mean().item())
    assert result.acc5 is None  # of three classes
    assert result.metrics.keys() == {'val_loss', 'acc1'}


def test_top_five_of_many_classes(tiny_config):
    config = tiny_config(MODEL__NUM_CLASSES='10')
    logits = torch.arange(10.0).flip(0).repeat(10, 1)  # class 0 has the largest logit, 9 the smallest
    loader = torch.utils.data.DataLoader(as_samples(logits, torch.arange(10)), batch_size=3)
    result = program.validate(build_run(config), nn.Identity(), loader)
    assert (result.acc1, result.acc5) == (10, 50)


def test_config_errors_come_before_any_data_is_opened(tmp_path):
    """The messages are in test_config; here, that the program ends with them."""
    message = main_error(tmp_path, '--data-path', tmp_path / 'nowhere', '--opts', 'MODEL.MSG.EMBED_DIM', '6')
    assert message.startswith('error: MODEL.MSG: embed_dim 6 does not fit')
    assert message.endswith('choose a multiple of 4')


@pytest.mark.parametrize('flags', [['--bacth-size', '3'], ['--batch', '3'], ['--amp-opt-level', 'O3'], ['stray']])
def test_mistyped_flags_are_errors(flags, capsys):
    with pytest.raises(SystemExit) as error:
        program.parse_option(['--cfg', str(TINY), *flags])
    assert error.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert 'error: ' in message
    assert flags[0] in message


def test_data_errors(tmp_path, tiny_config):
    root = write_images(tmp_path / 'tree')
    for options, message in (
        ({'DATA__DATA_PATH': str(tmp_path / 'nowhere')}, 'train does not exist: give --data-path'),
        ({}, 'no data: give --data-path'),
        ({'OUTPUT': str(TINY)}, 'tiny.yaml/tiny/default: Not a directory: write another --output'),
        ({'DATA__DATA_PATH': str(root), 'MODEL__NUM_CLASSES': '5'}, 'write --opts MODEL.NUM_CLASSES 3'),
    ):
        with pytest.raises(UserError, match=message):
            program.main(tiny_config(**options))
    damage(root / 'train' / 'class_0' / '0.png', 'truncated')
    message = main_error(tmp_path, '--data-path', root, '--opts', 'DATA.NUM_WORKERS', '1', run=start)
    assert 'train/class_0/0.png cannot be read' in message
    for image in (root / 'val' / 'class_2').iterdir():
        image.unlink()
    with pytest.raises(UserError, match='val/class_2 holds no images'):
        program.main(tiny_config(DATA__DATA_PATH=str(root)))


def test_checkpoint_errors(tmp_path, tiny_config, image_tree):
    torch.save({'model': build_model(tiny_config(MODEL__NUM_CLASSES='4')).state_dict()}, tmp_path / 'other.pth')
    (tmp_path / 'garbage.pth').write_bytes(b'garbage')
    messages = {
        'other.pth': r'shape mismatch: head.weight \(4, 16\) for \(3, 16\)',
        'garbage.pth': 'garbage.pth is not a checkpoint',
        'nowhere.pth': 'nowhere.pth does not exist',
    }
    for evaluates in ('True', 'False'):
        for name, message in messages.items():
            options = {'EVAL_MODE': evaluates, 'MODEL__RESUME': str(tmp_path / name)}
            with pytest.raises(UserError, match=message):
                program.main(tiny_config(DATA__DATA_PATH=str(image_tree), **options))
    flags = ['--data-path', image_tree, '--eval', '--resume', tmp_path / 'garbage.pth']
    assert main_error(tmp_path, *flags).startswith(f'error: {tmp_path}/garbage.pth is not a checkpoint')


def test_help_describes_every_flag():
    done = run_here('main.py', '--help')
    assert done.returncode == 0
    flags = '--cfg --opts --batch-size --data-path --resume --pretrained --accumulation-steps --use-checkpoint'
    flags += ' --amp-opt-level --device --output --tag --eval --throughput --local_rank --local-rank'
    for flag in flags.split():
        assert flag in done.stdout


# Training without random augmentation. SGD: AdamW amplifies the rounding noise in gradients of biases without effect.
JOINT = 'AUG.MIXUP 0 AUG.CUTMIX 0 MODEL.LABEL_SMOOTHING 0 AUG.AUTO_AUGMENT none AUG.COLOR_JITTER 0 AUG.REPROB 0 '
JOINT += 'AUG.HFLIP 0 AUG.SCALE (1,1) TRAIN.OPTIMIZER.NAME sgd'


@pytest.mark.parametrize(
    ('launcher', 'flags'),
    [
        ([*TORCHRUN, '2'], ['--batch-size', '2', '--accumulation-steps', '2']),
        pytest.param(
            ['-m', 'torch.distributed.launch', '--nproc_per_node', '2', '--standalone'],
            ['--batch-size', '4'],
            marks=pytest.mark.slow,
        ),
    ],
    ids=['torchrun', 'launch'],
)
def test_two_processes_equal_one_with_the_joint_batch(tmp_path, tiny_config, launcher, flags):
    """With accumulation, and a number of images that the ranks do not divide."""
    root = write_images(tmp_path / 'tree', val=3)  # 9: shards of 5 and 4, of 3 and 2 batches
    for tag, run, batch in (('one', run_here, ['--batch-size', '8']), ('two', start, flags)):
        done = run(
            *(launcher if tag == 'two' else []), 'main.py', '--cfg', TINY, '--output', tmp_path / 'output',
            '--tag', tag, '--data-path', root, *batch, '--opts', *JOINT.split(),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count('Train: [0/2][0/3]') == 1  # on rank 0 only
        assert 'Train:' not in done.stderr
    one, two = tiny_config(TAG='one'), tiny_config(TAG='two')
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(two)[name], value, rtol=1e-5, atol=1e-5, msg=name)
    for expected, measured in zip(records(one, 'epoch'), records(two, 'epoch'), strict=True):
        assert measured['acc1'] == expected['acc1']  # every image counted once
        assert measured['val_loss'] == pytest.approx(expected['val_loss'], rel=1e-5)
        assert measured['train_loss'] == pytest.approx(expected['train_loss'], rel=1e-4)
    assert (folder_of(two) / 'log_rank1.txt').exists()


@pytest.mark.slow
def test_evaluation_on_more_processes_than_images(tmp_path, tiny_config):
    """Shards of one image, one image and none."""
    root = write_images(tmp_path / 'tree', classes=2, val=1)
    flags = ['--data-path', root, '--opts', 'MODEL.NUM_CLASSES', '2']
    torch.save({'model': build_model(tiny_config(MODEL__NUM_CLASSES='2')).state_dict()}, tmp_path / 'w.pth')
    printed, reports = [], []
    for run, launcher in ((run_here, []), (start, [*TORCHRUN, '3'])):
        done = run(
            *launcher, 'main.py', '--cfg', TINY, '--output', tmp_path, '--eval', '--resume', tmp_path / 'w.pth', *flags
        )
        assert done.returncode == 0, done.stderr
        printed.append(
            [line.split('INFO')[1] for line in done.stdout.splitlines() if 'Acc' in line and 'Test' not in line]
        )
        reports.append({path.name: path.read_bytes() for path in (tmp_path / 'tiny' / 'default').glob('*.csv')})
    assert printed[0] == printed[1]
    assert len(printed[0]) == 2
    assert reports[0] == reports[1]
    assert reports[0].keys() == {'predictions.csv', 'classes.csv', 'confusion.csv'}
