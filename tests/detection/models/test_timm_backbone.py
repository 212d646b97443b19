"""Backbones of timm: feature maps, weights of classifiers, frozen parts."""

import pytest
import timm
import torch
import torchvision
from torch import nn

import detection.main as program
from detection.config import load_config
from detection.models import build_detector
from detection.models.backbone import STRIDES, build_backbone, freeze_batch_norms
from engine.checkpoint import CheckpointError, save_checkpoint
from engine.config_tree import ConfigError
from optimizer import build_optimizer
from tests.helpers.detectors import NO_DROP_PATH, ONE_EPOCH, ground_truth, tiny_detector
from tests.helpers.paths import ROOT
from tests.helpers.runs import folder_of, last_checkpoint, log_of, one_thread
from tools.summary.complexity import count_detector

# Narrow networks of every kind: windows and NHWC, layer norms, batch norms, batch norms with maps between strides
SMALL = {
    'swin_tiny_patch4_window7_224': 'embed_dim=16 depths=(1,2,1,2) num_heads=(1,2,2,4)',
    'convnext_atto': 'dims=(8,16,24,32) depths=(1,1,1,1)',
    'resnet18': 'channels=(8,8,16,16) layers=(1,1,1,1)',
    'efficientnet_lite0': '',
}


def load(name='resnet18', *options):
    return tiny_detector('MODEL.BACKBONE', f'timm:{name}', 'MODEL.TIMM_ARGS', SMALL.get(name, ''), *options)


def arguments(name):
    return load(name).MODEL.TIMM_ARGS


