import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import MSGTransformer, build_model
from models.layers import OverlapPatchMerging, PatchMerging
from tests.helpers.golden import V2, fill_, images, labels, micro

# Options that each change the network, on top of `micro`.
OPTIONS = {
    'v1': {},
    'v2': V2,
    'mixed': {'embed_type': 'overlap'},
    'conv': {'embed_type': 'conv'},
    'ape': {'ape': True},
    'no patch norm': {'patch_norm': False},
    'no qkv bias': {'qkv_bias': False},
    'qk scale': {'qk_scale': 0.5},
    'mlp ratio': {'mlp_ratio': 2.5},
    'dropout': {'drop_rate': 0.1, 'attn_drop_rate': 0.1, 'drop_path_rate': 0.1},
    'no shuffle': {'manip_type': 'none'},
    'grey': {'in_chans': 1},
    'checkpoint': {'use_checkpoint': True},
    'more windows left': {'img_size': 112, 'shuffle_size': (4, 2, 2)},
    'features': {'num_classes': 0},
    'window 4': {'window_size': 4, 'img_size': 64},
    'two stages': {'depths': (1, 1), 'num_heads': (1, 2), 'shuffle_size': (4, 2)},
    'rectangle': {'img_size': (56, 112)},
    'padded': {'img_size': (50, 70)},
    'padded v2': {'img_size': (33, 57), **V2},
    'padded conv': {'img_size': (33, 57), 'embed_type': 'conv'},
    'padded ape': {'img_size': 60, 'ape': True},
    'recompute mlp': {'recompute_mlp': True},
}


def inputs(model, n=2):
    return torch.randn(n, model.in_chans, *model.img_size)


@pytest.mark.parametrize('option', OPTIONS)
def test_every_parameter_gets_a_gradient(option):
    model = fill_(micro(**OPTIONS[option])).train()
    out = model(inputs(model))
    assert out.shape == (2, model.num_classes or model.num_features)
    out.square().sum().backward()
    # Only MSG tokens are read of the last block, so no patch asks for a bias there; and a bias on all that the MSG
    # token attends to shifts a whole row of the softmax, which changes nothing.
    last = f'layers.{len(model.layers) - 1}.blocks.0.attn'
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradient = parameter.grad[:, 0] if name.endswith('rel_pos_msg') else parameter.grad
        without_effect = name in (f'{last}.relative_position_bias_table', f'{last}.rel_pos_msg')
        assert (gradient.abs().max() == 0) == without_effect, name


@pytest.mark.parametrize('option', OPTIONS)
def test_checkpointing_equals_the_plain_forward_and_backward(option):
    results = []
    for use_checkpoint in (False, True):
        model = fill_(micro(**OPTIONS[option] | {'use_checkpoint': use_checkpoint})).train()
        torch.manual_seed(1)
        x = inputs(model)
        out = model(x)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad for p in model.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, plain)


@pytest.mark.parametrize('use_checkpoint', [False, True])
def test_checkpointing_runs_every_block_again_in_the_backward_pass(use_checkpoint):
    model, calls = micro(use_checkpoint=use_checkpoint).train(), []
    for layer in model.layers:
        for block in layer.blocks:
            block.register_forward_pre_hook(lambda *_: calls.append(1))
    model(inputs(model)).sum().backward()
    assert len(calls) == (8 if use_checkpoint else 4)


