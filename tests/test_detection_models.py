"""Detectors: their counts, the parts that are ours, and what they give."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torchvision.models.detection.image_list import ImageList

from checkpoint import CheckpointError
from detection.config import load_config
from detection.main import load_classifier
from detection.models import build_detector
from detection.models.cascade import CascadeHeads, Regions, crop_masks, mask_loss
from detection.models.norm import SyncBatchNorm, synchronize_norms
from detection.models.pooler import AlignedPooler
from detection.models.rpn import StridedAnchors
from detection.models.transform import paste_masks
from models import MSGTransformer
from optimizer import weight_decay_groups
from tests.conftest import ROOT, one_thread
from tests.helpers.golden import fill_, normal
from tools.complexity_detection import complexity

CONFIGS = ROOT / 'detection' / 'configs'
TINY_DETECTOR = ROOT / 'tests' / 'fixtures' / 'tiny_detector.yaml'
PLAIN = ['MODEL.DROP_PATH_RATE', '0']


def tiny(*opts):
    return load_config(TINY_DETECTOR, opts)


def objects(*boxes, label=1, size=(64, 64)):
    """An image's targets: boxes that their masks fill."""
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = 1
    labels = torch.full((len(boxes),), label)
    return {'boxes': torch.tensor(boxes, dtype=torch.float32).view(-1, 4), 'labels': labels, 'masks': masks}


@pytest.mark.parametrize(
    ('name', 'parameters', 'published'),
    [
        ('tiny', 85_631_616, 747.64e9),
        pytest.param('small', 106_949_808, 841.88e9, marks=pytest.mark.slow),
        pytest.param('base', 144_979_802, 989.65e9, marks=pytest.mark.slow),
        ('v2_tiny', 82.56e6, 730.63e9),
        pytest.param('v2_small', 113.31e6, 830.82e9, marks=pytest.mark.slow),
        pytest.param('v2_base', 141.73e6, 956.48e9, marks=pytest.mark.slow),
    ],
)
def test_the_published_counts(name, parameters, published):
    counted = complexity(load_config(CONFIGS / f'cascade_mask_rcnn_msg_{name}_3x.yaml'))
    if isinstance(parameters, int):
        assert counted.parameters == parameters
    else:
        assert counted.parameters == pytest.approx(parameters, abs=0.005e6)
    assert counted.multiply_adds == pytest.approx(published, rel=0.003)


def test_a_coarser_count_of_proposals_counts_less():
    config = tiny()
    one, two, three = (complexity(config, 64, 64, *counts).multiply_adds for counts in ((0, 0), (10, 0), (10, 10)))
    box = 7 * 7 * 9 * 16 * 16 + 7 * 7 * 16 * 32 + 32 * (4 + 12)
    mask = 14 * 14 * 9 * 16 * 16 + 14 * 14 * 16 * 16 * 4 + 28 * 28 * 16 * 3
    assert (two - one, three - two) == (3 * 10 * box, 3 * 10 * mask)


