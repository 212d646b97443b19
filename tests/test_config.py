from argparse import Namespace

import pytest
import torch

import detection.config
import main as program
from config import TREE, ConfigError, get_config, load_config
from engine.config_tree import get, task_of_file
from tests.helpers.paths import DETECTION_CONFIGS, ROOT, TINY
from tests.helpers.runs import RecordingNode, folder_of
from tools.benchmark import throughput
from tools.benchmark.timing import Quartiles
from tools.unknown import flag_unknown

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

MULTI_LABEL = ['DATA.MULTI_LABEL', 'True', 'TRAIN.LOSS', 'bce', 'AUG.MIXUP', '0', 'AUG.CUTMIX', '0']


def test_every_published_key_has_its_published_default(tmp_path):
    (tmp_path / 'default.yaml').write_text('TAG: default')
    config = load_config(tmp_path / 'default.yaml')
    for key, default in PUBLISHED.items():
        value = get(config, key, 'test')
        assert value == default, key
        assert type(value) is type(default), key


@pytest.mark.parametrize('path', sorted(ROOT.glob('configs/*.yaml')), ids=lambda path: path.stem)
def test_every_yaml_loads_and_is_named_after_its_model(path):
    config = load_config(path)
    assert path.stem == config.MODEL.NAME
    assert config.is_frozen()


SIZES = ['DATA.IMG_SIZES', '[14, 28]', 'DATA.IMG_SIZE_EPOCHS', '[0, 1]']


