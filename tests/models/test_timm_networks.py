"""Networks of timm, trained by main.py under the same recipe."""

import re

import pytest
import timm
import torch
from torch import nn

import main as program
from config import load_config
from engine.config_tree import ConfigError
from engine.run_task import build_network
from models import build_model, timm_networks
from models.build import head_pattern
from models.timm_networks import parse_timm_args, shaping_args
from tests.helpers.paths import TINY
from tests.helpers.runs import build_run, folder_of, records

SWIN = ('timm:swin_tiny_patch4_window7_224', 'patch_size=2 embed_dim=8 depths=(1,1) num_heads=(1,2)')
RESNET = ('timm:resnet18', 'channels=(4,8,8,8) layers=(1,1,1,1)')


def load(type_, arguments='', *options):
    return load_config(TINY, ['MODEL.TYPE', type_, 'MODEL.TIMM_ARGS', arguments, *options])


def test_arguments_are_timms_and_the_configs():
    network = build_model(load(*SWIN, 'MODEL.DROP_PATH_RATE', '0.2', 'DATA.IMG_SIZE', '56'))
    assert type(network) is timm.models.swin_transformer.SwinTransformer
    assert network.num_classes == 3
    assert network.patch_embed.img_size == (56, 56)
    assert network.patch_embed.patch_size == (2, 2)
    assert [len(stage.blocks) for stage in network.layers] == [1, 1]
    assert network.layers[1].blocks[0].drop_path1.drop_prob == pytest.approx(0.2)
    assert isinstance(build_model(load(*SWIN)).layers[1].blocks[0].drop_path1, nn.Identity)  # timm's default is 0.1
    grey = build_model(load(*RESNET, 'MODEL.MSG.IN_CHANS', '1', 'TRAIN.USE_CHECKPOINT', 'True'))
    assert grey.conv1.in_channels == 1
    assert grey.grad_checkpointing


def test_values_are_pythons_else_text():
    assert parse_timm_args('') == {}
    assert parse_timm_args(' depths=(2,2)  norm=layer_norm rate=0.1 flag=False drop=None') == {
        'depths': (2, 2), 'norm': 'layer_norm', 'rate': 0.1, 'flag': False, 'drop': None
    }  # fmt: skip
    for text in ('depths', 'depths= (2, 2)', '=3', '3=3'):
        with pytest.raises(ValueError, match='write name=value pairs'):
            parse_timm_args(text)


@pytest.mark.parametrize(
    ('type_', 'arguments', 'options', 'message'),
    [
        ('timm:resnet', '', [], 'timm has no network of that name: did you mean timm:resnet'),
        ('timm:', '', [], 'timm has no network of that name, see'),
        ('msg', 'depth=3', [], 'MODEL.TIMM_ARGS is for networks of timm'),
        ('resnet18', '', [], 'write one of msg, timm:<name>'),
        ('timm:resnet18', 'depth', [], "MODEL.TIMM_ARGS has 'depth'"),
        ('timm:resnet18', 'num_classes=3', [], 'MODEL.TIMM_ARGS has num_classes: write MODEL.NUM_CLASSES'),
        ('timm:resnet18', 'checkpoint_path=x.pth', [], 'MODEL.TIMM_ARGS has checkpoint_path: write --pretrained'),
        ('timm:swin_tiny_patch4_window7_224', 'embed_dim=-48', [], 'cannot be built'),
        ('timm:vgg11', '', ['MODEL.DROP_PATH_RATE', '0.1'], 'cannot be built with .*drop_path_rate=0.1'),
        (
            'timm:resnet18',
            'depth=3',
            [],
            "cannot be built with .*in_chans=3, .*depth=3: .*argument 'depth'",
        ),
        ('timm:convnext_atto', 'dims=(8,8) depths=(1,1)', [], 'cannot be built with'),
        (
            'timm:resnet18',
            '',
            ['TRAIN.RECOMPUTE_MLP', 'True'],
            'RECOMPUTE_MLP is for MSG-Transformers: write False',
        ),
        ('timm:resnet18', '', ['TRAIN.FROZEN_STAGES', '1'], 'TRAIN.FROZEN_STAGES is for MODEL.TYPE msg: write -1'),
    ],
)
def test_what_cannot_be_built_is_refused_before_any_work(type_, arguments, options, message):
    with pytest.raises(ConfigError, match=message):
        load(type_, arguments, *options)


