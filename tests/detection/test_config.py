import pytest

from detection.config import get_config, load_config
from detection.main import parse_option
from detection.models import build_detector
from engine.config_tree import ConfigError
from tests.helpers.paths import DETECTION_CONFIGS, TINY_DETECTOR


@pytest.mark.parametrize('path', sorted(DETECTION_CONFIGS.glob('*.yaml')), ids=lambda path: path.stem)
def test_every_yaml_loads_and_is_named_after_its_model(path):
    config = load_config(path)
    assert config.MODEL.NAME.endswith(path.stem)
    assert config.is_frozen()
    assert path.read_text().startswith('# ')
    assert f'detection/configs/{path.name}' in path.read_text() or 'make demo-detection' in path.read_text()


def test_defaults_are_the_published_recipe(tmp_path):
    (tmp_path / 'empty.yaml').write_text('TAG: default')
    assert load_config(tmp_path / 'empty.yaml') == load_config(DETECTION_CONFIGS / 'cascade_mask_rcnn_msg_tiny_3x.yaml')


def test_a_dump_gives_the_same_tree(tmp_path):
    config = load_config(TINY_DETECTOR, ['TRAIN.BASE_LR', '1e-05', 'MODEL.BOX.CONVS', '[]'])
    (tmp_path / 'config.yaml').write_text(config.dump())
    assert load_config(tmp_path / 'config.yaml') == config


@pytest.mark.parametrize(
    ('opts', 'message'),
    [
        (['DATA.IMG_SIZE', '224'], 'DATA.IMG_SIZE does not exist'),
        (['AUG.MIXUP', '0.8'], 'AUG.MIXUP does not exist'),
        (['TRAIN.WARMUP_EPOCHS', '3'], 'TRAIN.WARMUP_EPOCHS does not exist: did you mean TRAIN.WARMUP_STEPS'),
        (['AMP_OPT_LEVEL', 'O2'], 'write one of .*O0, O1'),
        (['MODEL.BOX.LOSS', 'iou'], 'write one of giou, l1'),
        (['MODEL.BOX.IOUS', '[0.5, 0.6]'], 'differ in length: write one entry per stage'),
        (['MODEL.BOX.LINEARS', '[]'], r'MODEL.BOX.LINEARS is \[\]'),
        (['MODEL.MASK.CONVS', '[]'], r'MODEL.MASK.CONVS is \[\]'),
        (['MODEL.MSG.DEPTHS', '[1, 1]'], 'write four'),
        (['MODEL.TIMM_ARGS', 'embed_dim=48'], 'MODEL.TIMM_ARGS is for networks of timm'),
        (['TRAIN.FROZEN_STAGES', '9'], 'TRAIN.FROZEN_STAGES is 9: 9 stages cannot be frozen: the network has 4'),
        (
            ['MODEL.BACKBONE', 'timm:vgg11', 'MODEL.TIMM_ARGS', 'drop_path_rate=None', 'TRAIN.FROZEN_STAGES', '1'],
            'TRAIN.FROZEN_STAGES is 1: stages of .* cannot be frozen',
        ),
        (['MODEL.MSG.PATCH_SIZE', '3'], 'write a power of 2'),
        (['MODEL.RPN.NEGATIVE_IOU', '0.8'], 'write at most POSITIVE_IOU, 0.7'),
        (['MODEL.NUM_CLASSES', '0'], 'write a number at least 1'),
        (['INPUT.TRAIN_SHORT', '[]'], r'INPUT.TRAIN_SHORT is \[\]'),
        (['INPUT.CROP_SIZE', '[600, 384]'], 'the smaller first'),
        (['TRAIN.LR_SCHEDULER.DECAY_EPOCHS', '[33, 27]'], 'write them in order'),
        (['EVAL_MODE', 'True'], '--eval needs weights'),
        (
            ['EVAL_MODE', 'True', 'MODEL.RESUME', 'x', 'THROUGHPUT_MODE', 'True'],
            '--eval and --throughput exclude each other',
        ),
        (['SHOW', '3'], '--show draws detections of an evaluation: add --eval'),
        (['MODEL.RESUME', 'x', 'MODEL.PRETRAINED', 'y'], 'give one of them'),
    ],
)
def test_values_that_cannot_work_are_refused_with_a_remedy(opts, message):
    with pytest.raises(ConfigError, match=message):
        load_config(TINY_DETECTOR, opts)


def test_flags_override_their_keys():
    flags = ['--batch-size', '3', '--data-path', 'd', '--resume', 'r', '--use-checkpoint', '--eval', '--show', '4']
    config = get_config(parse_option(['--cfg', str(TINY_DETECTOR), *flags, '--opts', 'SHOW_SCORE', '0.1']))
    assert (config.DATA.BATCH_SIZE, config.DATA.DATA_PATH, config.MODEL.RESUME) == (3, 'd', 'r')
    assert (config.TRAIN.USE_CHECKPOINT, config.EVAL_MODE, config.SHOW, config.SHOW_SCORE) == (True, True, 4, 0.1)
    assert get_config(parse_option(['--cfg', str(TINY_DETECTOR), '--throughput'])).THROUGHPUT_MODE


def test_the_number_of_classes_may_be_that_of_data_but_not_without_data(tmp_path):
    for text in ('None', 'null'):
        (tmp_path / 'classes.yaml').write_text(f'MODEL: {{NUM_CLASSES: {text}}}')
        config = load_config(tmp_path / 'classes.yaml')
        assert config.MODEL.NUM_CLASSES is None
    with pytest.raises(ConfigError, match='MODEL.NUM_CLASSES is None, which is for training and evaluation'):
        build_detector(config)
