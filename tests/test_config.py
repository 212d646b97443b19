from argparse import Namespace
from pathlib import Path

import pytest

from config import ConfigError, get_config, load_config
from tests.conftest import TINY

ROOT = Path(__file__).parent.parent
PUBLISHED = {
    'BASE': [''],
    'AMP_OPT_LEVEL': '',
    'OUTPUT': '',
    'TAG': 'default',
    'SAVE_FREQ': 1,
    'PRINT_FREQ': 100,
    'SEED': 0,
    'EVAL_MODE': False,
    'THROUGHPUT_MODE': False,
    'LOCAL_RANK': 0,
    'DATA.BATCH_SIZE': 128,
    'DATA.DATA_PATH': '',
    'DATA.DATASET': 'imagenet',
    'DATA.IMG_SIZE': 224,
    'DATA.INTERPOLATION': 'bicubic',
    'DATA.PIN_MEMORY': True,
    'DATA.NUM_WORKERS': 8,
    'MODEL.TYPE': 'msg',
    'MODEL.NAME': 'msg_tiny_p4_win7_224',
    'MODEL.RESUME': '',
    'MODEL.NUM_CLASSES': 1000,
    'MODEL.DROP_RATE': 0.0,
    'MODEL.DROP_PATH_RATE': 0.1,
    'MODEL.LABEL_SMOOTHING': 0.1,
    'MODEL.MSG.PATCH_SIZE': 4,
    'MODEL.MSG.IN_CHANS': 3,
    'MODEL.MSG.EMBED_DIM': 96,
    'MODEL.MSG.DEPTHS': [2, 2, 6, 2],
    'MODEL.MSG.NUM_HEADS': [3, 6, 12, 24],
    'MODEL.MSG.WINDOW_SIZE': 7,
    'MODEL.MSG.MLP_RATIO': 4.0,
    'MODEL.MSG.QKV_BIAS': True,
    'MODEL.MSG.QK_SCALE': None,
    'MODEL.MSG.APE': False,
    'MODEL.MSG.PATCH_NORM': True,
    'MODEL.MSG.SHUF_SIZE': [4, 4, 2, 1],
    'MODEL.MSG.MANIP_TYPE': 'shuf',
    'TRAIN.START_EPOCH': 0,
    'TRAIN.EPOCHS': 300,
    'TRAIN.WARMUP_EPOCHS': 20,
    'TRAIN.WEIGHT_DECAY': 0.05,
    'TRAIN.BASE_LR': 5e-4,
    'TRAIN.WARMUP_LR': 5e-7,
    'TRAIN.MIN_LR': 5e-6,
    'TRAIN.CLIP_GRAD': 5.0,
    'TRAIN.AUTO_RESUME': True,
    'TRAIN.ACCUMULATION_STEPS': 0,
    'TRAIN.USE_CHECKPOINT': False,
    'TRAIN.LR_SCHEDULER.NAME': 'cosine',
    'TRAIN.LR_SCHEDULER.DECAY_EPOCHS': 30,
    'TRAIN.LR_SCHEDULER.DECAY_RATE': 0.1,
    'TRAIN.OPTIMIZER.NAME': 'adamw',
    'TRAIN.OPTIMIZER.EPS': 1e-8,
    'TRAIN.OPTIMIZER.BETAS': (0.9, 0.999),
    'TRAIN.OPTIMIZER.MOMENTUM': 0.9,
    'AUG.COLOR_JITTER': 0.4,
    'AUG.AUTO_AUGMENT': 'rand-m9-mstd0.5-inc1',
    'AUG.REPROB': 0.25,
    'AUG.REMODE': 'pixel',
    'AUG.RECOUNT': 1,
    'AUG.MIXUP': 0.8,
    'AUG.CUTMIX': 1.0,
    'AUG.CUTMIX_MINMAX': None,
    'AUG.MIXUP_PROB': 1.0,
    'AUG.MIXUP_SWITCH_PROB': 0.5,
    'AUG.MIXUP_MODE': 'batch',
    'TEST.CROP': True,
}