NOT_OF_THE_NETWORK = [
    'pretrained=True',
    "pretrained_cfg={'url':'http://localhost/x'}",
    "pretrained_cfg_overlay={'url':'http://localhost/x'}",
    'cache_dir=/tmp/x',
    'model_name=resnet34',
    'pretrained_strict=False',
    *(['pretrained_model_args={}'] if 'pretrained_model_args' in timm_networks.RESERVED else []),  # timm >= 1.0.31
    'kwargs_filter=()',
    'model_cfg={}',
    'out_indices=(0,)',
    'device=cuda',
    'scriptable=True',
]


@pytest.mark.parametrize('argument', NOT_OF_THE_NETWORK)
def test_arguments_that_do_not_shape_the_network_are_refused(argument):
    name = argument.partition('=')[0]
    with pytest.raises(ConfigError, match=f'MODEL.TIMM_ARGS has {name}: '):
        load('timm:resnet18', argument)


@pytest.mark.parametrize('name', ['hf-hub:timm/resnet18', 'local-dir:/tmp/x', 'resnet18/../x', 'resnet18.a:b'])
def test_names_of_networks_elsewhere_are_refused(name, monkeypatch):
    monkeypatch.setattr('timm.models._factory.load_model_config_from_hf', refuse)
    monkeypatch.setattr('timm.models._factory.load_model_config_from_path', refuse)
    with pytest.raises(ConfigError, match=f'MODEL.TYPE is timm:{name}: timm has no network of that name'):
        load(f'timm:{name}')


def refuse(*_, **__):
    raise AssertionError('weights are fetched')


def test_no_weights_are_fetched(monkeypatch):
    """Whatever the config holds: a tree that was changed after its check has no other effect."""
    monkeypatch.setattr('timm.models._builder.load_pretrained', refuse)
    config = load(*RESNET)
    build_model(config)
    monkeypatch.setattr(timm_networks, 'RESERVED', {})
    config.defrost()
    config.MODEL.TIMM_ARGS += ' pretrained=True'
    assert sum(x.numel() for x in build_model(config).parameters()) < 1e5


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('', ''),
        ('patch_size=2  depths=(1,1)', 'patch_size=2 depths=(1,1)'),
        ('pretrained=True patch_size=2', 'patch_size=2'),
        ("cache_dir=. pretrained_cfg_overlay={'url':'x'} pretrained window_size=8", 'window_size=8'),
    ],
)
def test_a_checkpoints_config_only_shapes_the_network(text, expected):
    assert shaping_args(text) == expected


@pytest.mark.parametrize(('type_', 'arguments'), [SWIN, RESNET], ids=['swin', 'resnet'])
def test_class_weights_are_those_that_the_number_of_classes_changes(type_, arguments):
    three, five = (build_model(load(type_, arguments, 'MODEL.NUM_CLASSES', str(n))) for n in (3, 5))
    sizes = {name: value.shape for name, value in five.state_dict().items()}
    changed = {name for name, value in three.state_dict().items() if value.shape != sizes[name]}
    assert {name for name in sizes if re.match(head_pattern(three), name)} == changed
    assert changed


def test_training_resumes_and_fine_tuning_starts_with_a_new_head(tiny_config, image_tree):
    options = {'DATA__DATA_PATH': str(image_tree), 'MODEL__TYPE': SWIN[0], 'MODEL__TIMM_ARGS': SWIN[1]}
    program.main(tiny_config(**options))
    config = tiny_config(**options, TRAIN__EPOCHS='3')
    program.main(config)
    assert [record['epoch'] for record in records(config, 'epoch')] == [0, 1, 2]
    last = str(folder_of(config) / 'ckpt_epoch_2.pth')
    program.main(tiny_config(**options, EVAL_MODE='True', MODEL__RESUME=last))
    tuned = tiny_config(**options, TAG='tuned', MODEL__PRETRAINED=last, MODEL__PRETRAINED_HEAD='new')
    program.main(tuned)
    log = (folder_of(tuned) / 'log_rank0.txt').read_text()
    assert 'MODEL.PRETRAINED_HEAD is new: the head starts from scratch' in log


def test_msg_transformers_class_weights_are_the_head():
    network = build_model(load_config(TINY))
    assert head_pattern(network) == r'head\.'
    assert isinstance(network.head, nn.Linear)


def test_channels_last(tiny_config):
    config = tiny_config(MODEL__TYPE=RESNET[0], MODEL__TIMM_ARGS=RESNET[1], MODEL__CHANNELS_LAST='True')
    network = build_network(build_run(config), program.TASK)
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert all(module.weight.is_contiguous(memory_format=torch.channels_last) for module in convolutions)
    maps = network.forward_features(torch.zeros(2, 3, 56, 56))
    assert maps.is_contiguous(memory_format=torch.channels_last)
    assert not maps.is_contiguous()