@pytest.mark.parametrize(
    ('opts', 'message'),
    [
        (
            ['TRAIN.COMPILE', 'True', 'COMPILE_MODE', 'max-autotune', 'TRAIN.ACCUMULATION_STEPS', '2'],
            'max-autotune uses CUDA graphs.*pytorch/issues/169545.*: write COMPILE_MODE default',
        ),
        (['TRAIN.FROZEN_STAGES', '5'], 'TRAIN.FROZEN_STAGES is 5: write at most 2'),
        (['TRAIN.EPOCH', '3'], 'TRAIN.EPOCH does not exist: did you mean TRAIN.EPOCHS'),
        (['NOTHING.LIKE.IT', '3'], 'NOTHING.LIKE.IT does not exist'),
        (['TRAIN.EPOCHS.X', '3'], 'TRAIN.EPOCHS.X does not exist'),
        (['TRAIN', '3'], 'TRAIN is a group: write one of its keys'),
        (['SEED'], 'has no value for SEED'),
        (['BASE', "['x.yaml']"], 'BASE is for config files'),
        (['TRAIN.OPTIMIZER.EPS', '-1'], 'write a number at least 0'),
        (['DATA.INTERPOLATION', 'lanczos'], 'write one of nearest, bilinear, bicubic'),
        (['TRAIN.EPOCHS', '3.5'], 'TRAIN.EPOCHS is 3.5: write an integer'),
        (['TRAIN.EPOCHS', 'True'], 'write an integer'),
        (['TEST.CROP', '1'], 'write True or False'),
        (['TRAIN.BASE_LR', 'fast'], "TRAIN.BASE_LR is 'fast': write a number"),
        (['MODEL.MSG.DEPTHS', '2'], r'write a list such as \[2, 2, 6, 2\]'),
        (['MODEL.MSG.DEPTHS', '[2, 2.5]'], 'write a list'),
        (['MODEL.MSG.MANIP_TYPE', 'shove'], "MODEL.MSG: manip_type is 'shove': write one of 'shuf', 'none', 'mean', "),
        (['MODEL.MSG.MANIP_TYPE', '[shuf, none, mean]'], 'write one exchange, or a list of 2, one per stage'),
        (['TRAIN.OPTIMIZER.NAME', 'lino'], 'timm has no optimizer of that name: did you mean lion'),
        (['TRAIN.OPTIMIZER.NAME', 'kron'], "'kron': its random numbers are not in its state, so no run could resume"),
        (['TRAIN.OPTIMIZER.NAME', 'adahessian'], 'needs second-order gradients, which training does not compute'),
        (['TRAIN.OPTIMIZER.NAME', 'fusedlamb'], 'needs a GPU and apex, which is not supported'),
        (['TRAIN.OPTIMIZER.NAME', 'adan', 'TRAIN.OPTIMIZER.BETAS', '[0.9, 0.99]'], 'adan does not work with betas'),
        (['TRAIN.OPTIMIZER.ARGS', 'lr=1'], 'TRAIN.OPTIMIZER.ARGS has lr: write TRAIN.BASE_LR'),
        (['TRAIN.OPTIMIZER.ARGS', 'rho'], "TRAIN.OPTIMIZER.ARGS has 'rho': write name=value pairs"),
        (
            ['TRAIN.OPTIMIZER.NAME', 'lion', 'TRAIN.OPTIMIZER.ARGS', 'rho=1'],
            "lion does not work with ARGS rho=1: .*'rho'",
        ),
        (['TRAIN.OPTIMIZER.NAME', 'muon', 'TRAIN.OPTIMIZER.ARGS', 'conv_mode=x'], 'conv_mode=x: Invalid conv_mode: x'),
        (['TRAIN.OPTIMIZER.NAME', 'muon', 'TRAIN.OPTIMIZER.ARGS', 'adjust_lr_fn=x'], 'muon does not work with .*_fn=x'),
        (['DATA.IMG_SIZES', '[14, 28]'], r'DATA.IMG_SIZE_EPOCHS is \[\]: write the first epoch of each of the 2'),
        ([*SIZES, 'DATA.IMG_SIZE_EPOCHS', '[0, 2]'], 'from 0 on and below TRAIN.EPOCHS, 2'),
        ([*SIZES, 'DATA.IMG_SIZE_BATCHES', '[2]'], r'DATA.IMG_SIZE_BATCHES is \[2\]: write one for each of 2'),
        ([*SIZES, 'TRAIN.LR_SCHEDULER.NAME', 'step'], 'step schedule counts them: write TRAIN.LR_SCHEDULER.UNIT epoch'),
        ([*SIZES, 'DATA.IMG_SIZES', '[1, 28]'], r'DATA.IMG_SIZES is \[1, 28\]: write at least MODEL.MSG.PATCH_SIZE'),
        ([*SIZES, 'MODEL.MSG.APE', 'True'], 'needs a network of any size: write MODEL.MSG.APE False'),
        ([*SIZES, 'MODEL.TYPE', 'timm:vit_tiny_patch16_224'], 'vit_tiny_patch16_224 has a fixed one: leave out'),
        (
            [*SIZES, 'MODEL.TYPE', 'timm:vit_tiny_patch16_224', 'MODEL.TIMM_ARGS', 'dynamic_img_size=False'],
            r'write MODEL.TIMM_ARGS dynamic_img_size=True \(vit_\*\) or strict_img_size=False \(swin_\*\)',
        ),
        ([*SIZES, 'THROUGHPUT_MODE', 'True'], '--throughput times one image size: leave out DATA.IMG_SIZES'),
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
        (['DISTILL.TEACHER', 'timm:resnet19'], 'DISTILL.TEACHER is timm:resnet19: .* did you mean timm:resnet18'),
        (['DISTILL.TEACHER', 'x.pth', 'DISTILL.TEACHER_WEIGHTS', 'y.pth'], 'x.pth: leave it out .* is DISTILL.WEIGHT'),
        (['DISTILL.TEACHER', 'x.pth', 'MODEL.NUM_CLASSES', '0'], 'MODEL.NUM_CLASSES is 0: write the number of classes'),
        (['DISTILL.TEACHER', 'x.pth', 'DISTILL.CLASSES', '[cat]'], "the teacher's class of each of the 3 student"),
        ([*MULTI_LABEL, 'DISTILL.TEACHER', 'x.pth'], 'DISTILL.TEACHER teaches one class per image'),
        (['DATA.MULTI_LABEL', 'True'], 'DATA.MULTI_LABEL needs a loss of each class: write TRAIN.LOSS bce'),
        (['DATA.MULTI_LABEL', 'True', 'TRAIN.LOSS', 'bce'], 'write AUG.MIXUP 0 AUG.CUTMIX 0'),
        ([*MULTI_LABEL, 'DATA.SAMPLING', 'sqrt'], 'DATA.SAMPLING sqrt is for .* write DATA.SAMPLING uniform'),
        ([*MULTI_LABEL, 'TRAIN.CLASS_WEIGHTS', 'sqrt'], 'TRAIN.CLASS_WEIGHTS sqrt is for .* TRAIN.CLASS_WEIGHTS none'),
        (['TRAIN.LOSS', 'bce', 'TRAIN.BCE_THRESHOLD', '0'], 'targets are 0.033333 or 0.933333, both on one side'),
        ([*MULTI_LABEL, 'TRAIN.BCE_THRESHOLD', '0.95'], 'targets are 0.05 or 0.95, both on one side'),
        (['DATA.IMG_SIZE', '1'], 'DATA.IMG_SIZE is 1: write at least MODEL.MSG.PATCH_SIZE, 2'),
    ],
)
def test_invalid_values_are_refused_with_what_to_write(opts, message):
    with pytest.raises(ConfigError, match=message):
        load_config(TINY, opts)


