"""Runs that cannot spoil each other: what a folder's next run may change, and what is refused."""

import json
import shutil

import cv2
import pytest
import torch

import main as program
from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.config_keys import Key, KeyGroup
from engine.config_tree import ConfigTree
from engine.resume import ExperimentError
from models import build_model
from tests.helpers.golden import fill_
from tests.helpers.images import write_images
from tests.helpers.paths import ROOT, TINY
from tests.helpers.processes import TORCHRUN, start
from tests.helpers.runs import PLAIN, folder_of, log_of, one_thread, records, weights


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
    newest = folder_of(config) / 'ckpt_epoch_1.pth'
    assert str(error.value) == (
        f'{folder_of(config)} holds a run of another experiment ({message}): '
        f'write another --tag, or --resume {newest} to go on from it where its weights fit'
    )
    assert content(folder_of(config)) == before
    if 'MODEL__MSG__MANIP_TYPE' in change:
        program.main(tiny_config(**options, **change, TRAIN__EPOCHS='3', MODEL__RESUME=str(newest)))
        assert f'other settings than before: {message}; TRAIN.EPOCHS' in log_of(config)
        program.main(tiny_config(**options, **change, TAG='other'))


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
    tree = ConfigTree(root, lambda config: None)
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
    program.main(tiny_config(**options, PRINT_FREQ='2', DATA__NUM_WORKERS='1', SAVE_KEEP='3', TENSORBOARD='False'))
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


def test_other_data_are_not_continued_unless_asked_for(tiny_config, options, image_tree):
    config = tiny_config(**options)
    program.main(config)
    record = load_checkpoint(folder_of(config) / 'ckpt_epoch_1.pth')['data']
    assert (record['train']['images'], record['val']['images']) == (24, 12)
    edit_all(folder_of(config), max_accuracy=100.5)
    shutil.copy(image_tree / 'train' / 'class_0' / '0.png', image_tree / 'train' / 'class_0' / 'new.png')
    (image_tree / 'val' / 'class_1' / '0.png').rename(image_tree / 'val' / 'class_1' / 'renamed.png')
    before = content(folder_of(config))
    message = 'train has 25 images, not 24; val has as many images, but other ones'
    with pytest.raises(ExperimentError, match=rf'another experiment \({message}\): write another --tag, or --resume'):
        program.main(config)
    assert content(folder_of(config)) == before
    newest = str(folder_of(config) / 'ckpt_epoch_1.pth')
    program.main(tiny_config(**options, TRAIN__EPOCHS='3', MODEL__RESUME=newest))
    assert f'the data have changed: {message}: the best metric starts from nothing' in log_of(config)
    assert load_checkpoint(folder_of(config) / 'old_1' / 'ckpt_best.pth')['max_accuracy'] == 100.5
    best = load_checkpoint(folder_of(config) / 'ckpt_best.pth')
    assert best['max_accuracy'] == records(config, 'epoch')[-1]['acc1']
    program.main(tiny_config(**options, TRAIN__EPOCHS='3'))  # now its own data
    assert 'bit for bit, as if' in log_of(config).splitlines()[-2]


def test_other_class_names_are_not_continued_and_are_reported_in_evaluation(tiny_config, options, image_tree, capsys):
    program.main(tiny_config(**options))
    for split in ('train', 'val'):
        (image_tree / split / 'class_2').rename(image_tree / split / 'other')
    message = '1 of the 3 classes have other names in the checkpoint (other for class_2)'
    path = str(folder_of(tiny_config()) / 'ckpt_epoch_1.pth')
    assert message not in capsys.readouterr().out
    program.main(tiny_config(EVAL_MODE='True', MODEL__RESUME=path, **options))
    assert message in capsys.readouterr().out
    with pytest.raises(ExperimentError, match='classes have other names in the checkpoint'):
        program.main(tiny_config(TRAIN__EPOCHS='3', **options))
    program.main(tiny_config(TRAIN__EPOCHS='3', MODEL__RESUME=path, **options))
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
    assert load_checkpoint(folder / 'ckpt_epoch_1.pth')['pretrained']['path'] == str((tmp_path / 'a.pth').resolve())
    run('a.pth')
    run('copy.pth')  # by content
    run()  # forgotten: the run resumes
    with pytest.raises(ExperimentError, match=r'holds a run that began from .*a.pth, not from .*b.pth: write another'):
        run('b.pth')
    run('b.pth', tag='other')
    run(tag='scratch')
    with pytest.raises(ExperimentError, match=r'holds a run that began from scratch, not from .*a.pth'):
        run('a.pth', tag='scratch')
    for key, value in (('WEIGHTS', 'raw'), ('HEAD', 'new')):  # another start from the same file
        change = f'MODEL.PRETRAINED_{key} has changed from .auto. to .{value}.'
        with pytest.raises(ExperimentError, match=change):
            program.main(
                tiny_config(**options, MODEL__PRETRAINED=str(tmp_path / 'a.pth'), **{f'MODEL__PRETRAINED_{key}': value})
            )
    record = load_checkpoint(folder / 'ckpt_epoch_1.pth')
    for path in folder.glob('ckpt_*.pth'):  # of an older version
        save_checkpoint(path, {key: value for key, value in record.items() if key != 'pretrained'})
    run('b.pth')
    assert 'does not say whether its run began from' in log_of(tiny_config())


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
    edit_all(folder_of(config), environment=None, data=None)  # of an older version
    program.main(config)
    message = 'not bit for bit: it has no record of its data; it has no record of its environment\n'
    assert message in log_of(config)


