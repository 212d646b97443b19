"""The cascade's stages: sampling, decoding, losses, detections."""

import pytest
import torch
from torch import nn
from torchvision.ops import roi_align

from detection.models import build_detector, cascade
from detection.models.cascade import CascadeHeads, SampledBoxes, crop_masks, mask_loss
from tests.helpers.detectors import NO_DROP_PATH, STRIDES, ground_truth, tiny_detector
from tests.helpers.golden import fill_


def test_each_stage_samples_by_its_own_iou_and_includes_the_ground_truth():
    target = ground_truth((0, 0, 20, 20), label=2)
    proposals = torch.tensor([[0.0, 0, 20, 11], [0, 0, 20, 13], [0, 0, 20, 15], [40, 40, 60, 60]])  # IoU .55 .65 .75 0
    few = CascadeHeads(tiny_detector('MODEL.BOX.SAMPLES', '8'), STRIDES)
    many = CascadeHeads(tiny_detector('MODEL.BOX.SAMPLES', '40'), STRIDES)
    for stage, positive in enumerate([4, 3, 2]):
        (samples,) = few.sample(stage, [proposals], [target], [(64, 64)])
        assert len(samples.boxes) <= 8
        assert samples.positive.sum() == min(positive, 2)  # a quarter of 8
        assert set(samples.labels.tolist()) <= {0, 2}
        assert (samples.is_gt == (samples.boxes == target['boxes']).all(dim=1)).all()
        (samples,) = many.sample(stage, [proposals], [target], [(64, 64)])
        assert samples.positive.sum() == positive
        assert samples.is_gt.sum() == 1
        assert len(samples.boxes) == 5


def test_images_without_objects_are_sampled():
    heads = CascadeHeads(tiny_detector(), STRIDES)
    proposals = torch.tensor([[0.0, 0, 20, 11], [40, 40, 60, 60]])
    (samples,) = heads.sample(0, [proposals], [ground_truth()], [(64, 64)])
    assert samples.labels.tolist() == [0, 0]
    (samples,) = heads.sample(0, [proposals[:0]], [ground_truth()], [(50, 60)])
    assert samples.boxes.tolist() == [[0, 0, 60, 50]]


@pytest.mark.parametrize('stage', [0, 2])
def test_box_deltas_are_in_units_of_their_stage(stage):
    heads = CascadeHeads(tiny_detector(), STRIDES)
    centre_std, size_std = ((0.1, 0.2), None, (0.033, 0.067))[stage]
    boxes = [torch.tensor([[10.0, 10.0, 30.0, 50.0]]), torch.tensor([[0.0, 0.0, 40.0, 40.0]])]
    box_deltas = torch.zeros(2, 3, 4)
    box_deltas[0, 1] = torch.tensor([1.0, -1.0, 0.0, 0.0])
    box_deltas[1, 2] = torch.tensor([0.0, 0.0, 2.0, -2.0])
    one, two = heads.decode(stage, boxes, box_deltas, torch.tensor([2, 3]), [(64, 64), (30, 64)])
    shift_x, shift_y = centre_std * 20, -centre_std * 40
    torch.testing.assert_close(one, torch.tensor([[10 + shift_x, 10 + shift_y, 30 + shift_x, 50 + shift_y]]))
    width, height = 40 * torch.tensor(2 * size_std).exp(), 40 * torch.tensor(-2 * size_std).exp()
    expected = torch.stack((20 - width / 2, 20 - height / 2, 20 + width / 2, 20 + height / 2)).clamp(min=0)
    expected[3] = expected[3].clamp(max=30)
    torch.testing.assert_close(two, expected[None])  # clipped to the image


@pytest.mark.parametrize(('kind', 'weight'), [('giou', 10.0), ('l1', 1.0)])
def test_box_loss_is_of_positive_rois_in_their_classes(kind, weight):
    heads = CascadeHeads(tiny_detector('MODEL.BOX.LOSS', kind, 'MODEL.BOX.LOSS_WEIGHT', weight), STRIDES)
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 50, 50], [0, 0, 5, 5]])
    gt_boxes = torch.tensor([[0.0, 0, 10, 10], [25, 20, 35, 30], [1, 1, 2, 2], [1, 1, 2, 2]])
    labels = torch.tensor([1, 3, 0, 0])
    box_deltas = torch.zeros(4, 3, 4)
    box_deltas[2:] = 9  # of the background: without effect
    box_deltas[0, 1:] = box_deltas[1, :2] = 9  # of other classes: likewise
    # The second has an IoU of 1/3, and the union fills its hull of 150 pixels.
    expected = (1 - 1 / 3) if kind == 'giou' else 5.0  # half a width, in units of 0.1
    loss = heads.box_loss(0, box_deltas, labels, boxes, gt_boxes)
    assert loss.item() == pytest.approx(weight * expected / 4, rel=1e-5)
    # Without positive RoIs, the loss still has a gradient.
    assert heads.box_loss(0, box_deltas.requires_grad_(), labels * 0, boxes, gt_boxes).requires_grad


def test_mask_targets_are_cropped_from_their_objects():
    target = ground_truth((10, 10, 30, 30), (40, 0, 64, 20))
    boxes = torch.tensor([[10.0, 10, 30, 30], [0, 10, 20, 30], [40, 0, 64, 40]])
    cropped = crop_masks(target['masks'], boxes, torch.tensor([0, 0, 1]), 28)
    assert cropped.shape == (3, 28, 28)
    assert (cropped[0] == 1).all()
    assert (cropped[1] == (torch.arange(28) >= 14)).all()
    assert (cropped[2] == (torch.arange(28) < 14)[:, None]).all()
    assert crop_masks(target['masks'], boxes[:0], torch.zeros(0), 28).shape == (0, 28, 28)


