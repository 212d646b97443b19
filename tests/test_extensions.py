"""Modules of `--import`: where they come from, what they register, and that no checkpoint imports one."""

import argparse
from pathlib import Path

import pytest
import yaml
from torch import nn

from config import TREE, ConfigError, load_config
from data.losses import build_criterion, register_loss
from data.python_dataset import register_dataset
from engine.checkpoint import save_checkpoint
from engine.config_keys import Key
from engine.config_tree import add_options
from extensions import ExtensionError, Registry, missing_modules
from models import build_model, register_exchange
from tests.helpers.extensions import EXAMPLES, forgotten_modules
from tests.helpers.paths import TINY
from tests.helpers.processes import error_line
from trackers import Tracker, build_trackers, register_tracker

LOSS = """
from torch import nn
from data.losses import register_loss

@register_loss('mine')
class Mine(nn.CrossEntropyLoss):
    def __init__(self, config):
        super().__init__()
"""


@pytest.fixture(autouse=True)
def forgotten():
    with forgotten_modules():
        yield


def write(path, text=LOSS):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def load(*arguments, cfg=TINY):
    parser = argparse.ArgumentParser()
    add_options(parser)
    return load_config(cfg, parser.parse_args(list(map(str, arguments))).opts)


def test_a_module_is_imported_before_the_config_is_read(tmp_path, monkeypatch):
    select = ['--opts', 'TRAIN.LOSS', 'mine']
    with pytest.raises(ConfigError, match="is 'mine': write one of cross_entropy, bce, or another name that a"):
        load(*select)
    path = write(tmp_path / 'my_loss_a.py')
    config = load(*select, '--import', path)
    assert ('mine', [str(path)]) == (config.TRAIN.LOSS, config.IMPORT)
    assert isinstance(build_criterion(config), nn.CrossEntropyLoss)
    with pytest.raises(ConfigError, match='TRAIN.CLASS_WEIGHTS sqrt is for cross_entropy and bce, and TRAIN.LOSS is'):
        load(*select, 'TRAIN.CLASS_WEIGHTS', 'sqrt', '--import', path)
    monkeypatch.chdir(tmp_path)
    assert load('--import', 'my_loss_a.py', '--import', path, *select) == config  # once
    assert load('--import', 'my_loss_a', *select).IMPORT == ['my_loss_a']


def test_a_config_file_imports_relative_to_itself_and_its_dump_again(tmp_path):
    path = write(tmp_path / 'ideas' / 'my_loss_b.py')
    write(tmp_path / 'base' / 'base.yaml', f'BASE: [{TINY}]\nIMPORT: [../ideas/my_loss_b.py]')
    child = write(tmp_path / 'child.yaml', 'BASE: [base/base.yaml]\nTRAIN: {LOSS: mine}')
    config = load(cfg=child)
    assert [str(path)] == config.IMPORT
    assert load(cfg=write(tmp_path / 'config.yaml', config.dump())) == config
    for text in ('{a: b}', '[[a]]', '"a\\nb"'):
        with pytest.raises(ConfigError, match='IMPORT'):
            load(cfg=write(tmp_path / 'bad.yaml', f'IMPORT: {text}'))


@pytest.mark.parametrize(
    ('name', 'text', 'message'),
    [
        ('nowhere.py', None, 'nowhere.py does not exist: give a .py file'),
        (f'{"x" * 300}.py', None, 'does not exist: give a .py file'),
        ('no_such_module', None, 'there is no module no_such_module: give the path of its .py file'),
        ('no_such_package.part', None, 'there is no module no_such_package: give'),
        ('config.py', 'x = 1', 'the name config belongs to another module, .*config.py: rename the file'),
        ('sys.py', 'x = 1', 'the name sys belongs to another module, built-in: rename the file'),
        ('queue.py', 'x = 1', 'the name queue belongs to another module, .*queue.py: rename the file'),
        ('a.b.py', 'x = 1', 'the name of a module cannot contain a dot: rename the file'),
        ('exits.py', 'x = 1\nraise SystemExit(0)', 'failed at line 2 of .*exits.py: SystemExit'),
        ('bad_a.py', 'x = 1\nx = y', "bad_a.py failed at line 2 of .*bad_a.py: NameError: name 'y' is not defined"),
        ('bad_b.py', 'x = 1\nx =', 'bad_b.py failed at line 2 of .*bad_b.py: SyntaxError: invalid syntax'),
        ('bad_c.py', 'import albumentatons', 'failed at line 1 of .*bad_c.py: ModuleNotFoundError: No module named'),
        (
            'bad_d.py',
            LOSS.replace('mine', 'cross_entropy'),
            "line 5 of .*: ValueError: the loss 'cross_entropy' is",
        ),
    ],
)
def test_modules_that_cannot_be_imported_are_told_in_a_line(tmp_path, name, text, message):
    if text is not None:
        write(tmp_path / name, text)
    with pytest.raises(ExtensionError, match=message) as error:
        load('--import', tmp_path / name if name.endswith('.py') else name)
    assert '\n' not in str(error.value)


