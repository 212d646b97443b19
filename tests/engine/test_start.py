"""Where a run starts: what continues the run in a folder, and what is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import torch
import yaml

import detection.config
import main as program
from config import TREE, load_config
from engine.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from engine.config_keys import Key, KeyGroup
from engine.config_tree import ConfigError, ConfigTree
from engine.experiment import ExperimentError, is_pretrained
from engine.trainer import Trainer
from engine.weights import changed_network
from models import build_model
from tests.helpers.detectors import tiny_detector
from tests.helpers.golden import fill_
from tests.helpers.images import write_images
from tests.helpers.paths import ROOT, TINY
from tests.helpers.processes import TORCHRUN, environment, start
from tests.helpers.runs import PLAIN, folder_of, log_of, one_thread, records, weights

NO_WARMUP = {'TRAIN__WARMUP_EPOCHS': '0'}


@pytest.fixture
def options(image_tree):
    return {'DATA__DATA_PATH': str(image_tree), **PLAIN}


def content(folder):
    """Checkpoints and metrics of a run."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name.startswith(('ckpt', 'metrics'))}


def edit(path, **entries):
    """Change entries of a checkpoint; None removes one."""
    changed = load_checkpoint(path) | entries
    save_checkpoint(path, {key: value for key, value in changed.items() if value is not None})


def edit_all(folder, **entries):
    for path in folder.glob('ckpt_*.pth'):
        edit(path, **entries)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'MODEL__MSG__MANIP_TYPE': 'none'}, "MODEL.MSG.MANIP_TYPE has changed from 'shuf' to 'none'"),
        ({'MODEL__MSG__QK_SCALE': '1.0'}, 'MODEL.MSG.QK_SCALE has changed from None to 1.0'),
        ({'MODEL__MSG__EMBED_DIM': '16'}, 'MODEL.MSG.EMBED_DIM has changed from 8 to 16'),
        ({'DATA__IMG_SIZE': '56'}, 'DATA.IMG_SIZE has changed from 28 to 56'),
        ({'MODEL__NUM_CLASSES': '4'}, 'MODEL.NUM_CLASSES has changed from 3 to 4'),
    ],
)
def test_another_network_is_not_continued(tiny_config, options, change, message):
    config = tiny_config(**options)
    program.main(config)
    before = content(folder_of(config))
    with pytest.raises(ExperimentError) as error:
        program.main(tiny_config(**options, **change))
    assert str(error.value) == f'{folder_of(config)} holds another run ({message}): write another --tag'
    assert content(folder_of(config)) == before
    if 'MODEL__MSG__MANIP_TYPE' in change:  # whose weights fit
        newest = str(folder_of(config) / 'ckpt_epoch_1.pth')
        other = tiny_config(**options, **change, TAG='other', TRAIN__EPOCHS='3', MODEL__RESUME=newest)
        program.main(other)
        assert f'other settings than before: {message}; TRAIN.EPOCHS' in log_of(other)


@pytest.fixture
def trained(tiny_config, tmp_path):
    """A function of config options that gives the path of a checkpoint of such a network, untrained."""

    def write(**options):
        config = tiny_config(**options)
        state = {'model': fill_(build_model(config)).state_dict(), 'config': yaml.safe_load(config.dump())}
        torch.save(state, tmp_path / 'trained.pth')
        return str(tmp_path / 'trained.pth')

    return write


SHUFFLED = "MODEL.MSG.MANIP_TYPE has changed from 'none' to 'shuf'"


@pytest.mark.parametrize('mode', ['EVAL_MODE', 'THROUGHPUT_MODE'])
def test_weights_are_not_evaluated_in_another_network(tiny_config, options, trained, mode):
    path = trained(MODEL__MSG__MANIP_TYPE='none')
    with pytest.raises(CheckpointError) as error:
        program.main(tiny_config(**options, **{mode: 'True'}, MODEL__RESUME=path))
    assert str(error.value) == (
        f'the config differs from that of {path} in what the network computes ({SHUFFLED}): '
        f'write --opts MODEL.MSG.MANIP_TYPE none, or give the --cfg of its run. '
        f'To take its weights for the network of this config, write --pretrained instead of --resume'
    )
    path = trained(MODEL__MSG__SHUF_SIZE='[1,1]')
    with pytest.raises(
        CheckpointError, match=r'SHUF_SIZE has changed from \[1, 1\] to \[2, 1\]\): write --opts .*1, 1'
    ):
        program.main(tiny_config(**options, **{mode: 'True'}, MODEL__RESUME=path))