def test_regions_are_pooled_where_they_are():
    """On maps that hold the position of their own pixels' centres, a bin holds the position of its centre."""
    strides = (4, 8)
    maps = []
    for stride in strides:
        centre = (torch.arange(256 // stride) + 0.5) * stride
        maps.append(torch.stack(torch.meshgrid(centre, centre, indexing='ij'))[None])  # (1, 2, H, W): row, column
    pooler = AlignedPooler(7, strides)
    boxes = torch.tensor([[20.0, 30.0, 34.0, 51.0], [10.0, 20.0, 220.0, 230.0]])
    pooled = pooler(maps, [boxes])
    for box, found in zip(boxes, pooled, strict=True):
        x, y, step_x, step_y = *box[:2], (box[2] - box[0]) / 7, (box[3] - box[1]) / 7
        bins = torch.arange(7) + 0.5
        torch.testing.assert_close(found[0], (y + bins * step_y)[:, None].expand(7, 7))
        torch.testing.assert_close(found[1], (x + bins * step_x)[None].expand(7, 7))


def test_regions_go_to_the_level_of_their_size_and_image():
    maps = [torch.full((2, 1, 256 // 2**i, 256 // 2**i), float(i)) for i in range(4)]
    for level in maps:
        level[1] += 10
    pooler = AlignedPooler(2, (4, 8, 16, 32))
    sides = torch.tensor([111.0, 113.0, 223.0, 225.0, 447.0, 449.0, 900.0, 10.0])
    boxes = torch.stack((torch.zeros(8), torch.zeros(8), sides, sides), dim=1)
    pooled = pooler(maps, [boxes[:5], boxes[5:]])
    assert pooled.mean(dim=(1, 2, 3)).tolist() == [0, 1, 1, 2, 2, 13, 13, 10]
    assert pooler(maps, [boxes[:0], boxes[:0]]).shape == (0, 1, 2, 2)


def test_anchors_keep_their_strides_and_their_precision():
    anchors = StridedAnchors((4, 8, 16, 32, 64), 8, (0.5, 1.0, 2.0))
    images = ImageList(torch.zeros(2, 3, 800, 1280), [(800, 1280), (700, 1280)])
    grids = [(200, 320), (100, 160), (50, 80), (25, 40), (13, 20)]
    maps = [torch.zeros(2, 1, *grid, dtype=torch.float16) for grid in grids]
    told = anchors(images, maps)
    assert len(told) == 2
    assert told[0].dtype == torch.float32
    assert len(told[0]) == 3 * sum(height * width for height, width in grids)
    last = told[0][-3:]  # at row 12, column 19 of the coarsest
    torch.testing.assert_close((last[:, :2] + last[:, 2:]) / 2, torch.tensor([[19 * 64.0, 12 * 64.0]] * 3))
    size = last[:, 2:] - last[:, :2]
    torch.testing.assert_close(size[1], torch.tensor([512.0, 512.0]))
    assert (size[:, 1] / size[:, 0]).tolist() == pytest.approx([0.5, 1, 2])
    assert size.prod(dim=1).tolist() == pytest.approx([512.0**2] * 3)


def test_a_stage_samples_by_its_own_overlap_and_has_the_objects_themselves():
    heads = CascadeHeads(tiny('MODEL.BOX.SAMPLES', '8'), (4, 8, 16, 32))
    target = objects((0, 0, 20, 20), label=2)
    proposed = torch.tensor([[0.0, 0, 20, 11], [0, 0, 20, 13], [0, 0, 20, 15], [40, 40, 60, 60]])  # IoU .55 .65 .75 0
    for stage, positive in enumerate([4, 3, 2]):
        (regions,) = heads.sample(stage, [proposed], [target], [(64, 64)])
        assert len(regions.boxes) <= 8
        chosen = regions.labels > 0
        assert chosen.sum() == min(positive, 2)  # a quarter of 8
        assert set(regions.labels.tolist()) <= {0, 2}
        assert (regions.is_given == (regions.boxes == target['boxes']).all(dim=1)).all()
    many = CascadeHeads(tiny('MODEL.BOX.SAMPLES', '40'), (4, 8, 16, 32))
    for stage, positive in enumerate([4, 3, 2]):
        (regions,) = many.sample(stage, [proposed], [target], [(64, 64)])
        assert (regions.labels > 0).sum() == positive
        assert regions.is_given.sum() == 1
        assert len(regions.boxes) == 5
    empty = objects()
    (regions,) = many.sample(0, [proposed], [empty], [(64, 64)])
    assert regions.labels.tolist() == [0, 0, 0, 0]
    (regions,) = many.sample(0, [proposed[:0]], [empty], [(50, 60)])
    assert regions.boxes.tolist() == [[0, 0, 60, 50]]


@pytest.mark.parametrize('stage', [0, 2])
def test_offsets_are_in_units_of_their_stage(stage):
    heads = CascadeHeads(tiny(), (4, 8, 16, 32))
    centre, size = ((0.1, 0.2), None, (0.033, 0.067))[stage]
    boxes = [torch.tensor([[10.0, 10.0, 30.0, 50.0]]), torch.tensor([[0.0, 0.0, 40.0, 40.0]])]
    offsets = torch.zeros(2, 3, 4)
    offsets[0, 1] = torch.tensor([1.0, -1.0, 0.0, 0.0])
    offsets[1, 2] = torch.tensor([0.0, 0.0, 2.0, -2.0])
    one, two = heads.refine(stage, boxes, offsets, torch.tensor([2, 3]), [(64, 64), (30, 64)])
    move_x, move_y = centre * 20, -centre * 40
    torch.testing.assert_close(one, torch.tensor([[10 + move_x, 10 + move_y, 30 + move_x, 50 + move_y]]))
    wide, high = 40 * torch.tensor(2 * size).exp(), 40 * torch.tensor(-2 * size).exp()
    expected = torch.stack((20 - wide / 2, 20 - high / 2, 20 + wide / 2, 20 + high / 2)).clamp(min=0)
    expected[3] = expected[3].clamp(max=30)
    torch.testing.assert_close(two, expected[None])  # cut at the image's edge


@pytest.mark.parametrize(('kind', 'weight'), [('giou', 10.0), ('l1', 1.0)])
def test_the_loss_of_boxes(kind, weight):
    heads = CascadeHeads(tiny('MODEL.BOX.LOSS', kind, 'MODEL.BOX.LOSS_WEIGHT', weight), (4, 8, 16, 32))
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 50, 50], [0, 0, 5, 5]])
    truth = torch.tensor([[0.0, 0, 10, 10], [25, 20, 35, 30], [1, 1, 2, 2], [1, 1, 2, 2]])
    labels = torch.tensor([1, 3, 0, 0])
    offsets = torch.zeros(4, 3, 4)
    offsets[2:] = 9  # of the background: without effect
    offsets[0, 1:] = offsets[1, :2] = 9  # of other classes: likewise
    # The second overlaps by 1/3, and 150 of the 150 pixels of its hull are in the union.
    expected = (1 - 1 / 3) if kind == 'giou' else 5.0  # half a width, in units of 0.1
    loss = heads.box_loss(0, offsets, labels, boxes, truth)
    assert loss.item() == pytest.approx(weight * expected / 4, rel=1e-5)
    assert heads.box_loss(0, offsets.requires_grad_(), labels * 0, boxes, truth).requires_grad  # none, but a gradient


def test_masks_are_cut_out_of_their_objects():
    target = objects((10, 10, 30, 30), (40, 0, 64, 20))
    boxes = torch.tensor([[10.0, 10, 30, 30], [0, 10, 20, 30], [40, 0, 64, 40]])
    cropped = crop_masks(target['masks'], boxes, torch.tensor([0, 0, 1]), 28)
    assert cropped.shape == (3, 28, 28)
    assert (cropped[0] == 1).all()
    assert (cropped[1] == (torch.arange(28) >= 14)).all()
    assert (cropped[2] == (torch.arange(28) < 14)[:, None]).all()
    assert crop_masks(target['masks'], boxes[:0], torch.zeros(0), 28).shape == (0, 28, 28)


def test_a_mask_that_is_cut_out_and_pasted_back_is_the_same():
    """Small objects too, at boxes between the pixels, as the shape of a disc shows."""
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing='ij')
    centres = torch.tensor([[10.0, 10.0, 5.0], [32.3, 20.6, 8.0], [45.5, 30.2, 16.0]])
    discs = torch.stack([(x + 0.5 - cx) ** 2 + (y + 0.5 - cy) ** 2 < radius**2 for cx, cy, radius in centres])
    boxes = torch.cat((centres[:, :2] - centres[:, 2:], centres[:, :2] + centres[:, 2:]), dim=1)
    cut = crop_masks(discs, boxes, torch.arange(3), side=28)
    pasted = paste_masks(cut[:, None], boxes, (48, 64))[:, 0] > 0.5
    overlaps = (pasted & discs).sum(dim=(1, 2)) / (pasted | discs).sum(dim=(1, 2))
    assert overlaps.tolist() == pytest.approx([1, 1, 1], abs=0.02)


def test_masks_cover_the_pixels_whose_centres_are_in_their_boxes():
    boxes = torch.tensor([[2.4, 1.6, 5.6, 4.4], [-3, -3, 2, 2], [60, 40, 80, 50], [7, 7, 7, 9], [70, 9, 80, 20]])
    pasted = paste_masks(torch.ones(5, 1, 28, 28, dtype=torch.float16), boxes, (48, 64))
    assert pasted.dtype == torch.float32
    for mask, (rows, columns) in zip(
        pasted[:3, 0], [((2, 4), (2, 6)), ((0, 2), (0, 2)), ((40, 48), (60, 64))], strict=True
    ):
        inside = torch.zeros(48, 64, dtype=torch.bool)
        inside[slice(*rows), slice(*columns)] = True
        assert torch.equal(mask > 0.5, inside)
    assert not pasted[3:].any()  # no width, outside
    half = torch.zeros(1, 1, 2, 2)
    half[..., 0] = 1  # the left half
    (values,) = paste_masks(half, torch.tensor([[10.0, 10.0, 18.0, 18.0]]), (48, 64))[0]
    assert values[14, 12:16].tolist() == pytest.approx([1 - 1 / 8, 1 - 3 / 8, 1 - 5 / 8, 1 - 7 / 8])


def test_an_image_of_a_pixel_by_thousands_is_searched():
    detector = build_detector(tiny()).eval()
    with torch.inference_mode():
        (found,) = detector([torch.rand(3, 1, 2000)])
    assert found['masks'].shape[2:] == (1, 2000)


def test_the_loss_of_masks_is_that_of_the_right_class():
    target = objects((10, 10, 30, 30), label=2)
    labels = torch.tensor([0, 2])
    regions = Regions(torch.tensor([[40.0, 40, 50, 50], [10, 10, 30, 30]]), labels, torch.tensor([0, 0]), labels > 9)
    logits = torch.full((1, 3, 28, 28), -20.0)
    logits[0, 1] = 20.0
    assert mask_loss(logits, [regions], [target]) < 1e-6
    assert mask_loss(-logits, [regions], [target]) == pytest.approx(20, rel=1e-5)
    none = mask_loss(logits[:0].requires_grad_(), [regions._replace(labels=labels * 0)], [target])
    assert none == 0
    assert none.requires_grad


class Told(nn.Module):
    """A head that says the same of every region."""

    def __init__(self, *what):
        super().__init__()
        self.what = what

    def forward(self, pooled):
        told = tuple(each.expand(len(pooled), *each.shape) for each in self.what)
        return told if len(told) > 1 else told[0]


def test_detections_are_the_mean_of_the_stages_but_the_boxes_are_the_last_ones():
    config = tiny('MODEL.BOX.SCORE', '0.2')
    heads = CascadeHeads(config, (4, 8, 16, 32)).eval()
    logits = torch.tensor([[0.0, 3, 0, 0], [0, 0, 0, 6], [0, 0, 3, 0]])  # background, then three classes
    offsets = torch.zeros(3, 3, 4)
    offsets[0, 0, 0] = 1.0  # the first stage's likeliest class moves by a tenth of the width
    offsets[0, 1, 0] = 50.0  # and another elsewhere
    offsets[1, 2, 0] = 2.0  # the second by two twentieths
    offsets[2, 2, 0] = 10.0  # the last by 0.33, for the third class
    heads.box_heads = nn.ModuleList(Told(a, b) for a, b in zip(logits, offsets, strict=True))
    chances = torch.tensor([0.2, 0.5, 0.9])
    heads.mask_heads = nn.ModuleList(Told(chance.logit().expand(3, 28, 28)) for chance in chances)
    maps = {str(i): torch.zeros(1, 16, 16 // 2**i, 16 // 2**i) for i in range(4)}
    (found,), losses = heads(maps, [torch.tensor([[10.0, 10, 20, 20]])], [(64, 64)])
    assert losses == {}
    mean = logits.mean(dim=0).softmax(dim=0)
    assert mean[1:].tolist()[2] > 0.2 > mean[1]
    assert found['labels'].tolist() == [3]
    torch.testing.assert_close(found['scores'], mean[3:])
    left = 10 + 10 * (0.1 + 0.05 * 2 + 0.033 * 10)
    torch.testing.assert_close(found['boxes'], torch.tensor([[left, 10, left + 10, 20]]))
    torch.testing.assert_close(found['masks'], chances.mean().expand(1, 1, 28, 28))


def test_overlapping_detections_of_a_class_are_suppressed_and_the_best_are_kept():
    heads = CascadeHeads(tiny('MODEL.BOX.DETECTIONS', '3'), (4, 8, 16, 32))
    corner = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [30, 30, 40, 40], [50, 50, 90, 90]])
    scores = torch.tensor([[0.9, 0.3, 0.0], [0.8, 0.0, 0.0], [0.04, 0.0, 0.06], [0.0, 0.0, 0.5]])
    found = heads.select(corner[:, None].expand(4, 3, 4), scores, (64, 64))
    assert found['labels'].tolist() == [1, 3, 2]
    assert found['scores'].tolist() == pytest.approx([0.9, 0.5, 0.3])
    assert found['boxes'][1].tolist() == [50, 50, 64, 64]  # cut at the image's edge


@pytest.mark.parametrize('stages', ['cascade', 'one'])
def test_every_parameter_gets_a_gradient_also_where_nothing_is_seen(stages):
    one = ['MODEL.BOX.IOUS', '[0.5]', 'MODEL.BOX.CENTRE_STDS', '[0.1]', 'MODEL.BOX.SIZE_STDS', '[0.2]']
    one += ['MODEL.BOX.STAGE_WEIGHTS', '[1.0]', 'MODEL.BOX.CONVS', '[]', 'MODEL.BOX.LINEARS', '[32, 32]']
    model = build_detector(tiny(*PLAIN, *(one if stages == 'one' else []))).train()
    images = [torch.rand(3, 64, 64), torch.rand(3, 40, 72)]
    seen = [objects((5, 5, 25, 30), (30, 30, 60, 62)), objects((0, 0, 30, 40), label=3, size=(40, 72))]
    count = 1 if stages == 'one' else 3
    names = {f'loss_{part}_{i}' for part in ('classifier', 'box', 'mask') for i in range(count)}
    for targets in (seen, [objects(), objects(size=(40, 72))]):
        model.zero_grad()
        losses = model(images, targets)
        assert losses.keys() == names | {'loss_objectness', 'loss_rpn_box_reg'}
        assert all(loss.isfinite() for loss in losses.values())
        sum(losses.values()).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(losses[f'loss_{part}_0'] == 0 for part in ('box', 'mask'))


def test_later_stages_weigh_less():
    model = build_detector(tiny(*PLAIN)).train()
    fill_(model)
    images, targets = [torch.rand(3, 64, 64)], [objects((5, 5, 25, 30))]
    told = []
    for weights in ('[1.0, 0.5, 0.25]', '[2.0, 2.0, 2.0]'):
        heads = build_detector(tiny(*PLAIN, 'MODEL.BOX.STAGE_WEIGHTS', weights)).roi_heads
        model.roi_heads.box = heads.box
        torch.manual_seed(0)
        told.append({name: loss.item() for name, loss in model(images, targets).items()})
    for name, one in told[0].items():
        factor = {'0': 2, '1': 4, '2': 8}.get(name[-1], 1)
        assert told[1][name] == pytest.approx(factor * one, rel=1e-5), name


def test_evaluation_resizes_and_maps_back_and_training_leaves_images_as_they_are():
    model = build_detector(tiny('MODEL.BOX.SCORE', '0.0')).eval()
    sizes = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape)))
    images = [torch.rand(3, 32, 40), torch.rand(3, 100, 30)]
    with torch.inference_mode():
        found = model(images)
    assert sizes == [(2, 3, 128, 96)]  # 64 x 80 and 100 x 30, which the longest side bounds, in multiples of 32
    for image, told in zip(images, found, strict=True):
        height, width = image.shape[1:]
        n = len(told['boxes'])
        assert 0 < n <= 10
        assert told['masks'].shape == (n, 1, height, width)
        assert ((told['masks'] >= 0) & (told['masks'] <= 1)).all()
        assert set(told['labels'].tolist()) <= {1, 2, 3}
        assert (told['scores'].sort(descending=True)[0] == told['scores']).all()
        assert (told['boxes'] >= 0).all()
        assert (told['boxes'][:, 2] <= width).all()
        assert (told['boxes'][:, 3] <= height).all()
    model.train()
    model(images, [objects((1, 1, 20, 20), size=(32, 40)), objects(size=(100, 30))])
    assert sizes[-1] == (2, 3, 128, 64)
    # Nothing is found, in any image
    strict = build_detector(tiny('MODEL.BOX.SCORE', '1.0')).eval()
    assert [len(told['boxes']) for told in strict(images)] == [0, 0]
    assert strict(images)[1]['masks'].shape == (0, 1, 100, 30)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_boxes_are_computed_in_fp32_under_autocast(dtype):
    model = build_detector(tiny(*PLAIN, 'MODEL.BOX.SCORE', '0.0')).eval()
    seen = []
    model.roi_heads.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0]['0'].dtype, inputs[1][0].dtype)))
    with torch.autocast('cpu', dtype), torch.inference_mode():
        (found,) = model([torch.rand(3, 64, 64)])
    assert seen == [(dtype, torch.float32)]
    assert found['boxes'].dtype == found['scores'].dtype == torch.float32