def test_build_model_uses_every_key(tiny_config, monkeypatch):
    keys = 'PATCH_SIZE 1 IN_CHANS 2 EMBED_DIM 15 DEPTHS (4,) NUM_HEADS (5,) WINDOW_SIZE 6 MLP_RATIO 7.0 '
    keys += 'QKV_BIAS False QK_SCALE 8.0 APE True PATCH_NORM False SHUF_SIZE (9,) '
    keys += 'MANIP_TYPE none EMBED_TYPE overlap MERGE_TYPE overlap MSG_TOKENS False HEAD_TOKENS patches'
    words = keys.split()
    options = {f'MODEL__MSG__{key}': value for key, value in zip(words[::2], words[1::2], strict=True)}
    options |= {'MODEL__DROP_RATE': '.1', 'MODEL__ATTN_DROP_RATE': '.2', 'MODEL__DROP_PATH_RATE': '.3'}
    options |= {'MODEL__NUM_CLASSES': '10', 'DATA__IMG_SIZE': '11', 'TRAIN__USE_CHECKPOINT': 'True'}
    options |= {'TRAIN__RECOMPUTE_MLP': 'True'}
    monkeypatch.setattr('models.build.MSGTransformer', lambda **arguments: arguments)
    assert build_model(tiny_config(**options)) == {
        'img_size': 11,
        'patch_size': 1,
        'in_chans': 2,
        'num_classes': 10,
        'embed_dim': 15,
        'depths': [4],
        'num_heads': [5],
        'window_size': 6,
        'mlp_ratio': 7.0,
        'qkv_bias': False,
        'qk_scale': 8.0,
        'drop_rate': 0.1,
        'attn_drop_rate': 0.2,
        'drop_path_rate': 0.3,
        'ape': True,
        'patch_norm': False,
        'shuffle_size': [9],
        'manip_type': 'none',
        'embed_type': 'overlap',
        'merge_type': 'overlap',
        'use_checkpoint': True,
        'recompute_mlp': True,
        'use_msg_tokens': False,
        'head_tokens': 'patches',
    }


@pytest.mark.parametrize('types', [{}, V2], ids=['v1', 'v2'])
def test_double_precision_agrees_forward_and_backward(types):
    results = []
    for dtype in (torch.float32, torch.float64):
        model = fill_(micro(**types)).to(dtype)
        x = images(2, 56).to(dtype)
        loss = F.cross_entropy(model(x), labels(2, 10))
        loss.backward()
        results.append([loss.detach().double(), *(p.grad.double() for p in model.parameters())])
    for single, double in zip(*results, strict=True):
        torch.testing.assert_close(single, double, rtol=1e-3, atol=2e-5)
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=0)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('grad', [True, False])
def test_autocast_is_near_fp32(dtype, grad):
    model = fill_(micro())
    x = images(2, 56)
    with torch.set_grad_enabled(grad), torch.autocast('cpu', dtype=dtype):
        low = model(x).float()
    plain = model(x)
    assert (low - plain).norm() < 0.02 * plain.norm()
    if grad:
        low.sum().backward()
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize('manip_type', ['shuf', 'none'])
@torch.no_grad()
def test_information_crosses_windows_with_shuffling_only(manip_type):
    model = fill_(micro(manip_type=manip_type, depths=(2, 2, 1))).eval()
    x = images(1, 56)
    changed = x.clone()
    changed[:, :, 3, 5] += 1.0  # one pixel, so one patch, of the window at (0, 0)
    before, after = model.embed(x), model.embed(changed)
    assert ((before[0] != after[0]).any(dim=-1)).sum() == 1
    stage = model.layers[0]
    stage.downsample = None
    differs = (stage(*before)[0] != stage(*after)[0]).any(dim=-1)[0]  # (28, 28)
    windows = differs.view(4, 7, 4, 7).any(dim=3).any(dim=1)
    assert windows[0, 0]
    assert windows.all() if manip_type == 'shuf' else windows.sum() == 1
    assert not torch.equal(*(fill_(micro(manip_type=manip_type))(image) for image in (x, changed)))


def test_options_act():
    """Each option changes what the network computes, or what it is made of."""
    model = micro()
    assert [type(layer.downsample) for layer in model.layers] == [PatchMerging, PatchMerging, type(None)]
    assert type(micro(**V2).layers[0].downsample) is OverlapPatchMerging
    assert micro(embed_type='overlap').patch_embed.proj.kernel_size == (7, 7)
    assert 'absolute_pos_embed' in micro(ape=True).state_dict()
    assert 'patch_embed.norm.weight' not in micro(patch_norm=False).state_dict()
    assert micro(mlp_ratio=2.5).layers[0].blocks[0].mlp.fc1.out_features == 40
    assert micro(num_classes=7).head.out_features == 7
    assert 'head.weight' not in micro(num_classes=0).state_dict()
    rates = [block.drop_path.rate for layer in micro(drop_path_rate=0.3).layers for block in layer.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])
    x = images(2, 56)
    for option in (
        {'ape': True},
        {'qkv_bias': False},
        {'qk_scale': 0.5},
        {'manip_type': 'none'},
        {'patch_norm': False},
    ):
        assert not torch.allclose(fill_(micro(**option))(x), fill_(micro())(x), atol=1e-3), option