def leaf(config, key):
    for name in key.split('.'):
        config = config[name]
    return config


def write(path, text):
    path.write_text(text)
    return path


def test_every_published_key_has_its_published_default(tmp_path):
    config = load_config(write(tmp_path / 'empty.yaml', 'TAG: default'))
    for key, default in PUBLISHED.items():
        assert leaf(config, key) == default, key
        assert type(leaf(config, key)) is type(default), key


@pytest.mark.parametrize('path', sorted(ROOT.glob('configs/*.yaml')), ids=lambda path: path.stem)
def test_every_yaml_loads_and_is_named_after_its_model(path):
    config = load_config(path)
    assert path.stem == config.MODEL.NAME
    assert config.is_frozen()
    header = path.read_text().splitlines()
    assert header[0].startswith('# ')


def test_base_files_come_before_the_file_and_options_after(tmp_path):
    write(tmp_path / 'grandparent.yaml', 'SEED: 1\nTAG: a\nTRAIN: {EPOCHS: 40, WARMUP_EPOCHS: 3}')
    write(tmp_path / 'parent.yaml', 'BASE: [grandparent.yaml]\nTAG: b\nSAVE_FREQ: 7')
    (tmp_path / 'sub').mkdir()
    child = write(tmp_path / 'sub' / 'child.yaml', 'BASE: [../parent.yaml]\nSAVE_FREQ: 8')
    config = load_config(child, ['TRAIN.EPOCHS', '50'])
    assert (config.SEED, config.TAG, config.SAVE_FREQ) == (1, 'b', 8)
    assert (config.TRAIN.EPOCHS, config.TRAIN.WARMUP_EPOCHS) == (50, 3)
    assert config.BASE == ['']  # merged: a dump stands alone


def test_a_dump_gives_the_same_tree(tmp_path):
    opts = ['TAG', '2024', 'MODEL.MSG.QK_SCALE', '0.5', 'AUG.CUTMIX_MINMAX', '[0.2, 0.8]', 'TRAIN.BASE_LR', '1e-05']
    config = load_config(TINY, opts)
    again = load_config(write(tmp_path / 'config.yaml', config.dump()))
    assert again == config
    assert again.TAG == '2024'


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
    assert leaf(config, key) == value
    assert type(leaf(config, key)) is type(value)


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path):
    assert load_config(write(tmp_path / 'c.yaml', 'TRAIN: {BASE_LR: 5e-3}')).TRAIN.BASE_LR == 5e-3


