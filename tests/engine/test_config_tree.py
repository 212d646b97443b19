import pytest
import yaml

from config import TREE, load_config
from engine.config_tree import ConfigError, get
from tests.helpers.paths import TINY


def write(path, text):
    path.write_text(text)
    return path


def test_file_overrides_its_base_files_and_options_override_the_file(tmp_path):
    write(tmp_path / 'grandparent.yaml', 'SEED: 1\nTAG: a\nTRAIN: {EPOCHS: 40, WARMUP_EPOCHS: 3}')
    write(tmp_path / 'parent.yaml', 'BASE: [grandparent.yaml]\nTAG: b\nSAVE_FREQ: 7')
    (tmp_path / 'sub').mkdir()
    child = write(tmp_path / 'sub' / 'child.yaml', 'BASE: [../parent.yaml]\nSAVE_FREQ: 8')
    config = load_config(child, ['TRAIN.EPOCHS', '50'])
    assert (config.SEED, config.TAG, config.SAVE_FREQ) == (1, 'b', 8)
    assert (config.TRAIN.EPOCHS, config.TRAIN.WARMUP_EPOCHS) == (50, 3)
    assert config.BASE == ['']  # merged: a dump stands alone


def test_dump_gives_the_same_tree(tmp_path):
    opts = ['TAG', '2024', 'MODEL.MSG.QK_SCALE', '0.5', 'AUG.CUTMIX_MINMAX', '[0.2, 0.8]', 'TRAIN.BASE_LR', '1e-05']
    config = load_config(TINY, opts)
    again = load_config(write(tmp_path / 'config.yaml', config.dump()))
    assert again == config
    assert again.TAG == '2024'


def test_a_saved_config_is_repeated_with_its_flags():
    saved = yaml.safe_load(load_config(TINY, ['TAG', 'a', 'DATA.BATCH_SIZE', '3']).dump())
    del saved['DATA']['PIPELINE']  # from before there was the key
    config = TREE.load(None, ['SEED', '4'], saved, repeats=True)
    assert (config.TAG, config.DATA.BATCH_SIZE, config.SEED, config.DATA.PIPELINE) == ('a', 3, 4, 'published')
    assert TREE.load(None, [], saved).DATA.BATCH_SIZE == 128
    with pytest.raises(ConfigError, match='the run had --import mine.py: add it'):
        TREE.load(None, [], saved | {'IMPORT': ['mine.py']}, repeats=True)


@pytest.mark.parametrize(
    ('opts', 'key', 'value'),
    [
        (['MODEL.MSG.MLP_RATIO', '4'], 'MODEL.MSG.MLP_RATIO', 4.0),
        (['TRAIN.BASE_LR', '5e-4'], 'TRAIN.BASE_LR', 5e-4),
        (['TRAIN.CLIP_GRAD', '0'], 'TRAIN.CLIP_GRAD', 0.0),
        (['TAG', '007'], 'TAG', '007'),
        (['MODEL.MSG.DEPTHS', '(1,2)'], 'MODEL.MSG.DEPTHS', [1, 2]),
        (['TRAIN.OPTIMIZER.BETAS', '[0.8, 0.9]'], 'TRAIN.OPTIMIZER.BETAS', (0.8, 0.9)),
        (['MODEL.MSG.QK_SCALE', 'None'], 'MODEL.MSG.QK_SCALE', None),
        (['MODEL.MSG.QK_SCALE', '1'], 'MODEL.MSG.QK_SCALE', 1.0),
        (['TEST.CROP', 'False'], 'TEST.CROP', False),
        (['TRAIN.EPOCHS', 12, 'TRAIN.WARMUP_EPOCHS', 0], 'TRAIN.EPOCHS', 12),
    ],
)
def test_options_take_the_type_of_their_key(opts, key, value):
    config = load_config(TINY, opts)
    assert get(config, key, 'test') == value
    assert type(get(config, key, 'test')) is type(value)


def test_numbers_that_yaml_parses_as_text_are_numbers(tmp_path):
    assert load_config(write(tmp_path / 'c.yaml', 'TRAIN: {BASE_LR: 5e-3}')).TRAIN.BASE_LR == 5e-3


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('MODLE: {NAME: x}', 'MODLE.NAME does not exist: did you mean MODEL.NAME'),
        ('TRAIN: 3', 'TRAIN is a group'),
        ('BASE: [nowhere.yaml]', 'nowhere.yaml: No such file'),
        ('BASE: [bad.yaml]', 'bad.yaml is among its own BASE files'),
        ('BASE: 3', 'BASE is 3: write a list'),
        ('BASE:', 'BASE is None: write a list'),
        ('a: [', 'is not YAML'),
        ('', 'holds no keys'),
        ('- 1', 'holds no keys'),
    ],
)
def test_invalid_files_are_named(tmp_path, text, message):
    path = write(tmp_path / 'bad.yaml', text)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(path)
    assert str(path.parent) in str(error.value)
    with pytest.raises(ConfigError, match='no file at all'):
        load_config('no file at all.yaml')


def test_loaded_tree_is_frozen():
    config = load_config(TINY)
    with pytest.raises(AttributeError):
        config.TRAIN.EPOCHS = 3


def test_paths_take_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    write(tmp_path / 'base.yaml', f'BASE: [{TINY}]\nOUTPUT: ~/runs\nTAG: ~x')
    write(tmp_path / 'mine.yaml', 'BASE: [~/base.yaml]')
    config = load_config('~/mine.yaml', ['DATA.DATA_PATH', '~/data', 'MODEL.RESUME', '~/a.pth'])
    assert (f'{tmp_path}/runs', f'{tmp_path}/data') == (config.OUTPUT, config.DATA.DATA_PATH)
    assert (f'{tmp_path}/a.pth', '~x') == (config.MODEL.RESUME, config.TAG)


@pytest.mark.parametrize(
    ('name', 'meant'),
    [
        ('train.epoch', 'TRAIN.EPOCHS'),
        ('EPOCHS', 'TRAIN.EPOCHS'),
        ('TRAIN.SEED', 'SEED'),
        ('MODEL.EMBED_DIM', 'MODEL.MSG.EMBED_DIM'),
        ('TRAIN.OPTIMISER.NAME', 'TRAIN.OPTIMIZER.NAME'),
        ('AUG.CUTMIX_MIXMAX', 'AUG.CUTMIX_MINMAX'),
        ('TRAIN.LR', None),
        ('FOO', None),
        ('MODEL.DROPOUT', None),
        ('THE.QUICK.BROWN', None),
    ],
)
def test_close_keys_are_suggested_and_no_others(name, meant):
    with pytest.raises(ConfigError) as error:
        load_config(TINY, [name, '1'])
    hint = f': did you mean {meant}?' if meant else ''
    assert str(error.value) == f'config key {name} does not exist{hint} (in --opts)'