def test_recomputing_activations_changes_no_loss():
    losses = []
    for use_checkpoint in ('False', 'True'):
        model = fill_(build_detector(tiny('TRAIN.USE_CHECKPOINT', use_checkpoint))).train()
        torch.manual_seed(0)
        total = sum(model([torch.rand(3, 64, 80)], [objects((5, 5, 25, 30), size=(64, 80))]).values())
        total.backward()
        losses.append((total, model.backbone.body.patch_embed.proj.weight.grad))
    assert all(map(torch.equal, *losses))


def test_a_classifier_starts_the_backbone():
    config = tiny()
    msg = config.MODEL.MSG
    options = {'embed_dim': msg.EMBED_DIM, 'depths': msg.DEPTHS, 'num_heads': msg.NUM_HEADS, 'num_classes': 7}
    classifier = fill_(MSGTransformer(**options, shuffle_size=msg.SHUF_SIZE))
    model = build_detector(config)
    load_classifier(model, {'model': classifier.state_dict()}, 'classifier.pth')
    ours = model.backbone.body.state_dict()
    for name, value in classifier.state_dict().items():
        if not name.startswith('head.'):
            assert torch.equal(ours[name], value), name
    other = MSGTransformer(**options | {'embed_dim': 32}, shuffle_size=msg.SHUF_SIZE)
    with pytest.raises(CheckpointError, match='other.pth is a checkpoint of another model than the config: misshapen'):
        load_classifier(model, {'model': other.state_dict()}, 'other.pth')