@pytest.mark.parametrize('rate', ['drop_rate', 'attn_drop_rate', 'drop_path_rate'])
def test_dropout_acts_in_training_only(rate):
    model = fill_(micro(**{rate: 0.5}))
    x = images(4, 56)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_dropout_after_the_embedding_spares_msg_tokens():
    model = micro(drop_rate=0.5).train()
    patches, msg = model.embed(images(2, 56))
    assert (patches == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert (msg != 0).all()


def test_more_windows_average_their_msg_tokens():
    model = fill_(micro(img_size=112, shuffle_size=(4, 2, 2), num_classes=0)).eval()
    last = []
    model.layers[-1].register_forward_hook(lambda layer, inputs, output: last.append(output[1]))
    features = model(images(2, 112))
    msg = last[0]
    assert msg.shape == (2, 2, 2, 64)
    torch.testing.assert_close(features, model.norm(msg).sum(dim=(1, 2)) / 4)


@pytest.mark.parametrize(
    ('size', 'patch', 'window', 'shuffle'),
    [(384, 4, 12, (4, 4, 2, 1)), (448, 4, 7, (4, 4, 2, 1)), (112, 4, 7, (4, 2, 1)), (224, 8, 7, (2, 2, 1))],
)
@torch.no_grad()
def test_other_sizes_run(size, patch, window, shuffle):
    stages = len(shuffle)
    model = MSGTransformer(
        img_size=size,
        patch_size=patch,
        embed_dim=16,
        depths=(1,) * stages,
        num_heads=(1,) * stages,
        window_size=window,
        shuffle_size=shuffle,
        num_classes=5,
    ).eval()
    assert model(images(1, size)).shape == (1, 5)


@pytest.mark.parametrize('patch_size', [1, 2, 3, 4, 7, 8])
def test_overlapping_embedding_keeps_the_grid(patch_size):
    model = micro(img_size=7 * patch_size, patch_size=patch_size, depths=(1,), num_heads=(1,), shuffle_size=(1,), **V2)
    assert model.embed(images(1, 7 * patch_size))[0].shape == (1, 7, 7, 16)
    assert model.patch_embed.proj.padding == ((2, 2) if patch_size >= 3 else (3, 3))


@pytest.mark.parametrize('option', ['manip_type', 'embed_type', 'merge_type'])
def test_unknown_types_are_refused(option):
    with pytest.raises(ValueError, match=f"{option} is 'swin': write one of"):
        micro(**{option: 'swin'})


def test_initialisation():
    model = MSGTransformer(ape=True)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05), name
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-5
            assert (module.weight == 1).all()
            assert not module.bias.any()
    proj = model.patch_embed.proj
    bound = (proj.in_channels * 16) ** -0.5  # PyTorch's default: uniform within 1 / sqrt(fan in)
    assert bound * 0.9 < proj.weight.abs().max() <= bound
    assert proj.bias.any()
    for name, parameter in model.named_parameters():
        if name.endswith(('relative_position_bias_table', 'msg_tokens', 'absolute_pos_embed')):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
    assert torch.cat([p.flatten() for n, p in model.named_parameters() if 'rel_pos_msg' in n]).std() > 0.015


def test_defaults_are_tiny_with_drop_path():
    model = MSGTransformer()
    assert (model.num_classes, model.num_features, model.img_size) == (1000, 768, (224, 224))
    assert model.layers[3].blocks[1].drop_path.rate == pytest.approx(0.1)
