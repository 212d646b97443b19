"""Classifier, image size, checkpointing, pruning and parameter groups of a built network."""

import copy

import pytest
import torch
from timm.models import group_parameters

from models import MSGTransformer
from models.resize import resize_bias_table, tile_msg_tokens
from tests.helpers.golden import fill_, images, micro, normal

NARROW = {'embed_dim': 16, 'depths': (1, 1, 2, 1), 'num_heads': (1, 2, 4, 8), 'num_classes': 5}


def test_the_classifier_is_replaced():
    model = micro().double().eval()
    assert model.get_classifier() is model.head
    model.reset_classifier(3)
    head = model.get_classifier()
    assert (model.num_classes, head.out_features, head.weight.dtype, head.training) == (3, 3, torch.float64, False)
    assert head.weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert not head.bias.any()
    assert model.flops() == micro(num_classes=3).flops()
    assert model(images(2, 56).double()).shape == (2, 3)
    model.reset_classifier(0)
    assert model.global_pool == 'avg'
    assert model(images(2, 56).double()).shape == (2, model.head_hidden_size)
    model.reset_classifier(0, '')
    assert model(images(2, 56).double()).shape == (2, 1, 1, 64)
    with pytest.raises(ValueError, match="global_pool is 'max': write one of 'avg', ''"):
        model.reset_classifier(3, 'max')


@torch.no_grad()
def test_another_size_is_what_a_network_built_for_it_is():
    cases = [((384, None), {'img_size': 384}), ((384, 12), {'img_size': 384, 'window_size': 12})]
    cases += [(((100, 150), None), {'img_size': (100, 150)}), ((64, 2), {'img_size': 64, 'window_size': 2})]
    for (img_size, window_size), options in cases:
        model = fill_(MSGTransformer(**NARROW)).eval()
        model.set_input_size(img_size, window_size)
        built = MSGTransformer(**NARROW | options).eval()
        assert (model.img_size, model.window_size, model.pool_size) == (
            built.img_size,
            built.window_size,
            built.pool_size,
        )
        assert model.flops() == built.flops()
        assert str(model) == str(built)
        built.load_state_dict(model.state_dict())
        batch = normal('images', (1, 3, *built.img_size))
        assert torch.equal(model(batch), built(batch))
        loaded = MSGTransformer(**NARROW | options).eval()
        loaded.load_state_dict(loaded.fit_state_dict(fill_(MSGTransformer(**NARROW)).state_dict())[0])
        assert torch.equal(loaded(batch), built(batch))


@torch.no_grad()
def test_windows_that_shrink_to_fit_and_the_position_embedding_follow():
    options = {'depths': (1,), 'num_heads': (1,), 'shuffle_size': (2,), 'ape': True}
    model, built = fill_(micro(**options)).eval(), micro(**options, img_size=8)
    model.requires_grad_(False).set_input_size(8)
    assert not any(p.requires_grad for p in model.parameters())
    assert model.layers[0].window_size == built.layers[0].window_size == 4
    assert {name: p.shape for name, p in model.named_parameters()} == {n: p.shape for n, p in built.named_parameters()}
    built.load_state_dict(built.fit_state_dict(fill_(micro(**options)).state_dict())[0])
    assert torch.equal(model(images(1, 8)), built.eval()(images(1, 8)))


@torch.no_grad()
def test_the_same_size_changes_nothing():
    model = fill_(MSGTransformer(**NARROW)).eval().requires_grad_(False)
    parameters = list(model.parameters())
    model.set_input_size()
    model.set_input_size(224, 7)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    model.set_input_size(384, 12)
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match='smaller than one patch'):
        model.set_input_size(3)
    for window_size in (0, -1, (8, 8)):
        with pytest.raises(ValueError, match='window_size is .*: write a positive integer'):
            model.set_input_size(window_size=window_size)
    with pytest.raises(ValueError, match='num_classes is -3: write 0 for no head, or more'):
        model.reset_classifier(-3)
    assert (model.img_size, model.window_size) == ((384, 384), 12)