@pytest.mark.parametrize('evaluates', ['True', 'False'])
def test_pretrained_weights_of_another_network_are_a_warning(tiny_config, options, trained, evaluates):
    path = trained(MODEL__MSG__MANIP_TYPE='none', MODEL__DROP_PATH_RATE='0.2')
    config = tiny_config(**options, EVAL_MODE=evaluates, MODEL__PRETRAINED=path, TRAIN__EPOCHS='1', **NO_WARMUP)
    program.main(config)
    [line] = [line for line in log_of(config).splitlines() if 'what the network computes' in line]
    assert line.endswith(
        f'WARNING the config differs from that of {path} in what the network computes: {SHUFFLED}: '
        f'undo with --opts MODEL.MSG.MANIP_TYPE none'
    )


def test_images_of_another_size_are_evaluated_and_other_settings_are_a_warning(tiny_config, options, trained):
    path = trained()
    evaluation = {**options, 'EVAL_MODE': 'True', 'MODEL__RESUME': path}
    program.main(tiny_config(**evaluation, MODEL__DROP_PATH_RATE='0.5', PRINT_FREQ='3'))
    assert 'WARNING' not in log_of(tiny_config())
    program.main(tiny_config(**evaluation, DATA__IMG_SIZE='42', TEST__CROP='False', DATA__INTERPOLATION='bilinear'))
    [line] = [line for line in log_of(tiny_config()).splitlines() if 'WARNING' in line]
    assert 'is evaluated with other settings than its run: DATA.IMG_SIZE has changed from 28 to 42;' in line
    assert line.endswith('undo with --opts DATA.IMG_SIZE 28 DATA.INTERPOLATION bicubic TEST.CROP True')


def test_keys_that_change_what_a_network_computes():
    saved = {'config': {'MODEL': {'TYPE': 'timm:resnet18', 'TIMM_ARGS': 'pretrained=True', 'MSG': {'WINDOW_SIZE': 3}}}}
    saved |= {'task': 'classification'}
    ours = ['MODEL.TYPE', 'timm:resnet18', 'MODEL.MSG.SHUF_SIZE', '[3]', 'MODEL.NUM_CLASSES', '1000']
    config = load_config(TINY, [*ours, 'MODEL.MSG.IN_CHANS', '1', 'DATA.IMG_SIZE', '56'])
    assert [key.name for key in changed_network(config, saved, TREE)] == ['MODEL.MSG.IN_CHANS']
    config = load_config(TINY, [*ours, 'MODEL.TIMM_ARGS', 'layers=(1,1,1,1)'])
    assert [str(key) for key in changed_network(config, saved, TREE)] == [
        "MODEL.TIMM_ARGS has changed from '' to 'layers=(1,1,1,1)'"
    ]
    detector = detection.config.TREE
    config = tiny_detector('MODEL.MASK.ENABLED', 'False', 'MODEL.MSG.SHUF_SIZE', '[1,1,1,1]', 'MODEL.FPN_CHANNELS', '8')
    saved = {'config': yaml.safe_load(tiny_detector('TEST.FLIP', 'True').dump()), 'task': 'detection'}
    changed = [key.name for key in changed_network(config, saved, detector)]
    assert changed == ['MODEL.MSG.SHUF_SIZE', 'MODEL.FPN_CHANNELS']
    classifier = {'MODEL': {'TYPE': 'msg', 'NUM_CLASSES': 9, 'MSG': {'MANIP_TYPE': 'none', 'APE': True}}}
    same = tiny_detector('MODEL.MSG.MANIP_TYPE', 'none')
    classifier['MODEL']['MSG'] |= {k: v for k, v in same.MODEL.MSG.items() if k != 'MANIP_TYPE'}
    saved = {'config': classifier, 'task': 'classification'}
    assert changed_network(same, saved, detector) == []
    assert [key.name for key in changed_network(tiny_detector(), saved, detector)] == ['MODEL.MSG.MANIP_TYPE']
    assert changed_network(same, {'task': 'detection'}, detector) == []