def test_mask_targets_of_many_objects_are_those_of_all_masks_at_once(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(20, 64, 64, generator=generator) > 0.5).to(torch.uint8)
    corners = 40 * torch.rand(70, 2, generator=generator)
    boxes = torch.cat((corners, corners + 1 + 30 * torch.rand(70, 2, generator=generator)), dim=1)
    matched_gt = torch.randint(17, (70,), generator=generator)
    rois = torch.cat((matched_gt[:, None].float(), boxes), dim=1)
    expected = roi_align(masks[:, None].float(), rois, 28, 1.0, sampling_ratio=0, aligned=True)[:, 0] >= 0.5
    converted = []

    def record(chunk, *args, **kwargs):
        converted.append(len(chunk))
        return roi_align(chunk, *args, **kwargs)

    monkeypatch.setattr(cascade, 'roi_align', record)
    assert torch.equal(crop_masks(masks, boxes, matched_gt, 28), expected.float())
    assert converted == [8, 8, 4]


def test_mask_loss_is_of_positive_rois_in_their_classes():
    target = ground_truth((10, 10, 30, 30), label=2)
    labels = torch.tensor([0, 2])
    boxes = torch.tensor([[40.0, 40, 50, 50], [10, 10, 30, 30]])
    samples = SampledBoxes(boxes, labels, matched_gt=torch.tensor([0, 0]), is_gt=torch.tensor([False, False]))
    logits = torch.full((1, 3, 28, 28), -20.0)
    logits[0, 1] = 20.0
    assert mask_loss(logits, [samples], [target]) < 1e-6
    assert mask_loss(-logits, [samples], [target]) == pytest.approx(20, rel=1e-5)
    without_positive = mask_loss(logits[:0].requires_grad_(), [samples._replace(labels=labels * 0)], [target])
    assert without_positive == 0
    assert without_positive.requires_grad


class ConstantHead(nn.Module):
    """A head with the same output for every RoI."""

    def __init__(self, *outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, pooled, labels=None):
        outputs = tuple(x.expand(len(pooled), *x.shape) for x in self.outputs)
        return outputs if labels is None else outputs[0][:, labels[0] - 1, None]


def test_scores_and_masks_are_means_over_stages_and_boxes_are_refined_by_each():
    heads = CascadeHeads(tiny_detector('MODEL.BOX.SCORE', '0.2'), STRIDES).eval()
    logits = torch.tensor([[0.0, 3, 0, 0], [0, 0, 0, 6], [0, 0, 3, 0]])  # background, then three classes
    box_deltas = torch.zeros(3, 3, 4)
    box_deltas[0, 0, 0] = 1.0  # the first stage's most likely class moves by a tenth of the width
    box_deltas[0, 1, 0] = 50.0  # and another class elsewhere
    box_deltas[1, 2, 0] = 2.0  # the second stage's by two twentieths
    box_deltas[2, 2, 0] = 10.0  # the last stage's by 0.33, for the third class
    heads.box_heads = nn.ModuleList(ConstantHead(*outputs) for outputs in zip(logits, box_deltas, strict=True))
    probabilities = torch.tensor([0.2, 0.5, 0.9])
    heads.mask_heads = nn.ModuleList(ConstantHead(p.logit().expand(3, 28, 28)) for p in probabilities)
    features = {str(i): torch.zeros(1, 16, 16 // 2**i, 16 // 2**i) for i in range(4)}
    (detections,), losses = heads(features, [torch.tensor([[10.0, 10, 20, 20]])], [(64, 64)])
    assert losses == {}
    scores = logits.mean(dim=0).softmax(dim=0)
    assert scores[3] > 0.2 > scores[1]
    assert detections['labels'].tolist() == [3]
    torch.testing.assert_close(detections['scores'], scores[3:])
    left = 10 + 10 * (0.1 + 0.05 * 2 + 0.033 * 10)
    torch.testing.assert_close(detections['boxes'], torch.tensor([[left, 10, left + 10, 20]]))
    torch.testing.assert_close(detections['masks'], probabilities.mean().expand(1, 1, 28, 28))


def test_nms_is_per_class_and_the_best_detections_are_kept():
    heads = CascadeHeads(tiny_detector('MODEL.BOX.DETECTIONS', '3'), STRIDES)
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [30, 30, 40, 40], [50, 50, 90, 90]])
    scores = torch.tensor([[0.9, 0.3, 0.0], [0.8, 0.0, 0.0], [0.04, 0.0, 0.06], [0.0, 0.0, 0.5]])
    detections = heads.select(boxes[:, None].expand(4, 3, 4), scores, (64, 64))
    assert detections['labels'].tolist() == [1, 3, 2]
    assert detections['scores'].tolist() == pytest.approx([0.9, 0.5, 0.3])
    assert detections['boxes'][1].tolist() == [50, 50, 64, 64]  # clipped to the image


def test_losses_are_weighted_by_stage():
    model = fill_(build_detector(tiny_detector(*NO_DROP_PATH))).train()
    images, targets = [torch.rand(3, 64, 64)], [ground_truth((5, 5, 25, 30))]
    losses = []
    for weights in ('[1.0, 0.5, 0.25]', '[2.0, 2.0, 2.0]'):
        model.roi_heads.box = tiny_detector('MODEL.BOX.STAGE_WEIGHTS', weights).MODEL.BOX
        torch.manual_seed(0)
        losses.append({name: loss.item() for name, loss in model(images, targets).items()})
    for name, loss in losses[0].items():
        factor = {'0': 2, '1': 4, '2': 8}.get(name[-1], 1)
        assert losses[1][name] == pytest.approx(factor * loss, rel=1e-5), name