def test_bias_tables_are_interpolated():
    ramp = torch.arange(-6.0, 7.0)  # offsets of window 7
    table = torch.stack((ramp[:, None].expand(13, 13).flatten(), ramp.repeat(13)), dim=1)
    assert resize_bias_table(table, 7).equal(table)
    resized = resize_bias_table(table, 12).view(23, 23, 2)
    positions = (torch.arange(23) - 11) * 13 / 23  # the same extent, finer
    inner = slice(4, -4)
    torch.testing.assert_close(resized[inner, 11, 0], positions[inner])
    torch.testing.assert_close(resized[11, inner, 1], positions[inner])
    assert resized[11, 11].abs().max() < 1e-5


def test_msg_tokens_are_repeated_or_cropped():
    tokens = torch.arange(4.0).view(1, 4, 1, 1)
    assert tile_msg_tokens(tokens, 3).flatten().tolist() == [0, 1, 0, 2, 3, 2, 0, 1, 0]
    assert tile_msg_tokens(tokens, 1).flatten().tolist() == [0]
    assert tile_msg_tokens(tokens, 2).equal(tokens)


def test_checkpointing_is_switched():
    model, calls = micro(), []
    for layer in model.layers:
        for block in layer.blocks:
            block.register_forward_pre_hook(lambda *_: calls.append(1))
    for enable, expected in ((True, 8), (False, 4)):
        calls.clear()
        model.set_grad_checkpointing(enable)
        model(images(1, 56)).sum().backward()
        assert len(calls) == expected


@pytest.mark.parametrize('i', range(4))
def test_pruning_keeps_the_feature_maps(i):
    model = fill_(MSGTransformer(**NARROW)).eval()
    batch = images(1, 96)
    maps = model.forward_intermediates(batch, intermediates_only=True)
    pruned = copy.deepcopy(model)
    assert pruned.prune_intermediate_layers([i - 4]) == [i]
    feature_map = pruned.forward_intermediates(batch, indices=[i], intermediates_only=True)[0]
    assert torch.equal(feature_map, maps[i])
    features = pruned.forward_features(batch)
    assert features.shape[-1] == pruned.num_features == pruned.head_hidden_size == 16 * 2**i
    (feature_map.sum() + features.sum()).backward()
    assert not [name for name, p in pruned.named_parameters() if p.grad is None]
    assert pruned(batch).shape == features.shape  # neither pooled nor classified


@torch.no_grad()
def test_pruning_after_the_last_stage_spares_what_it_is_told_to():
    model = fill_(MSGTransformer(**NARROW)).eval()
    logits = model(images(1, 96))
    model.prune_intermediate_layers([0, 3], prune_head=False)
    assert torch.equal(model(images(1, 96)), logits)
    model.prune_intermediate_layers([3], prune_norm=True)
    assert isinstance(model.norm, torch.nn.Identity)
    with pytest.raises(ValueError, match='the network has 4 stages, 0 to 3'):
        model.prune_intermediate_layers([4])


def test_parameter_groups_are_stem_blocks_and_head():
    model = micro(ape=True)  # 1 + 2 + 1 blocks
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert sorted(set(groups.values())) == [0, 1, 2, 3, 4, 5]
    stem = {name for name, group in groups.items() if group == 0}
    assert {name.split('.')[0] for name in stem} == {'patch_embed', 'msg_tokens', 'absolute_pos_embed'}
    assert groups['layers.0.blocks.0.norm1.weight'] == groups['layers.0.downsample.norm.weight'] == 1
    assert [groups[f'layers.1.blocks.{j}.attn.qkv.weight'] for j in (0, 1)] == [2, 3]
    assert groups['layers.1.downsample.norm.weight'] == 3
    assert groups['layers.2.blocks.0.mlp.fc1.bias'] == groups['norm.weight'] == 4
    assert {name for name, group in groups.items() if group == 5} == {'head.weight', 'head.bias'}
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert coarse['layers.1.blocks.0.norm1.weight'] == coarse['layers.1.downsample.norm.weight'] == 2
