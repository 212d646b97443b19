import copy

import pytest
import timm.optim
import torch
from torch import nn

from engine.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from engine.precision import Precision
from lr_scheduler import build_scheduler
from models import MSGTransformer
from optimizer import build_optimizer, usable_optimizers
from tests.helpers.golden import golden
from tests.helpers.runs import build_trainer, differences, is_identical

RECORD = golden('train_v1')


def names_by_group(model, optimizer):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [[names[p] for p in group['params']] for group in optimizer.param_groups]


def test_published_weight_decay_groups(tiny_config):
    model = MSGTransformer(embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), num_classes=10)
    optimizer = build_optimizer(tiny_config(TRAIN__WEIGHT_DECAY='0.05'), model)
    decay, no_decay = names_by_group(model, optimizer)
    assert sorted(decay) == sorted(RECORD['decay'])
    assert sorted(no_decay) == sorted(RECORD['no_decay'])
    assert 'msg_tokens' in decay  # as published
    assert [group['weight_decay'] for group in optimizer.param_groups] == [0.05, 0.0]
    order = [name for name, _ in model.named_parameters()]  # an optimizer's checkpoint counts parameters by it
    assert decay == [name for name in order if name in decay]
    assert no_decay == [name for name in order if name in no_decay]


def test_position_embedding_is_not_decayed(tiny_config):
    model = MSGTransformer(img_size=28, embed_dim=8, depths=(1,), num_heads=(1,), shuffle_size=(1,), ape=True)
    decay, no_decay = names_by_group(model, build_optimizer(tiny_config(), model))
    assert 'absolute_pos_embed' in no_decay
    assert len(decay) + len(no_decay) == len(list(model.parameters()))


def test_options_of_adamw_and_sgd(tiny_config):
    model = torch.nn.Linear(2, 2)
    adamw = build_optimizer(
        tiny_config(TRAIN__OPTIMIZER__BETAS='(0.8, 0.9)', TRAIN__OPTIMIZER__EPS='1e-6'), model, lr=3
    )
    assert isinstance(adamw, torch.optim.AdamW)
    assert (adamw.defaults['lr'], adamw.defaults['betas'], adamw.defaults['eps']) == (3, (0.8, 0.9), 1e-6)
    sgd = build_optimizer(tiny_config(TRAIN__OPTIMIZER__NAME='sgd', TRAIN__OPTIMIZER__MOMENTUM='0.7'), model)
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.defaults['lr'], sgd.defaults['momentum'], sgd.defaults['nesterov']) == (0.1, 0.7, True)


def test_layer_decay_scales_the_rates_of_blocks_and_keeps_weight_decay(tiny_config):
    layout = {'embed_dim': 16, 'depths': (1, 1, 2, 1), 'num_heads': (1, 2, 4, 8), 'num_classes': 10}
    model = MSGTransformer(**layout, manip_type='attention')
    config = tiny_config(TRAIN__WEIGHT_DECAY='0.05')
    optimizer = build_optimizer(config, model, lr=0.1, layer_decay=0.5)
    rates, decays = {}, {}
    for group, names in zip(optimizer.param_groups, names_by_group(model, optimizer), strict=True):
        rates |= dict.fromkeys(names, group['lr_scale'])
        decays |= dict.fromkeys(names, group['weight_decay'])
    assert set(rates) == {name for name, _ in model.named_parameters()}
    plain = names_by_group(model, build_optimizer(config, model))
    assert {name for name, decay in decays.items() if decay == 0.05} == set(plain[0])
    assert {name for name, decay in decays.items() if decay == 0} == set(plain[1])
    assert rates['msg_tokens'] == rates['patch_embed.proj.weight'] == 0.5**6
    blocks = ('0.blocks.0', '1.blocks.0', '2.blocks.0', '2.blocks.1', '3.blocks.0')
    for i, block in enumerate(blocks):
        assert rates[f'layers.{block}.attn.qkv.weight'] == rates[f'layers.{block}.norm1.bias'] == 0.5 ** (5 - i)
        assert {rates[name] for name in rates if f'{block}.exchange.' in name} == {0.5 ** (5 - i)}
        assert decays[f'layers.{block}.exchange.qkv.weight'] == 0.05
    assert rates['layers.0.downsample.reduction.weight'] == 0.5**5  # of the stage's last block
    assert rates['head.weight'] == rates['head.bias'] == 1
    scheduler = build_scheduler(config, optimizer, steps_per_epoch=4)
    for update in (0, 3, 7):
        scheduler.step_update(update)
        peak = max(group['lr'] for group in optimizer.param_groups)
        assert all(group['lr'] == pytest.approx(peak * group['lr_scale']) for group in optimizer.param_groups)


def test_fused_sgd_equals_the_formula_though_its_first_update_is_skipped(tiny_config):
    model = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(tiny_config(TRAIN__OPTIMIZER__NAME='sgd', TRAIN__WEIGHT_DECAY='0.0'), model, lr=0.1)
    expected, momentum, buffer = model.weight.detach().clone(), optimizer.param_groups[0]['momentum'], 0
    precision = Precision('O0', torch.float32, torch.device('cpu'))
    for skip in (True, False, False):
        precision.backward(model(torch.ones(1, 3)).square().sum(), optimizer)
        gradient = model.weight.grad.clone()
        precision.step(optimizer, model, 0.0, torch.tensor(skip))
        if not skip:
            buffer = momentum * buffer + gradient
            expected -= 0.1 * (gradient + momentum * buffer)
        torch.testing.assert_close(model.weight.detach(), expected)