@pytest.mark.parametrize('name', SMALL)
def test_feature_maps_have_the_strides_and_channels_that_the_detector_needs(name):
    backbone = build_backbone(load(name)).train()
    maps = backbone(torch.randn(2, 3, 96, 160))
    assert list(maps) == ['0', '1', '2', '3']
    for x, channels, stride in zip(maps.values(), backbone.out_channels, STRIDES, strict=True):
        assert x.shape == (2, channels, 96 // stride, 160 // stride)
        assert x.is_contiguous()
    sum(x.square().sum() for x in maps.values()).backward()
    assert all(p.grad is not None for p in backbone.parameters())  # none that DDP would wait for


def test_layer_norms_follow_the_maps_of_networks_without_batch_norms():
    images = torch.randn(1, 3, 64, 96)
    swin, resnet = (build_backbone(load(name)).eval() for name in ('swin_tiny_patch4_window7_224', 'resnet18'))
    for backbone in (swin, resnet):
        maps = backbone.model.forward_intermediates(images, indices=backbone.indices, intermediates_only=True)
        for x, out in zip(maps, backbone(images).values(), strict=True):
            if backbone is swin:
                x = nn.functional.layer_norm(x.movedim(1, -1), x.shape[1:2]).movedim(-1, 1)
            torch.testing.assert_close(out, x)


def test_swin_shifts_its_windows_in_every_stage_whatever_the_size():
    backbone = build_backbone(load('swin_tiny_patch4_window7_224'))
    for stage in backbone.model.layers:
        assert [block.window_size for block in stage.blocks] == [(7, 7)] * len(stage.blocks)
    assert backbone.model.layers[3].blocks[1].shift_size == (3, 3)


@pytest.mark.parametrize('name', SMALL)
def test_training_updates_every_part(name):
    with one_thread():
        detector = build_detector(load(name, *NO_DROP_PATH)).train()
        optimizer = build_optimizer(load(name), detector, 0.01, decay_biases=True)
        before = {key: x.clone() for key, x in detector.backbone.body.named_parameters()}
        losses = detector([torch.rand(3, 64, 96)], [ground_truth((8, 8, 40, 50), size=(64, 96))])
        sum(losses.values()).backward()
        optimizer.step()
        body = detector.backbone.body
        changed = {key for key, x in body.named_parameters() if not torch.equal(x, before[key])}
        for stage in body.stages:
            assert any(key.startswith(f'model.{stage}.') for key in changed)
        assert next(iter(before)) in changed


def test_what_timm_does_not_decay_is_not_decayed():
    detector = build_detector(load('swin_tiny_patch4_window7_224'))
    decay, no_decay = build_optimizer(load(), detector, 0.1, decay_biases=True).param_groups
    names = {id(p): name for name, p in detector.named_parameters()}
    tables = {name for name in names.values() if 'relative_position_bias_table' in name}
    assert len(tables) == 6
    assert tables <= {names[id(p)] for p in no_decay['params']}
    assert not tables & {names[id(p)] for p in decay['params']}


@pytest.mark.parametrize('name', SMALL)
def test_a_classifiers_weights_start_the_backbone(name):
    backbone = build_backbone(load(name))
    classifier = build_classifier(name)
    weights, notes = backbone.fit_classifier(classifier.state_dict())
    backbone.load_state_dict(weights)
    own = classifier.state_dict()
    for key, value in backbone.model.state_dict().items():
        assert torch.equal(value, own[key]), key
    unused = {'resnet18': 0, 'efficientnet_lite0': 6}.get(name, 2)  # the last norm; the last convolution with its norm
    assert [note.split()[0] for note in notes] == [str(unused)] * bool(unused)


def build_classifier(name):
    from models.timm_networks import parse_timm_args

    return timm.create_model(name, num_classes=5, **parse_timm_args(arguments(name)))


def test_weights_of_torchvision_and_of_swins_authors_load():
    backbone = build_backbone(tiny_detector('MODEL.BACKBONE', 'timm:resnet50'))
    weights, notes = backbone.fit_classifier(torchvision.models.resnet50().state_dict())
    backbone.load_state_dict(weights)
    assert notes == []
    swin = build_backbone(load('swin_tiny_patch4_window7_224'))
    classifier = build_classifier('swin_tiny_patch4_window7_224').state_dict()
    published = {}  # merging ends a stage there, and begins one in timm
    for key, x in classifier.items():
        parts = key.replace('head.fc.', 'head.').split('.')
        if 'downsample' in parts:
            parts[1] = str(int(parts[1]) - 1)
        published['.'.join(parts)] = x
    assert published.keys() != classifier.keys()
    weights, _ = swin.fit_classifier(published)
    swin.load_state_dict(weights)
    assert torch.equal(
        swin.model.layers[1].downsample.reduction.weight, classifier['layers.1.downsample.reduction.weight']
    )


def test_weights_of_another_network_are_refused():
    detector = build_detector(load('swin_tiny_patch4_window7_224'))
    for other in (torchvision.models.resnet18(), torchvision.models.swin_t()):
        with pytest.raises(CheckpointError, match='other.pth holds a different model from the config: missing: model'):
            program.load_classifier(detector, {'model': other.state_dict()}, 'other.pth')


@pytest.mark.parametrize('name', SMALL)
def test_frozen_stages_are_not_trained(name):
    backbone = build_backbone(load(name))
    order = [key for key, _ in backbone.model.named_parameters()]
    counts = []
    for count in range(-1, 5):
        backbone = build_backbone(load(name))
        backbone.freeze_stages(count)
        frozen = [key for key, p in backbone.model.named_parameters() if not p.requires_grad]
        assert frozen == order[: len(frozen)]
        counts.append(len(frozen))
        if count > 0:
            assert frozen[-1].startswith(f'{backbone.stages[count - 1]}.')
        images = torch.randn(1, 3, 64, 64)
        maps = backbone.train()(images)
        sum(x.sum() for x in maps.values()).backward() if count < 4 or len(backbone.out_norms) else None
        assert all(p.grad is None for key, p in backbone.model.named_parameters() if key in frozen)
    assert counts[0] == 0
    assert counts == sorted(set(counts))
    with pytest.raises(ValueError, match='5 stages cannot be frozen: the network has 4'):
        backbone.freeze_stages(5)


def test_batch_norms_stay_as_loaded():
    backbone = build_backbone(load('resnet18'))
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert freeze_batch_norms(backbone) == len(norms)
    before = {key: x.clone() for key, x in backbone.state_dict().items()}
    backbone.train()(torch.randn(2, 3, 64, 64))
    assert not any(norm.training for norm in norms)
    assert backbone.model.layer1.training
    assert all(torch.equal(x, before[key]) for key, x in backbone.state_dict().items())
    assert not any(p.requires_grad for norm in norms for p in norm.parameters())
    assert freeze_batch_norms(build_backbone(tiny_detector())) == 0


def test_batch_norms_are_frozen_only_with_weights(tmp_path, coco):
    def run(tag, *options):
        config = load(
            'resnet18', 'DATA.DATA_PATH', str(coco), 'OUTPUT', str(tmp_path), 'TAG', tag, *ONE_EPOCH, *options
        )
        with one_thread():
            program.main(config)
        return config

    save_checkpoint(tmp_path / 'classifier.pth', {'model': build_classifier('resnet18').state_dict()})
    pretrained = ['MODEL.PRETRAINED', str(tmp_path / 'classifier.pth')]
    statistics = 'backbone.body.model.bn1.running_mean'
    configs = [run('a'), run('b', *pretrained), run('c', *pretrained, 'TRAIN.FROZEN_BATCH_NORM', 'False')]
    moved = [bool(last_checkpoint(config)['model'][statistics].any()) for config in configs]
    assert moved == [True, False, True]
    message = 'batch norms of the backbone stay as they were loaded'
    assert [message in log_of(config) for config in configs] == [False, True, False]
    again = run('b', *pretrained, 'TRAIN.EPOCHS', '2')  # a run that resumes keeps them
    assert not last_checkpoint(again)['model'][statistics].any()
    assert len(list(folder_of(again).glob('ckpt_epoch_*.pth'))) == 2
    run('d', *pretrained, 'TRAIN.FROZEN_STAGES', '2')
    with pytest.raises(ConfigError, match='TRAIN.FROZEN_STAGES freezes trained weights: give them with --pretrained'):
        run('e', 'TRAIN.FROZEN_STAGES', '2')


@pytest.mark.parametrize(
    ('name', 'options', 'message'),
    [
        (
            'vit_tiny_patch16_224',
            [],
            r'of strides \[16, 16, 16\]: choose a network that has \[4, 8, 16, 32\]',
        ),
        ('maxvit_pico_rw_256', [], 'does not take images of any size: '),
        ('coatnet_nano_rw_224', [], 'does not take images of any size: '),
        ('resnet', [], 'MODEL.BACKBONE is timm:resnet: timm has no network of that name: did you mean timm:resne'),
        ('resnet18', ['MODEL.TIMM_ARGS', 'depth=3'], "MODEL.BACKBONE timm:resnet18 cannot be built with .*'depth'"),
        ('resnet18', ['TRAIN.RECOMPUTE_MLP', 'True'], 'TRAIN.RECOMPUTE_MLP is for MSG-Transformers: write False'),
    ],
)
def test_a_backbone_that_cannot_work_is_refused_before_any_work(name, options, message):
    with pytest.raises(ConfigError, match=message):
        tiny_detector('MODEL.BACKBONE', f'timm:{name}', *options)


def test_swins_cascade_has_the_published_size():
    counted = count_detector(load_config(ROOT / 'detection' / 'configs' / 'cascade_mask_rcnn_swin_tiny_3x.yaml'))
    assert counted.parameters == 85_629_804  # published: 86M, 745G
    assert counted.measured == pytest.approx(744.8e9, abs=0.05e9)
