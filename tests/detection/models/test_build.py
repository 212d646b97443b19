"""The whole detector: losses and gradients, precision, weight decay, checkpoints of older versions."""

import pytest
import torch
from torch import nn

from detection.models import build_detector
from detection.models.build import Detector
from detection.models.norm import SyncBatchNorm
from engine.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from engine.evaluation import load_ema
from engine.weights import load_weights
from optimizer import weight_decay_groups
from tests.helpers.detectors import NO_DROP_PATH, ground_truth, tiny_detector
from tests.helpers.golden import fill_
from tests.helpers.runs import assert_same_weights

ONE_STAGE = ['MODEL.BOX.IOUS', '[0.5]', 'MODEL.BOX.CENTRE_STDS', '[0.1]', 'MODEL.BOX.SIZE_STDS', '[0.2]']
ONE_STAGE += ['MODEL.BOX.STAGE_WEIGHTS', '[1.0]', 'MODEL.BOX.CONVS', '[]', 'MODEL.BOX.LINEARS', '[32, 32]']


@pytest.mark.parametrize(('stages', 'opts'), [(3, []), (1, ONE_STAGE)], ids=['cascade', 'one stage'])
def test_every_parameter_gets_a_gradient_even_without_objects(stages, opts):
    model = build_detector(tiny_detector(*NO_DROP_PATH, *opts)).train()
    images = [torch.rand(3, 64, 64), torch.rand(3, 40, 72)]
    objects = [ground_truth((5, 5, 25, 30), (30, 30, 60, 62)), ground_truth((0, 0, 30, 40), label=3, size=(40, 72))]
    names = {f'loss_{part}_{i}' for part in ('classifier', 'box', 'mask') for i in range(stages)}
    for targets in (objects, [ground_truth(), ground_truth(size=(40, 72))]):
        model.zero_grad()
        losses = model(images, targets)
        assert losses.keys() == names | {'loss_objectness', 'loss_rpn_box_reg'}
        assert all(loss.isfinite() for loss in losses.values())
        sum(losses.values()).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(losses[f'loss_{part}_0'] == 0 for part in ('box', 'mask'))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_boxes_are_computed_in_fp32_under_autocast(dtype):
    model = build_detector(tiny_detector(*NO_DROP_PATH, 'MODEL.BOX.SCORE', '0.0')).eval()
    dtypes = []
    model.roi_heads.register_forward_pre_hook(lambda _, x: dtypes.append((x[0]['0'].dtype, x[1][0].dtype)))
    with torch.autocast('cpu', dtype), torch.inference_mode():
        (detections,) = model([torch.rand(3, 64, 64)])
    assert dtypes == [(dtype, torch.float32)]  # features, proposals
    assert detections['boxes'].dtype == detections['scores'].dtype == torch.float32


def test_activation_checkpointing_leaves_losses_and_gradients_unchanged():
    results = []
    for use_checkpoint in ('False', 'True'):
        model = fill_(build_detector(tiny_detector('TRAIN.USE_CHECKPOINT', use_checkpoint))).train()
        torch.manual_seed(0)
        loss = sum(model([torch.rand(3, 64, 80)], [ground_truth((5, 5, 25, 30), size=(64, 80))]).values())
        loss.backward()
        results.append((loss, model.backbone.body.patch_embed.proj.weight.grad))
    assert all(map(torch.equal, *results))


def test_norms_and_bias_tables_are_not_decayed_but_other_biases_are():
    model = build_detector(tiny_detector())
    groups = weight_decay_groups(model, 0.05, decay_biases=True)
    assert [group['weight_decay'] for group in groups] == [0.05, 0.0]
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, exempt = ({names[id(p)] for p in group['params']} for group in groups)
    assert len(decayed) + len(exempt) == len(names)
    assert {'backbone.body.layers.0.blocks.0.attn.qkv.bias', 'backbone.body.msg_tokens'} <= decayed
    assert {'roi_heads.box_heads.0.logits.bias', 'roi_heads.mask_heads.0.1.conv5_mask.bias'} <= decayed
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm | SyncBatchNorm)}
    tables = ('relative_position_bias_table', 'rel_pos_msg')
    assert exempt == {name for name in names.values() if name.rsplit('.', 1)[0] in norms or name.endswith(tables)}


def old_names(weights):
    """A state dict as written before version 0.2."""
    return {name.replace('.box_deltas.', '.offsets.'): value for name, value in weights.items()}


def test_a_checkpoint_with_old_names_loads(tmp_path):
    weights = fill_(build_detector(tiny_detector())).state_dict()
    old = old_names(weights)
    assert {name for name in old if name not in weights} == {
        f'roi_heads.box_heads.{stage}.offsets.{kind}' for stage in range(3) for kind in ('weight', 'bias')
    }
    save_checkpoint(tmp_path / 'old.pth', {'model': old, 'model_ema': {name: x + 1 for name, x in old.items()}})
    checkpoint = load_checkpoint(tmp_path / 'old.pth')
    for replaceable in (None, Detector.HEAD):
        model = build_detector(tiny_detector())
        assert not load_weights(model, checkpoint, 'old.pth', replaceable).is_head_new
        assert_same_weights(model.state_dict(), weights, rtol=0, atol=0)
    ema_model = load_ema(model, checkpoint)
    assert_same_weights(ema_model.state_dict(), {name: x + 1 for name, x in weights.items()}, rtol=0, atol=0)


def test_an_old_checkpoint_of_other_classes_keeps_the_networks_own_last_layers():
    old = old_names(build_detector(tiny_detector('MODEL.NUM_CLASSES', '7')).state_dict())
    model = build_detector(tiny_detector())
    own = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r'old.pth holds a different model .*: shape mismatch: .*box_deltas'):
        load_weights(model, {'model': old}, 'old.pth')
    assert load_weights(model, {'model': old}, 'old.pth', Detector.HEAD)
    for name, value in model.state_dict().items():
        is_head = '.logits.' in name or '.box_deltas.' in name or '.mask_fcn_logits.' in name
        assert torch.equal(value, own[name] if is_head else old[name]), name