def test_a_checkpoint_imports_nothing_and_the_error_names_its_module(tmp_path):
    marker = tmp_path / 'imported'
    path = write(tmp_path / 'my_exchange.py', f'open({str(marker)!r}, "w").close()\n{EXAMPLES["my_exchange.py"]}')
    opts = ['--import', str(path)]
    select = ['--opts', 'MODEL.MSG.MANIP_TYPE', 'gated_mean']
    with forgotten_modules():
        write(tmp_path / 'my_loss_c.py')
        training = ['TRAIN.LOSS', 'mine', '--import', tmp_path / 'my_loss_c.py']
        config = load(*opts, *select, *training)
        checkpoint = {'model': build_model(config).state_dict(), 'config': yaml.safe_load(config.dump())}
    save_checkpoint(tmp_path / 'w.pth', checkpoint)
    marker.unlink()
    saved = checkpoint['config']
    message = (
        rf"'gated_mean': write one of .* The checkpoint's run had --import {path} --import {tmp_path}/my_loss_c.py$"
    )
    with pytest.raises(ConfigError, match=message):
        TREE.load(None, saved=saved)
    predict = ['-m', 'tools.predict', '--resume', tmp_path / 'w.pth', tmp_path]
    assert f"The checkpoint's run had --import {path}" in error_line(*predict)
    evaluate = ['main.py', '--cfg', TINY, '--eval', '--resume', tmp_path / 'w.pth', '--output', tmp_path, *select]
    line = error_line(*evaluate)
    assert "manip_type is 'gated_mean': write one of" in line
    assert 'or import the module that registers it (--import)' in line
    assert not marker.exists()
    config = TREE.load(None, ['IMPORT', str(path)], saved)  # prediction does not need the loss
    assert (config.MODEL.MSG.MANIP_TYPE, config.TRAIN.LOSS) == ('gated_mean', 'cross_entropy')
    assert [str(path)] == config.IMPORT


def test_modules_of_a_checkpoint_are_compared_by_name():
    assert missing_modules(['/a/x.py', 'y.z', ''], ['/b/x.py']) == ['y.z']
    for value in (None, 3, {'a': 1}, [3, None]):  # a checkpoint may come from anyone
        assert missing_modules(value, []) == []


def test_keys_are_added_with_their_checks():
    TREE.add_key('AUG.NOISE.SIGMA', Key(0.5, 'Strength', max=1))
    assert load('--opts', 'AUG.NOISE.SIGMA', '1').AUG.NOISE.SIGMA == 1.0
    with pytest.raises(ConfigError, match='AUG.NOISE.SIGMA is 2.0: write a number at most 1'):
        load('--opts', 'AUG.NOISE.SIGMA', '2')
    TREE.add_key('AUG.NOISE.SIGMA', Key(0.5, 'Strength', max=1))  # as where a module is imported again
    for name, key, message in (
        ('AUG.NOISE.SIGMA', Key(0.7, 'x'), 'already exists'),
        ('AUG.NOISE', Key(1, 'x'), 'already exists'),
        ('AUG.MIXUP.MODE', Key(1, 'x'), 'AUG.MIXUP is a key, not a group'),
        ('AUG.NEW', Key(1, 'x', flag='--new'), 'the key without a flag'),
        ('AUG.new', Key(1, 'x'), 'in capital letters'),
    ):
        with pytest.raises(ValueError, match=message):
            TREE.add_key(name, key)


def test_names_of_parts_are_checked():
    registry = Registry('part', one=dict)
    for name in ('', 'a b', 'a,b', '[a]', 3, dict):  # the last: a decorator without parentheses
        with pytest.raises(ValueError, match="is not a name for a part: write @register_part\\('my_part'\\)"):
            registry.register(name)
        with pytest.raises(ValueError, match='is not a name for an exchange: write @register_exchange'):
            register_exchange(name)
    with pytest.raises(ValueError, match="the part 'one' is already builtins.dict"):
        registry.register('one')(list)
    with pytest.raises(ValueError, match='is neither a class nor a function'):
        registry.register('two')(3)
    with pytest.raises(ValueError, match='shards is a format of the project: write another name'):
        register_dataset('shards')