def test_keys_of_what_the_network_sees_count_where_both_have_them():
    root = KeyGroup(BASE=Key([''], 'Base files', affects='nothing'), DATA=KeyGroup(EXIF=Key(False, 'Turn images')))
    root.MODEL = KeyGroup(TYPE=Key('msg', 'Network', affects='network'))
    tree = ConfigTree('classification', root, lambda config: None)
    for saved, is_other in (({'EXIF': True}, True), ({'EXIF': False}, False), ({}, False)):
        checkpoint = {'task': 'classification', 'config': {'DATA': saved, 'MODEL': {'TYPE': 'msg'}}}
        changed = changed_network(tree.defaults(), checkpoint, tree, ['DATA.EXIF', 'DATA.OTHER'])
        assert [key.name for key in changed] == ['DATA.EXIF'] * is_other
        assert changed_network(tree.defaults(), checkpoint, tree) == []


def test_a_checkpoint_of_another_task_is_not_evaluated(tiny_config, options, tmp_path):
    torch.save({'model': {'backbone.x': torch.ones(1)}}, tmp_path / 'detector.pth')
    with pytest.raises(CheckpointError, match='is a checkpoint of detection, and this program is for classification'):
        program.main(tiny_config(**options, EVAL_MODE='True', MODEL__RESUME=str(tmp_path / 'detector.pth')))


def test_new_modules_start_from_scratch_on_request(tiny_config, options, trained):
    path = trained()
    stored = load_checkpoint(path)
    edit(Path(path), model={k: x for k, x in stored['model'].items() if k != 'norm.weight'} | {'new': torch.ones(1)})
    frozen = {'TRAIN__BASE_LR': '0', 'TRAIN__WARMUP_LR': '0', 'TRAIN__MIN_LR': '0'}
    command = {**options, **frozen, 'MODEL__PRETRAINED': path}
    with pytest.raises(
        CheckpointError, match='missing: norm.weight; unexpected: new; --pretrained-missing allow loads'
    ):
        program.main(tiny_config(**command))
    config = tiny_config(**command, MODEL__PRETRAINED_MISSING='allow')
    program.main(config)
    log = log_of(config)
    assert f'WARNING {path}: 1 weights not in the file, kept as initialized: norm.weight' in log
    assert f'WARNING {path}: 1 weights not in the network, left out: new' in log
    assert torch.equal(weights(config)['msg_tokens'], stored['model']['msg_tokens'])
    assert torch.equal(weights(config)['norm.weight'], torch.ones(16))
    with pytest.raises(ConfigError, match='leave out --pretrained-missing'):
        tiny_config(EVAL_MODE='True', MODEL__PRETRAINED=path, MODEL__PRETRAINED_MISSING='allow')


def test_a_key_that_a_stored_config_lacks_had_its_default(tiny_config, options):
    config = tiny_config(**options)
    program.main(config)
    stored = load_checkpoint(folder_of(config) / 'ckpt_epoch_1.pth')['config']
    del stored['MODEL']['MSG']['MANIP_TYPE'], stored['SEED']
    edit_all(folder_of(config), config=stored)
    program.main(config)
    assert log_of(config).count('bit for bit, as if it had never stopped') == 1
    with pytest.raises(ExperimentError, match="MANIP_TYPE has changed from 'shuf' to 'none'"):
        program.main(tiny_config(**options, MODEL__MSG__MANIP_TYPE='none'))
    program.main(tiny_config(**options, SEED='7'))
    assert 'other settings than before: SEED has changed from 0 to 7' in log_of(config)


def test_a_key_whose_default_has_changed_had_its_value_of_before():
    root = KeyGroup(BASE=Key([''], 'Base files', affects='nothing'))
    root.RATE = Key(0.5, 'A rate, which older runs had fixed', before=0.1)
    tree = ConfigTree('classification', root, lambda config: None)
    config = tree.defaults()
    assert [str(key) for key in tree.changed_keys(config, {})] == ['RATE has changed from 0.1 to 0.5']
    config.RATE = 0.1
    assert tree.changed_keys(config, {}) == []
    assert len(tree.changed_keys(config, {'RATE': 0.5})) == 1