def test_a_foreign_checkpoint_sets_the_folders_run_aside_and_is_copied(tiny_config, options, monkeypatch):
    program.main(tiny_config(**options))
    program.main(tiny_config(**options, TAG='other'))
    path = folder_of(tiny_config()) / 'ckpt_epoch_0.pth'
    edit(path, max_accuracy=100.5)  # never reached again
    other = tiny_config(**options, TAG='other', MODEL__RESUME=str(path))
    folder = folder_of(other)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(program.Trainer, 'train_one_epoch', killed)
        with pytest.raises(KeyboardInterrupt):
            program.main(other)
    assert {path.name for path in (folder / 'old_1').iterdir()} >= {'ckpt_best.pth', 'metrics.jsonl'}
    assert [path.name for path in folder.glob('ckpt_*')] == ['ckpt_epoch_0.pth']
    program.main(tiny_config(**options, TAG='other'))  # without --resume
    assert [record['epoch'] for record in records(other, 'epoch')] == [1]
    best = load_checkpoint(folder / 'ckpt_best.pth')
    assert (best['epoch'], best['max_accuracy']) == (1, 100.5)


@pytest.mark.parametrize('is_own', [True, False])
@pytest.mark.parametrize('name', ['ckpt_epoch_0.pth', 'ckpt_best.pth'])
def test_a_changed_experiment_that_is_killed_at_once_goes_on_without_resume(
    tiny_config, options, image_tree, monkeypatch, is_own, name
):
    """On other data and with another network, from a checkpoint of the same folder or of another one."""
    program.main(tiny_config(**options))
    source = folder_of(tiny_config())
    shutil.copy(source / 'ckpt_epoch_0.pth', source / 'ckpt_best.pth')
    for i in range(6):
        shutil.copy(image_tree / 'train' / 'class_0' / '0.png', image_tree / 'train' / 'class_0' / f'new_{i}.png')
    options |= {'MODEL__MSG__QK_SCALE': '0.4', 'TAG': 'default' if is_own else 'other'}

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(program.Trainer, 'train_one_epoch', killed)
        with pytest.raises(KeyboardInterrupt):
            program.main(tiny_config(**options, MODEL__RESUME=str(source / name)))
    config = tiny_config(**options)
    assert [path.name for path in folder_of(config).glob('ckpt_*')] == ['ckpt_epoch_0.pth']
    program.main(config)
    assert 'resuming at epoch 1, update 0, max accuracy none' in log_of(config)
    assert [record['epoch'] for record in records(config, 'epoch')] == ([0, 1] if is_own else [1])
    assert len(list(folder_of(config).glob('old_*/ckpt_best.pth'))) == is_own


def test_the_best_of_another_run_stays_the_best(tiny_config, options):
    program.main(tiny_config(**options))
    path = folder_of(tiny_config()) / 'ckpt_epoch_0.pth'
    edit(path, max_accuracy=100.0, scores={'raw': 100.0})
    other = tiny_config(**options, TAG='other', MODEL__RESUME=str(path))
    program.main(other)
    best = load_checkpoint(folder_of(other) / 'ckpt_best.pth')
    assert (best['epoch'], best['scores']) == (0, {'raw': 100.0})


def test_a_checkpoint_with_nothing_left_to_train_changes_no_folder(tiny_config, options):
    program.main(tiny_config(**options))
    program.main(tiny_config(**options, TAG='other'))
    path = folder_of(tiny_config()) / 'ckpt_epoch_1.pth'
    before = content(folder_of(tiny_config(TAG='other')))
    program.main(tiny_config(**options, TAG='other', MODEL__RESUME=str(path)))
    assert content(folder_of(tiny_config(TAG='other'))) == before


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
    assert stored == {'raw': last['acc1'], 'ema': last['ema_acc1']}


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
    assert ('PRETRAINED_HEAD keeps its head' in log) == (choice == 'keep')


def test_evaluation_beside_a_live_run_changes_nothing_of_it(tiny_config, options, tmp_path):
    """The live run is a process that holds the folder's lock."""
    config = tiny_config(**options)
    program.main(config)
    folder = folder_of(config)
    before = {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}
    script = (
        'import logging, sys, main, config, subprocess; from pathlib import Path\n'
        'from engine.run_lock import RunLock\n'
        f'lock = RunLock(Path({str(folder)!r}), logging.getLogger()); lock.acquire(0)\n'
        'sys.exit(subprocess.run([sys.executable, "main.py", *sys.argv[1:]]).returncode)\n'
    )
    flags = ['--cfg', TINY, '--data-path', options['DATA__DATA_PATH'], '--output', config.OUTPUT, '--eval']
    done = start('-c', script, *flags, '--resume', folder / 'ckpt_epoch_1.pth')
    assert done.returncode == 0, done.stderr
    assert 'Accuracy of the network' in done.stdout
    after = {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}
    assert {path: after[path] for path in before} == before
    assert {path.name for path in after.keys() - before.keys()} == {'log_eval_rank0.txt', 'run.lock'}
    assert json.loads((folder / 'run.lock').read_text())['pid'] > 0