def test_only_given_flags_override():
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


def test_flags_that_choose_weights(capsys):
    for flags, expected in (
        ([], 'auto'),
        (['--pretrained-weights', 'raw'], 'raw'),
        (['--pretrained-weights', 'ema'], 'ema'),
    ):
        config = get_config(program.parse_option(['--cfg', str(TINY), *flags]))
        assert expected == config.MODEL.PRETRAINED_WEIGHTS
    with pytest.raises(SystemExit):
        program.parse_option(['--cfg', str(TINY), '--pretrained-weights', 'best'])
    assert "invalid choice: 'best'" in capsys.readouterr().err
    with pytest.raises(ConfigError, match='--eval evaluates raw and EMA weights: leave out --pretrained-weights'):
        get_config(program.parse_option(['--cfg', str(TINY), '--eval', '--resume', 'x', '--pretrained-weights', 'raw']))


def test_every_key_has_a_help_text():
    for tree in (TREE, detection.config.TREE):
        for name, key in tree.keys.items():
            assert len(key.help) > 3, name
            assert key.help[0].isupper() or key.help[0] in '[(', name


def test_tasks_refuse_each_others_configs():
    for path in DETECTION_CONFIGS.glob('*.yaml'):
        with pytest.raises(ConfigError, match=r'yaml is for detection, and this program is for classification: '):
            load_config(path)
    for path in ROOT.glob('configs/*.yaml'):
        with pytest.raises(ConfigError, match=r'yaml is for classification, and this program is for detection: '):
            detection.config.load_config(path)


@pytest.mark.parametrize(
    ('text', 'task'),
    [
        ('TASK: detection', 'detection'),
        ('MODEL: {TYPE: cascade_rcnn}', 'detection'),  # from before there was the key
        ('MODEL: {TYPE: timm:resnet18}', 'classification'),
        ('SEED: 1', 'classification'),
        ('BASE: [base.yaml]', 'detection'),
        ('BASE: [base.yaml]\nTASK: classification', 'classification'),
    ],
)
def test_a_config_file_states_its_task(tmp_path, text, task):
    (tmp_path / 'base.yaml').write_text('TASK: detection')
    (tmp_path / 'config.yaml').write_text(text)
    assert task_of_file(tmp_path / 'config.yaml') == task


def test_bases_in_a_circle_are_an_error_for_the_task_too(tmp_path):
    (tmp_path / 'a.yaml').write_text('BASE: [a.yaml]')
    with pytest.raises(ConfigError, match='is among its own BASE files'):
        task_of_file(tmp_path / 'a.yaml')


def test_every_key_is_read(tiny_config, image_tree, monkeypatch):
    reads = set()

    def run(**options):
        program.main(node := RecordingNode(tiny_config(DATA__DATA_PATH=str(image_tree), **options), '', reads))
        return node

    run(TAG='adamw')
    run(TAG='adamw')
    run(TAG='pretrained', MODEL__PRETRAINED=str(folder_of(tiny_config(TAG='adamw')) / 'ckpt_epoch_1.pth'))
    run(
        TAG='sgd', TRAIN__OPTIMIZER__NAME='sgd', TRAIN__LR_SCHEDULER__NAME='step', TRAIN__LR_SCHEDULER__DECAY_EPOCHS='1'
    )
    run(TAG='timm', MODEL__TYPE='timm:resnet18', MODEL__TIMM_ARGS='channels=(4,8,8,8) layers=(1,1,1,1)')
    config = tiny_config(TAG='adamw')
    run(TAG='distilled', DISTILL__TEACHER='timm:msg_transformer_nano', DISTILL__CLASSES='[0,1,2]')
    tree = run(EVAL_MODE='True', MODEL__RESUME=str(folder_of(config) / 'ckpt_epoch_1.pth'))
    monkeypatch.setattr(torch, 'compile', lambda network, **_: network)
    monkeypatch.setattr(throughput, 'time_callable', lambda *_: Quartiles(1.0, 1.0, 1.0))
    monkeypatch.setattr(throughput, 'seconds_per_batch', lambda batches, warm_up: 1.0)
    run(THROUGHPUT_MODE='True', TEST__COMPILE='True')  # reads COMPILE_MODE
    flag_unknown(torch.zeros(1, 3), RecordingNode(tiny_config(TEST__UNKNOWN_SCORE='entropy'), '', reads))
    assert set(tree.leaves()) - reads == {'BASE'}  # read by `load_config`