def test_a_run_from_before_the_fast_pipeline_had_the_published_one(tiny_config, options):
    published = {**options, 'DATA__PIPELINE': 'published'}
    config = tiny_config(**published)
    program.main(config)
    saved = load_checkpoint(folder_of(config) / 'ckpt_epoch_1.pth')['config']
    del saved['DATA']['PIPELINE']
    edit_all(folder_of(config), config=saved)
    program.main(tiny_config(**published, TRAIN__EPOCHS='3'))
    assert 'PIPELINE has changed' not in log_of(config)
    edit_all(folder_of(config), config=saved)
    program.main(tiny_config(**options, TRAIN__EPOCHS='4'))
    message = (
        "other settings than before: DATA.PIPELINE has changed from 'published' to 'fast'; TRAIN.EPOCHS has changed"
    )
    assert message in log_of(config)
    assert 'undo with --opts DATA.PIPELINE published TRAIN.EPOCHS 2' in log_of(config)


def test_course_of_training_is_a_warning_and_harmless_keys_are_silent(tiny_config, options):
    program.main(tiny_config(**options))
    program.main(tiny_config(**options, PRINT_FREQ='2', DATA__NUM_WORKERS='1', SAVE_KEEP='3', TRACKER='none'))
    assert 'other settings' not in log_of(tiny_config())
    program.main(tiny_config(**{**options, 'AUG__HFLIP': '0.5'}, TRAIN__EPOCHS='3', MODEL__DROP_PATH_RATE='0.2'))
    [line] = [line for line in log_of(tiny_config()).splitlines() if 'other settings' in line]
    assert 'WARNING' in line
    assert [part.partition(' has')[0] for part in line.partition('before: ')[2].split('; ')] == [
        'MODEL.DROP_PATH_RATE', 'TRAIN.EPOCHS', 'AUG.HFLIP',
    ]  # fmt: skip


def test_the_same_samples_elsewhere_and_in_another_format_are_the_same_data(tiny_config, options, tmp_path):
    config = tiny_config(**options)
    program.main(config)
    moved = write_images(tmp_path / 'moved')
    for path in moved.rglob('*.png'):
        cv2.imwrite(str(path.with_suffix('.jpg')), cv2.imread(str(path)))
        path.unlink()
    with one_thread():
        program.main(tiny_config(**{**options, 'DATA__DATA_PATH': str(moved)}, TRAIN__EPOCHS='3'))
    assert 'other settings than before: TRAIN.EPOCHS has changed from 2 to 3' in log_of(config)
    assert len(records(config, 'epoch')) == 3


def test_other_data_are_not_continued(tiny_config, options, image_tree):
    config = tiny_config(**options)
    program.main(config)
    record = load_checkpoint(folder_of(config) / 'ckpt_epoch_1.pth')['data']
    assert (record['train']['images'], record['val']['images']) == (24, 12)
    edit_all(folder_of(config), max_accuracy=100.5)
    shutil.copy(image_tree / 'train' / 'class_0' / '0.png', image_tree / 'train' / 'class_0' / 'new.png')
    (image_tree / 'val' / 'class_1' / '0.png').rename(image_tree / 'val' / 'class_1' / 'renamed.png')
    before = content(folder_of(config))
    message = 'train has 25 images, not 24; val has as many images, but different ones'
    with pytest.raises(ExperimentError, match=rf'another run \({message}\): write another --tag$'):
        program.main(config)
    assert content(folder_of(config)) == before
    newest = str(folder_of(config) / 'ckpt_epoch_1.pth')
    other = tiny_config(**options, TAG='other', TRAIN__EPOCHS='3', MODEL__RESUME=newest)
    program.main(other)
    assert f'other data than before: {message}: the best metric is reset' in log_of(other)
    best = load_checkpoint(folder_of(other) / 'ckpt_best.pth')
    assert best['max_accuracy'] == records(other, 'epoch')[-1]['acc1']