def test_options_of_optimizers_of_timm(tiny_config):
    model = torch.nn.Linear(2, 2)
    lion = build_optimizer(tiny_config(TRAIN__OPTIMIZER__NAME='lion'), model, lr=3)
    assert isinstance(lion, timm.optim.Lion)
    assert (lion.defaults['lr'], lion.defaults['betas']) == (3, (0.9, 0.99))  # timm's
    assert [group['weight_decay'] for group in lion.param_groups] == [0.05, 0.0]
    options = {'TRAIN__OPTIMIZER__BETAS': '(0.8, 0.9)', 'TRAIN__OPTIMIZER__EPS': '1e-4'}
    lamb = build_optimizer(tiny_config(TRAIN__OPTIMIZER__NAME='lamb', **options), model)
    assert (lamb.defaults['betas'], lamb.defaults['eps']) == ((0.8, 0.9), 1e-4)
    options = {'TRAIN__OPTIMIZER__MOMENTUM': '0.7', 'TRAIN__OPTIMIZER__ARGS': 'trust_coeff=0.01 eps=1e-8'}
    lars = build_optimizer(tiny_config(TRAIN__OPTIMIZER__NAME='lars', **options), model)
    assert (lars.defaults['momentum'], lars.defaults['trust_coeff'], lars.defaults['eps']) == (0.7, 0.01, 1e-8)
    model = MSGTransformer(img_size=28, embed_dim=8, depths=(1,), num_heads=(1,), shuffle_size=(1,))
    muon = build_optimizer(tiny_config(TRAIN__OPTIMIZER__NAME='muon'), model)
    assert 'layers.0.blocks.0.attn.relative_position_bias_table' in names_by_group(model, muon)[1]
    assert [group.get('use_fallback', False) for group in muon.param_groups] == [False, True]  # by AdamW
    amsgrad = build_optimizer(tiny_config(TRAIN__OPTIMIZER__ARGS='amsgrad=True'), torch.nn.Linear(2, 2))
    assert (type(amsgrad), amsgrad.defaults['amsgrad'], amsgrad.defaults['fused']) == (torch.optim.AdamW, True, True)


def trainer_of(config):
    """A trainer of a network with convolutions, matrices that are large enough to be factored, and vectors."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 2), nn.Flatten(), nn.Linear(32, 40), nn.LayerNorm(40), nn.Linear(40, 3)
    return build_trainer(config, nn.Sequential(*layers))


def train(trainer, updates):
    for number in updates:
        images = torch.randn((4, 3, 3, 3), generator=torch.Generator().manual_seed(number))
        trainer.step_schedule_and_ema(trainer.train_step([(images, torch.arange(4) % 3)]))


@pytest.mark.parametrize('name', usable_optimizers())
def test_every_optimizer_skips_updates_and_resumes_bit_for_bit(tiny_config, tmp_path, name):
    config = tiny_config(TRAIN__OPTIMIZER__NAME=name, TRAIN__BASE_LR='0.01', TRAIN__NONFINITE='skip')
    trainer, state = (whole := trainer_of(config)), whole.state
    train(trainer, (1, 2))
    before = copy.deepcopy(state.state_dict())
    loss_fn, trainer.loss_fn = trainer.loss_fn, lambda batch: {'loss': loss_fn(batch)['loss'] * float('nan')}
    train(trainer, (3,))
    trainer.loss_fn = loss_fn
    assert state.skipped == 1
    assert all(is_identical(before[entry], state.state_dict()[entry]) for entry in ('model', 'optimizer'))
    save_checkpoint(tmp_path / 'checkpoint.pth', state.state_dict())
    checkpoint = load_checkpoint(tmp_path / 'checkpoint.pth')
    resumed = trainer_of(config)
    resumed.state.model.load_state_dict(checkpoint['model'])
    assert resumed.state.load_state_dict(checkpoint, 0, 1) == []
    train(trainer, (4, 5))
    train(resumed, (4, 5))
    assert differences(state.state_dict(), resumed.state.state_dict()) == []
    assert not is_identical(before['model'], state.model.state_dict())


@pytest.mark.parametrize(
    ('before', 'now', 'message'),
    [
        ({'NAME': 'nadamw'}, {'NAME': 'adopt'}, 'NAdamW and Adopt keep different states'),  # under the same names
        ({'NAME': 'lamb'}, {}, 'Lamb and AdamW keep different states'),
        ({'NAME': 'rmsprop', 'MOMENTUM': '0'}, {'NAME': 'rmsprop'}, 'it lacks averages of gradients'),
    ],
)
def test_state_of_another_optimizer_is_refused(tiny_config, before, now, message):
    configs = [
        tiny_config(**{f'TRAIN__OPTIMIZER__{key}': value for key, value in options.items()})
        for options in (before, now)
    ]
    trainer = trainer_of(configs[0])
    train(trainer, (1,))
    with pytest.raises(CheckpointError, match=rf'{message}\): write its TRAIN.OPTIMIZER'):
        trainer_of(configs[1]).state.load_state_dict(trainer.state.state_dict(), 0, 1)


def test_unknown_name_is_refused(tiny_config):
    config = tiny_config().clone()
    config.defrost()
    config.TRAIN.OPTIMIZER.NAME = 'adamx'
    with pytest.raises(ValueError, match='timm has no optimizer of that name: did you mean adam'):
        build_optimizer(config, torch.nn.Linear(2, 2))