def test_norms_and_bias_tables_are_not_decayed_but_other_biases_are():
    model = build_detector(tiny())
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


def test_several_gpus_train_pytorchs_own_norm_with_the_same_names():
    model = build_detector(tiny())
    before, parameters = model.state_dict(), list(model.parameters())
    assert synchronize_norms(model, torch.device('cpu'), 2) is model
    assert synchronize_norms(model, torch.device('cuda'), 1) is model
    model = synchronize_norms(model, torch.device('cuda'), 2)
    assert model.state_dict().keys() == before.keys()
    assert all(one is two for one, two in zip(model.parameters(), parameters, strict=True))
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in model.modules()) == 3
    assert not any(isinstance(module, SyncBatchNorm) for module in model.modules())


def _norm_of_two(rank: int, folder: str) -> None:
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    told = _norm(normal('x', (5, 4, 3, 3))[:3] if rank == 0 else normal('x', (5, 4, 3, 3))[3:])
    torch.save(told, os.path.join(folder, f'{rank}.pt'))
    dist.destroy_process_group()


def _norm(x: torch.Tensor) -> dict[str, torch.Tensor]:
    module, x = fill_(SyncBatchNorm(4)).train(), x.clone().requires_grad_()
    module.running_mean.zero_()
    module.running_var.fill_(1.0)
    y = module(x)
    y.pow(3).sum().backward()
    return {
        'y': y.detach(), 'x': x.grad, 'weight': module.weight.grad, 'bias': module.bias.grad,
        'mean': module.running_mean, 'var': module.running_var, 'count': module.num_batches_tracked,
    }  # fmt: skip


@pytest.mark.slow
def test_batch_norm_of_two_processes_is_that_of_all_their_regions(tmp_path: Path):
    """Shares of different sizes: outputs, statistics and gradients."""
    with one_thread():
        mp.spawn(_norm_of_two, (str(tmp_path),), nprocs=2)
        whole = _norm(normal('x', (5, 4, 3, 3)))
    one, two = (torch.load(tmp_path / f'{rank}.pt') for rank in range(2))
    for name in ('y', 'x'):
        torch.testing.assert_close(torch.cat((one[name], two[name])), whole[name], rtol=1e-4, atol=1e-5)
    for name in ('weight', 'bias'):
        torch.testing.assert_close(one[name] + two[name], whole[name], rtol=1e-4, atol=1e-4)
    for name in ('mean', 'var', 'count'):
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=0)
        torch.testing.assert_close(one[name], whole[name], rtol=1e-5, atol=1e-6)