def test_other_class_names_are_not_continued_and_are_reported_in_evaluation(tiny_config, options, image_tree, capsys):
    program.main(tiny_config(**options))
    for split in ('train', 'val'):
        (image_tree / split / 'class_2').rename(image_tree / split / 'other')
    message = 'other classes (other for class_2)'
    path = str(folder_of(tiny_config()) / 'ckpt_epoch_1.pth')
    assert message not in capsys.readouterr().out
    program.main(tiny_config(EVAL_MODE='True', MODEL__RESUME=path, **options))
    assert message in capsys.readouterr().out
    with pytest.raises(ExperimentError, match=r'other classes \(other for class_2\)\): write another --tag'):
        program.main(tiny_config(TRAIN__EPOCHS='3', **options))
    program.main(tiny_config(TRAIN__EPOCHS='3', TAG='other', MODEL__RESUME=path, **options))
    assert message in capsys.readouterr().out


RANK_WITH_LESS_DATA = """
import os, main, config, utils
from engine import distributed

distributed.node_name = lambda: os.environ['RANK']  # each rank is on its own node
args = main.parse_option()
args.data_path += os.environ['RANK']
with utils.exit_on_user_error():
    main.main(config.get_config(args))
"""


@pytest.mark.slow
def test_ranks_whose_data_differ_stop_at_the_start(tmp_path):
    for rank in (0, 1):
        write_images(tmp_path / f'tree{rank}')
    (tmp_path / 'tree1' / 'train' / 'class_1' / '3.png').unlink()
    script = tmp_path / 'less_data.py'
    script.write_text(RANK_WITH_LESS_DATA)
    flags = ['--cfg', TINY, '--data-path', tmp_path / 'tree', '--output', tmp_path / 'output']
    done = start(*TORCHRUN, '2', script, *flags, variables={'PYTHONPATH': str(ROOT)}, timeout=120)
    assert done.returncode != 0
    message = 'error: rank 1 has other data than rank 0 (train has 23 images, not 24): give every node the same files'
    assert done.stderr.count(message) == 2, done.stderr
    assert not list((tmp_path / 'output').rglob('ckpt_*'))


def test_other_pretrained_weights_than_a_run_began_from_are_an_error(tiny_config, options, tmp_path):
    for name, seed in (('a', 0), ('b', 1)):
        torch.manual_seed(seed)
        torch.save({'model': build_model(tiny_config()).state_dict()}, tmp_path / f'{name}.pth')
    shutil.copy(tmp_path / 'a.pth', tmp_path / 'copy.pth')

    def run(pretrained='', tag='default'):
        program.main(
            tiny_config(**options, TAG=tag, MODEL__PRETRAINED=str(tmp_path / pretrained) if pretrained else '')
        )

    run('a.pth')
    folder = folder_of(tiny_config())
    origin = load_checkpoint(folder / 'ckpt_epoch_1.pth')['origin']
    assert (origin['kind'], origin['path']) == ('pretrained', str((tmp_path / 'a.pth').resolve()))
    assert len(origin['sha256']) == 64
    run('a.pth')
    run('copy.pth')  # by content
    run()  # forgotten: the run continues
    (tmp_path / 'a.pth').rename(tmp_path / 'moved.pth')
    run('a.pth')  # the same command, though its file is gone
    run('moved.pth')
    (tmp_path / 'moved.pth').rename(tmp_path / 'a.pth')
    with pytest.raises(
        ExperimentError, match=r'it started from --pretrained .*a.pth, not from --pretrained .*b.pth; leave'
    ):
        run('b.pth')
    run('b.pth', tag='other')
    torch.save({'model': build_model(tiny_config()).state_dict()}, tmp_path / 'b.pth')
    run('b.pth', tag='other')
    assert 'b.pth has changed since the run started from it' in log_of(tiny_config(TAG='other'))
    run(tag='scratch')
    with pytest.raises(ExperimentError, match=r'it started from scratch, not from --pretrained .*a.pth.*another --tag'):
        run('a.pth', tag='scratch')
    for key, value in (('WEIGHTS', 'raw'), ('HEAD', 'new')):  # another start from the same file
        change = f'MODEL.PRETRAINED_{key} was auto and is {value}'
        with pytest.raises(ExperimentError, match=change):
            program.main(
                tiny_config(**options, MODEL__PRETRAINED=str(tmp_path / 'a.pth'), **{f'MODEL__PRETRAINED_{key}': value})
            )
    record = load_checkpoint(folder / 'ckpt_epoch_1.pth')
    for path in folder.glob('ckpt_*.pth'):  # of an older version
        save_checkpoint(path, {key: value for key, value in record.items() if key != 'origin'})
    run('b.pth')
    assert 'does not record whether it started from --pretrained' in log_of(tiny_config())
    file = {key: origin[key] for key in ('path', 'sha256')}
    edit_all(folder, origin=None, pretrained=file)  # of a less old version
    run('a.pth')
    with pytest.raises(ExperimentError, match=r'it started from --pretrained .*a.pth, not from --pretrained .*b.pth'):
        run('b.pth')