def test_a_loss_with_parameters_is_refused():
    register_loss('learned')(lambda config: nn.Linear(2, 2))
    with pytest.raises(ValueError, match='the loss learned has parameters, which are not trained'):
        build_criterion(load('--opts', 'TRAIN.LOSS', 'learned'))
    register_loss('function')(lambda config: print)
    with pytest.raises(ValueError, match='the loss function is a builtin_function_or_method: return a torch.nn.Module'):
        build_criterion(load('--opts', 'TRAIN.LOSS', 'function'))


def test_trackers_get_records_until_they_are_closed_even_where_training_fails(tiny_config, image_tree, monkeypatch):
    events = []

    @register_tracker('events')
    class Events(Tracker):
        def write(self, record):
            events.append(record)

        def close(self):
            events.append('closed')

    def fail(*_):
        raise RuntimeError('evaluation')

    import main

    config = tiny_config(TRACKER='[none, events]', DATA__DATA_PATH=str(image_tree), AUG__MIXUP='0', AUG__CUTMIX='0')
    assert [type(x) for x in build_trackers(config, None)] == [Events]
    monkeypatch.setattr(main, 'validate', fail)
    with pytest.raises(RuntimeError, match='evaluation'):
        main.main(config)
    *records, last = events
    assert last == 'closed'
    assert [record['kind'] for record in records] == ['train'] * 6
    assert records[0].keys() >= {'updates', 'epoch', 'loss', 'lr'}


def test_training_goes_on_without_a_tracker_that_fails(tiny_config, image_tree):
    records = []

    class Failing(Tracker):
        def write(self, record):
            raise ConnectionError('no route to host')

    class Working(Tracker):
        def write(self, record):
            records.append(record)

    register_tracker('failing')(Failing)
    register_tracker('working')(Working)
    register_tracker('number')(lambda config, folder: 5)
    options = {'DATA__DATA_PATH': str(image_tree), 'AUG__MIXUP': '0', 'AUG__CUTMIX': '0', 'TRAIN__EPOCHS': '1'}
    config = tiny_config(TRACKER='failing,working', **options, TRAIN__WARMUP_EPOCHS='0')
    import main

    main.main(config)
    folder = Path(config.OUTPUT) / config.MODEL.NAME / config.TAG
    log = (folder / 'log_rank0.txt').read_text()
    assert log.count('tracker Failing failed, and gets no more records: ConnectionError: no route to host') == 1
    assert [record['kind'] for record in records][-1] == 'epoch'
    assert (folder / 'ckpt_epoch_0.pth').exists()
    with pytest.raises(ExtensionError, match='TRACKER number gives int: return a trackers.Tracker'):
        build_trackers(tiny_config(TRACKER='number'), None)


@pytest.mark.parametrize('values', [[[1]], [{}], 'x' * 100_000, ['x' * 100_000] * 3])
def test_odd_values_of_parts_in_a_checkpoint_are_told_in_a_line(values):
    for name in ('LOSS', 'TRACKER', 'DATASET', 'TRANSFORM', 'MANIP_TYPE'):
        group = {'LOSS': 'TRAIN', 'DATASET': 'DATA', 'TRANSFORM': 'AUG'}.get(name)
        saved = {group: {name: values}} if group else {name: values}
        saved = {'MODEL': {'MSG': {name: values}}} if name == 'MANIP_TYPE' else saved
        try:
            TREE.load(None, saved=saved)
        except ConfigError as error:
            assert len(str(error)) < 600  # noqa: PT017


@pytest.mark.parametrize(
    'written', ['[shuf, none]', "['shuf', 'none']", '(shuf,none)', 'shuf,none', ' [ shuf ,none ] ']
)
def test_lists_of_names_are_written_with_or_without_brackets(written):
    config = load('--opts', 'MODEL.MSG.MANIP_TYPE', written)  # of a network of two stages
    assert config.MODEL.MSG.MANIP_TYPE == ['shuf', 'none']
    for odd in ('[shuf,none', 'shuf,none]]', '[[shuf], none]', '[]'):
        with pytest.raises(ConfigError, match='manip_type is .*: write one of'):
            load('--opts', 'MODEL.MSG.MANIP_TYPE', odd)