@pytest.mark.parametrize(
    ('opts', 'message'),
    [
        (['TRAIN.EPOCH', '3'], 'TRAIN.EPOCH does not exist: did you mean TRAIN.EPOCHS'),
        (['NOTHING.LIKE.IT', '3'], 'NOTHING.LIKE.IT does not exist'),
        (['TRAIN.EPOCHS.X', '3'], 'TRAIN.EPOCHS.X does not exist'),
        (['TRAIN', '3'], 'TRAIN is a group: write one of its keys'),
        (['SEED'], 'has no value for SEED'),
        (['BASE', "['x.yaml']"], 'BASE is for config files'),
        (['TRAIN.OPTIMIZER.EPS', '-1'], 'write a number at least 0'),
        (['DATA.INTERPOLATION', 'lanczos'], 'write one of nearest, bilinear, bicubic'),
        (['TRAIN.EPOCHS', '3.5'], 'TRAIN.EPOCHS is 3.5: write a whole number'),
        (['TRAIN.EPOCHS', 'True'], 'write a whole number'),
        (['TEST.CROP', '1'], 'write True or False'),
        (['TRAIN.BASE_LR', 'fast'], "TRAIN.BASE_LR is 'fast': write a number"),
        (['MODEL.MSG.DEPTHS', '2'], r'write a list such as \[1, 1\]'),
        (['MODEL.MSG.DEPTHS', '[2, 2.5]'], 'write a list'),
        (['MODEL.MSG.MANIP_TYPE', 'shift'], "MANIP_TYPE is 'shift': write one of shuf, none"),
        (['TRAIN.OPTIMIZER.NAME', 'lion'], 'write one of adamw, sgd'),
        (['TRAIN.LR_SCHEDULER.NAME', 'poly'], 'write one of cosine, linear, step'),
        (['DATA.DATASET', 'cifar'], 'write one of imagenet'),
        (['MODEL.TYPE', 'swin'], 'write one of msg'),
        (['TRAIN.NONFINITE', 'ignore'], "TRAIN.NONFINITE is 'ignore': write one of stop, skip"),
        (['AMP_DTYPE', 'fp16'], 'write one of float16, bfloat16'),
        (['SAVE_FREQ', '0'], 'SAVE_FREQ is 0: write a number at least 1'),
        (['MODEL.DROP_PATH_RATE', '1.5'], 'write a number between 0 and 0.999'),
        (['AUG.SCALE', '[1.0, 0.5]'], 'write two numbers, the smaller first'),
        (['AUG.CUTMIX_MINMAX', '[0.5]'], 'write two numbers'),
        (['TRAIN.OPTIMIZER.BETAS', '[0.5]'], 'write two numbers'),
        (['TRAIN.EPOCHS', '1'], 'WARMUP_EPOCHS 1 must be less than TRAIN.EPOCHS 1'),
        (['EVAL_MODE', 'True'], '--eval needs weights: add --resume'),
        (['EVAL_MODE', 'True', 'THROUGHPUT_MODE', 'True', 'MODEL.RESUME', 'x'], 'give one of them'),
        (['MODEL.RESUME', 'x', 'MODEL.PRETRAINED', 'y'], 'give one of them'),
    ],
)
def test_what_cannot_work_is_refused_with_what_to_write(opts, message):
    with pytest.raises(ConfigError, match=message):
        load_config(TINY, opts)


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
def test_files_that_cannot_work_are_named(tmp_path, text, message):
    path = write(tmp_path / 'bad.yaml', text)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(path)
    assert str(path.parent) in str(error.value)
    with pytest.raises(ConfigError, match='no file at all'):
        load_config('no file at all.yaml')


def test_flags_override_the_file_only_where_they_are_given():
    flags = {'batch_size': 2, 'data_path': 'd', 'resume': 'r', 'accumulation_steps': 0, 'use_checkpoint': True}
    flags |= {'amp_opt_level': 'O1', 'output': 'o', 'tag': '3', 'eval': True, 'throughput': None, 'local_rank': 0}
    config = get_config(Namespace(cfg=TINY, opts=['DATA.BATCH_SIZE', '6', 'TRAIN.ACCUMULATION_STEPS', '5'], **flags))
    assert (config.DATA.BATCH_SIZE, config.DATA.DATA_PATH, config.MODEL.RESUME) == (2, 'd', 'r')
    assert config.TRAIN.ACCUMULATION_STEPS == 0  # a flag can pass 0
    assert config.TRAIN.USE_CHECKPOINT
    assert config.EVAL_MODE
    assert not config.THROUGHPUT_MODE
    assert (config.AMP_OPT_LEVEL, config.OUTPUT, config.TAG) == ('O1', 'o', '3')
    assert get_config(Namespace(cfg=TINY, opts=None)) == load_config(TINY)
    with pytest.raises(ConfigError, match="'SEED' has no value for SEED"):
        get_config(Namespace(cfg=TINY, opts=['SEED'], tag='x'))


def test_nothing_can_write_to_a_loaded_tree():
    config = load_config(TINY)
    with pytest.raises(AttributeError):
        config.TRAIN.EPOCHS = 3


def test_every_key_has_one_comment():
    lines = (ROOT / 'config.py').read_text().splitlines()
    leaves = [i for i, line in enumerate(lines) if line.startswith('_C.') and not line.endswith('= CfgNode()')]
    assert len(leaves) > len(PUBLISHED)
    for i in leaves:
        assert lines[i - 1].startswith('# '), lines[i]
        assert not lines[i - 2].startswith('# '), lines[i]