def test_another_environment_is_listed(tiny_config, options):
    config = tiny_config(**options)
    with one_thread():
        program.main(config)
        program.main(config)
    assert 'bit for bit, as if it had never stopped' in log_of(config)
    torch.set_num_threads(2)
    try:
        program.main(config)
    finally:
        torch.set_num_threads(1)
    assert 'the run resumes not bit for bit: threads was 1 and is 2\n' in log_of(config)
    stored = load_checkpoint(folder_of(config) / 'ckpt_epoch_1.pth')['environment']
    assert stored.keys() >= {'torch', 'threads', 'device', 'world_size', 'precision'}
    edit_all(folder_of(config), environment=stored | {'opencv': '4.12.0'})  # decodes and resizes images
    program.main(config)
    assert f'not bit for bit: opencv was 4.12.0 and is {cv2.__version__}\n' in log_of(config)
    edit_all(folder_of(config), environment=None, data=None)  # of an older version
    program.main(config)
    message = (
        'not bit for bit: the checkpoint does not record its data; the checkpoint does not record its environment\n'
    )
    assert message in log_of(config)


def test_the_same_command_with_resume_goes_on_from_the_folders_own_newest_checkpoint(tiny_config, options, monkeypatch):
    """A run that starts from a checkpoint of another run, and is killed before and after its first own checkpoint."""
    program.main(tiny_config(**options))
    path = folder_of(tiny_config()) / 'ckpt_epoch_0.pth'
    command = tiny_config(**options, TAG='other', TRAIN__EPOCHS='4', MODEL__RESUME=str(path))
    epochs, train_one_epoch = [], Trainer.train_one_epoch

    def killed_at(epoch):
        def train(trainer):
            if trainer.state.epoch == epoch:
                raise KeyboardInterrupt
            epochs.append(trainer.state.epoch)
            return train_one_epoch(trainer)

        return train

    for epoch in (1, 3):
        monkeypatch.setattr(Trainer, 'train_one_epoch', killed_at(epoch))
        with pytest.raises(KeyboardInterrupt):
            program.main(command)
    monkeypatch.setattr(Trainer, 'train_one_epoch', killed_at(None))
    program.main(command)
    assert epochs == [1, 2, 3]
    assert [record['epoch'] for record in records(command, 'epoch')] == [1, 2, 3]
    origin = load_checkpoint(folder_of(command) / 'ckpt_epoch_3.pth')['origin']
    assert (origin['kind'], origin['path'], origin['origin']) == ('resume', str(path.resolve()), {'kind': 'scratch'})
    program.main(tiny_config(**options, TAG='other', TRAIN__EPOCHS='5'))  # without --resume: the run in the folder
    assert [record['epoch'] for record in records(command, 'epoch')] == [1, 2, 3, 4]


def test_the_same_command_continues_after_one_without_its_flags(tiny_config, options, tmp_path):
    torch.save({'model': build_model(tiny_config()).state_dict()}, tmp_path / 'a.pth')
    flags = {'MODEL__PRETRAINED': str(tmp_path / 'a.pth'), 'MODEL__PRETRAINED_HEAD': 'keep'}
    for epochs, given in (('2', flags), ('3', {}), ('4', flags)):
        config = tiny_config(**options, **given, TRAIN__EPOCHS=epochs)
        program.main(config)
    assert [record['epoch'] for record in records(config, 'epoch')] == [0, 1, 2, 3]


def test_a_run_of_an_older_version_that_started_with_resume_continues(tiny_config, options):
    """Its checkpoints record the file of --pretrained, here none, but not that of --resume."""
    program.main(tiny_config(**options))
    path = folder_of(tiny_config()) / 'ckpt_epoch_0.pth'
    command = {**options, 'TAG': 'other', 'MODEL__RESUME': str(path)}
    program.main(tiny_config(**command))
    edit_all(folder_of(tiny_config(TAG='other')), origin=None)
    for path_ in folder_of(tiny_config(TAG='other')).glob('ckpt_*'):
        save_checkpoint(path_, load_checkpoint(path_) | {'pretrained': None})
    for epochs in ('3', '4'):
        config = tiny_config(**command, TRAIN__EPOCHS=epochs)
        program.main(config)
    assert [record['epoch'] for record in records(config, 'epoch')] == [1, 2, 3]
    origin = load_checkpoint(folder_of(config) / 'ckpt_epoch_3.pth')['origin']
    assert (origin['kind'], origin['path'], origin['origin']) == ('resume', str(path.resolve()), {'kind': 'scratch'})


def test_going_back_takes_another_tag(tiny_config, options):
    program.main(tiny_config(**options))
    folder = folder_of(tiny_config())
    before = content(folder)
    for name in ('ckpt_epoch_0.pth', 'ckpt_epoch_1.pth'):
        with pytest.raises(ExperimentError) as error:
            program.main(tiny_config(**options, MODEL__RESUME=str(folder / name)))
        assert str(error.value) == (
            f'{folder} holds another run (it started from scratch, not from --resume {folder / name}; leave out '
            f'--resume to continue it): write another --tag'
        )
    assert content(folder) == before
    back = tiny_config(**options, TAG='back', MODEL__RESUME=str(folder / 'ckpt_epoch_0.pth'))
    with one_thread():
        program.main(back)
    assert [record['epoch'] for record in records(back, 'epoch')] == [1]


def test_auto_resume_off_is_an_error_where_there_is_a_run(tiny_config, options):
    fresh = tiny_config(**options, TRAIN__AUTO_RESUME='False')
    program.main(fresh)
    before = content(folder_of(fresh))
    with pytest.raises(
        ExperimentError, match='already holds a run, and TRAIN.AUTO_RESUME is False: write another --tag'
    ):
        program.main(fresh)
    assert content(folder_of(fresh)) == before


def test_a_finished_run_says_so(tiny_config, options):
    config = tiny_config(**options)
    program.main(config)
    before = content(folder_of(config))
    program.main(config)
    assert 'the run is finished: it has trained 2 epochs, and TRAIN.EPOCHS is 2.' in log_of(config)
    assert content(folder_of(config)) == before
    path = str(folder_of(config) / 'ckpt_epoch_1.pth')
    other = tiny_config(**options, TAG='other', MODEL__RESUME=path)
    program.main(other)
    assert 'the run is finished' in log_of(other)
    assert content(folder_of(other)) == {}


def test_a_chain_of_runs_knows_whether_it_started_from_trained_weights():
    file = {'path': 'a', 'sha256': ''}
    chain = {'kind': 'pretrained', **file}
    assert is_pretrained(chain)
    assert is_pretrained({'kind': 'resume', **file, 'origin': {'kind': 'resume', **file, 'origin': chain}})
    assert not is_pretrained({'kind': 'resume', **file, 'origin': {'kind': 'scratch'}})
    assert not is_pretrained({'kind': 'resume', **file, 'origin': None})  # unknown
    assert not is_pretrained(None)


def test_a_damaged_best_is_replaced(tiny_config, options):
    config = tiny_config(**options, TRAIN__EPOCHS='3')
    program.main(tiny_config(**options))
    edit(folder_of(config) / 'ckpt_epoch_1.pth', max_accuracy=100.0)
    (folder_of(config) / 'ckpt_best.pth').write_bytes(b'damaged')
    program.main(config)
    assert load_checkpoint(folder_of(config) / 'ckpt_best.pth')['epoch'] == 2


@pytest.mark.parametrize(
    ('scores', 'choice', 'expected'),
    [
        ({'raw': 20.0, 'ema': 30.0}, 'auto', 'ema'),
        ({'raw': 30.0, 'ema': 20.0}, 'auto', 'raw'),
        (None, 'auto', 'ema'),
        ({'raw': 30.0, 'ema': 20.0}, 'ema', 'ema'),
        ({'raw': 20.0, 'ema': 30.0}, 'raw', 'raw'),
    ],
)
def test_pretrained_takes_the_better_of_raw_and_ema_weights(tiny_config, options, tmp_path, scores, choice, expected):
    raw, ema = build_model(tiny_config()).state_dict(), fill_(build_model(tiny_config())).state_dict()
    save_checkpoint(tmp_path / 'source.pth', {'model': raw, 'model_ema': ema} | ({'scores': scores} if scores else {}))
    frozen = {'TRAIN__BASE_LR': '0', 'TRAIN__WARMUP_LR': '0', 'TRAIN__MIN_LR': '0'}
    config = tiny_config(
        **options, **frozen, MODEL__PRETRAINED=str(tmp_path / 'source.pth'), MODEL__PRETRAINED_WEIGHTS=choice
    )
    program.main(config)
    assert torch.equal(weights(config)['head.weight'], {'raw': raw, 'ema': ema}[expected]['head.weight'])
    assert f'source.pth: {"EMA" if expected == "ema" else "raw"} weights' in log_of(config)


def test_scores_of_both_weights_are_stored(tiny_config, options):
    config = tiny_config(**options, TRAIN__EMA_DECAY='0.9')
    program.main(config)
    [_, last] = records(config, 'epoch')
    stored = load_checkpoint(folder_of(config) / 'ckpt_epoch_1.pth')['scores']
    assert stored == {'raw': last['acc1'], 'ema': last['ema_acc1'], 'loss': last['ema_val_loss']}


@pytest.mark.parametrize(
    ('classes', 'choice', 'is_kept'),
    [
        (['class_0', 'class_1', 'class_2'], 'auto', True),
        (['cat', 'dog', 'fox'], 'auto', False),
        (None, 'auto', True),
        (['cat', 'dog', 'fox'], 'keep', True),
        (['class_0', 'class_1', 'class_2'], 'new', False),
    ],
)
def test_head_of_pretrained_weights(tiny_config, options, tmp_path, classes, choice, is_kept):
    source = fill_(build_model(tiny_config())).state_dict()
    torch.save({'model': source, 'classes': classes}, tmp_path / 'source.pth')
    frozen = {'TRAIN__BASE_LR': '0', 'TRAIN__WARMUP_LR': '0', 'TRAIN__MIN_LR': '0'}
    config = tiny_config(
        **options, **frozen, MODEL__PRETRAINED=str(tmp_path / 'source.pth'), MODEL__PRETRAINED_HEAD=choice
    )
    program.main(config)
    trained, log = weights(config), log_of(config)
    assert torch.equal(trained['msg_tokens'], source['msg_tokens'])
    assert torch.equal(trained['head.weight'], source['head.weight']) == is_kept
    assert ('the head starts from scratch' in log) != is_kept
    assert ('PRETRAINED_HEAD keep keeps its head' in log) == (choice == 'keep')


@pytest.mark.slow
def test_evaluation_beside_a_live_run_changes_nothing_of_it(tiny_config, options):
    """The live run is a process that holds the folder's lock."""
    config = tiny_config(**options)
    program.main(config)
    folder = folder_of(config)
    before = {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}
    script = (
        'import logging; from pathlib import Path\n'
        'from engine.run_lock import RunLock\n'
        f'lock = RunLock(Path({str(folder)!r}), logging.getLogger()); lock.acquire(0)\n'
        'print("locked", flush=True); input()\n'
    )
    pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'text': True}
    with subprocess.Popen([sys.executable, '-c', script], cwd=ROOT, env=environment(), **pipes) as live:
        assert live.stdout.readline() == 'locked\n'
        program.main(tiny_config(**options, EVAL_MODE='True', MODEL__RESUME=str(folder / 'ckpt_epoch_1.pth')))
        assert 'Accuracy of the network' in (folder / 'log_eval_rank0.txt').read_text()
        live.communicate('\n')
    after = {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}
    assert {path: after[path] for path in before} == before
    added = {path.name for path in after.keys() - before.keys()}
    assert {'log_eval_rank0.txt', 'run.lock', 'predictions.csv'} <= added
    assert {name for name in added if not name.endswith(('.csv', '.png'))} == {'log_eval_rank0.txt', 'run.lock'}
    assert json.loads((folder / 'run.lock').read_text())['pid'] > 0
