"""The cascade: each stage predicts classes, boxes and masks of the RoIs that the stage before it has refined.

With one stage it is Mask R-CNN; without masks, Cascade R-CNN or Faster R-CNN.

Letters: n RoIs, K classes, H x W pixels of a resized image. Labels are 1 to K; 0 is the background.

Source: Cai and Vasconcelos, Cascade R-CNN, arXiv:1712.00726; He et al., Mask R-CNN, arXiv:1703.06870.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, generalized_box_iou_loss, roi_align
from yacs.config import CfgNode

from detection.models.heads import BoxHead, MaskHead
from detection.models.pooler import AlignedPooler
from detection.models.torchvision_private import BalancedPositiveNegativeSampler, BoxCoder, Matcher

GroundTruth = Mapping[str, Tensor]

# Masks of objects that are converted to fp32 at a time: 100 of 1333 x 800 pixels would take 427 MB.
MASKS_AT_A_TIME = 8


class SampledBoxes(NamedTuple):
    """RoIs of an image, sampled for the losses of a stage.

    Attributes:
        boxes: (n, 4).
        labels: (n,).
        matched_gt: index of the ground-truth object of each RoI, (n,); arbitrary where the label is 0.
        is_gt: whether the RoI is a ground-truth box itself, (n,).
    """

    boxes: Tensor
    labels: Tensor
    matched_gt: Tensor
    is_gt: Tensor

    @property
    def positive(self) -> Tensor:
        """Whether a RoI has an object, (n,)."""
        return self.labels > 0

    def with_masks(self, target: GroundTruth) -> 'SampledBoxes':
        """The positive RoIs whose objects have masks."""
        has_mask = self.positive
        if 'has_mask' in target and len(target['boxes']):
            has_mask = has_mask & target['has_mask'][self.matched_gt]
        return SampledBoxes(*(x[has_mask] for x in self))


class CascadeHeads(nn.Module):
    """All stages, in place of torchvision's `RoIHeads`.

    Args:
        config: the config tree; `MODEL.BOX`, `MODEL.MASK`, `FPN_CHANNELS` and `NUM_CLASSES` are read.
        strides: stride in pixels of each level that RoIs are pooled from.

    Attributes:
        min_score: minimum score of a detection, `MODEL.BOX.SCORE`; it may be changed.
    """

    def __init__(self, config: CfgNode, strides: Sequence[int]):
        super().__init__()
        self.box, mask = config.MODEL.BOX, config.MODEL.MASK
        box, channels, classes = self.box, config.MODEL.FPN_CHANNELS, config.MODEL.NUM_CLASSES
        self.min_score = box.SCORE
        stages = range(len(box.IOUS))
        self.box_pool = AlignedPooler(box.POOL_SIZE, strides)
        self.box_heads = nn.ModuleList(
            BoxHead(channels, box.POOL_SIZE, box.CONVS, box.LINEARS, classes) for _ in stages
        )
        self.mask_heads = None
        if mask.ENABLED:
            self.mask_pool = AlignedPooler(mask.POOL_SIZE, strides)
            self.mask_heads = nn.ModuleList(MaskHead(channels, mask.CONVS, mask.UPSAMPLED, classes) for _ in stages)
        self.coders = [
            BoxCoder((1 / centre, 1 / centre, 1 / size, 1 / size))
            for centre, size in zip(box.CENTRE_STDS, box.SIZE_STDS, strict=True)
        ]
        self.matchers = [Matcher(iou, iou) for iou in box.IOUS]
        self.sampler = BalancedPositiveNegativeSampler(box.SAMPLES, box.POSITIVE_FRACTION)

    def forward(
        self,
        features: Mapping[str, Tensor],
        proposals: list[Tensor],
        image_sizes: list[tuple[int, int]],
        targets: Sequence[GroundTruth] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections in evaluation, losses in training; the other is empty.

        Args:
            features: feature maps by level, (B, C, H, W).
            proposals: RoIs of each image, (n, 4).
            image_sizes: height and width of each image, without padding.
            targets: ground truth of each image: `boxes` (n, 4), `labels` (n,) and, for masks, `masks` (n, H, W) and
                perhaps `has_mask` (n,), of those that have one.
        """
        feature_maps = list(features.values())
        if self.training:
            return [], self.compute_losses(feature_maps, proposals, image_sizes, targets)
        return self.detect(feature_maps, proposals, image_sizes), {}

    def compute_losses(
        self,
        feature_maps: list[Tensor],
        proposals: list[Tensor],
        image_sizes: list[tuple[int, int]],
        targets: Sequence[GroundTruth],
    ) -> dict[str, Tensor]:
        """Weighted losses of every stage, each on RoIs sampled from the boxes refined by the stage before."""
        losses = {}
        for i, (head, weight) in enumerate(zip(self.box_heads, self.box.STAGE_WEIGHTS, strict=True)):
            samples = self.sample(i, proposals, targets, image_sizes)
            boxes, labels = [x.boxes for x in samples], torch.cat([x.labels for x in samples])
            logits, box_deltas = head(self.box_pool(feature_maps, boxes))
            gt_boxes = torch.cat(
                [
                    target['boxes'][x.matched_gt] if len(target['boxes']) else x.boxes
                    for x, target in zip(samples, targets, strict=True)
                ]
            )
            losses[f'loss_classifier_{i}'] = weight * F.cross_entropy(logits, labels)
            losses[f'loss_box_{i}'] = weight * self.box_loss(i, box_deltas, labels, torch.cat(boxes), gt_boxes)
            if self.mask_heads is not None:
                with_masks = [x.with_masks(target).boxes for x, target in zip(samples, targets, strict=True)]
                mask_logits = self.mask_heads[i](self.mask_pool(feature_maps, with_masks))
                losses[f'loss_mask_{i}'] = weight * mask_loss(mask_logits, samples, targets)
            if i + 1 < len(self.box_heads):
                # A positive RoI is refined as its object's class, a negative one as its most likely class.
                classes = torch.where(labels > 0, labels, logits[:, 1:].argmax(dim=1) + 1)
                decoded = self.decode(i, boxes, box_deltas.detach(), classes, image_sizes)
                proposals = [box[~x.is_gt] for box, x in zip(decoded, samples, strict=True)]
        return losses

    @torch.no_grad()
    def sample(
        self, stage: int, proposals: list[Tensor], targets: Sequence[GroundTruth], image_sizes: list[tuple[int, int]]
    ) -> list[SampledBoxes]:
        """Sample RoIs of each image for a stage's losses, from the proposals and the ground-truth boxes.

        An image with neither gets a RoI of its own size, so every image has one.
        """
        matched = []
        for proposed, target, (height, width) in zip(proposals, targets, image_sizes, strict=True):
            gt_boxes = target['boxes'].to(proposed.dtype)
            boxes = torch.cat((proposed, gt_boxes))
            if len(boxes) == 0:
                boxes = boxes.new_tensor([[0, 0, width, height]])
            matched_gt = torch.full((len(boxes),), -1, device=boxes.device)
            if len(gt_boxes):
                matched_gt = self.matchers[stage](box_iou(gt_boxes, boxes))
            labels = torch.zeros_like(matched_gt)
            labels[matched_gt >= 0] = target['labels'][matched_gt[matched_gt >= 0]]
            is_gt = torch.arange(len(boxes), device=boxes.device) >= len(boxes) - len(gt_boxes)
            matched.append(SampledBoxes(boxes, labels, matched_gt.clamp(min=0), is_gt))
        masks = zip(*self.sampler([candidates.labels for candidates in matched]), strict=True)
        chosen = [torch.where(positive | negative)[0] for positive, negative in masks]
        return [
            SampledBoxes(*(x[index] for x in candidates)) for candidates, index in zip(matched, chosen, strict=True)
        ]

    def box_loss(self, stage: int, box_deltas: Tensor, labels: Tensor, boxes: Tensor, gt_boxes: Tensor) -> Tensor:
        """Box loss, summed over positive RoIs and divided by the number of all RoIs.

        Args:
            stage: index of the stage.
            box_deltas: (n, K, 4).
            labels: (n,).
            boxes: RoIs, (n, 4).
            gt_boxes: boxes of their objects, (n, 4).
        """
        positive = torch.where(labels > 0)[0]
        box_deltas = box_deltas[positive, labels[positive] - 1]
        boxes, gt_boxes, coder = boxes[positive], gt_boxes[positive].float(), self.coders[stage]
        if self.box.LOSS == 'giou':
            loss = generalized_box_iou_loss(coder.decode_single(box_deltas, boxes), gt_boxes, reduction='sum')
        else:
            loss = F.l1_loss(box_deltas, coder.encode_single(gt_boxes, boxes), reduction='sum')
        return self.box.LOSS_WEIGHT * loss / len(labels)

    @torch.no_grad()
    def decode(
        self, stage: int, boxes: list[Tensor], box_deltas: Tensor, classes: Tensor, image_sizes: list[tuple[int, int]]
    ) -> list[Tensor]:
        """Refine the RoIs of each image (n, 4) by the deltas (n of all, K, 4) of their classes (n of all,)."""
        selected = box_deltas[torch.arange(len(classes), device=classes.device), classes - 1]
        decoded = self.coders[stage].decode_single(selected, torch.cat(boxes)).split([len(x) for x in boxes])
        return [clip_boxes_to_image(x, size) for x, size in zip(decoded, image_sizes, strict=True)]

    def detect(
        self, feature_maps: list[Tensor], boxes: list[Tensor], image_sizes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Detections of each image: boxes of the last stage, classes by the mean of all stages' logits, masks."""
        logits_sum = 0.0
        for i, head in enumerate(self.box_heads):
            logits, box_deltas = head(self.box_pool(feature_maps, boxes))
            logits_sum = logits_sum + logits
            if i + 1 < len(self.box_heads):
                boxes = self.decode(i, boxes, box_deltas, logits[:, 1:].argmax(dim=1) + 1, image_sizes)
        n, K = box_deltas.shape[:2]
        scores = (logits_sum / len(self.box_heads)).softmax(dim=1)[:, 1:]  # (n, K)
        decoded = self.coders[-1].decode_single(box_deltas.flatten(1), torch.cat(boxes)).view(n, K, 4)
        counts = [len(x) for x in boxes]
        per_image = zip(decoded.split(counts), scores.split(counts), image_sizes, strict=True)
        detections = [self.select(*image) for image in per_image]
        if self.mask_heads is None:
            return detections
        masks = self.detect_masks(feature_maps, detections)
        return [x | {'masks': mask} for x, mask in zip(detections, masks, strict=True)]

    def select(self, boxes: Tensor, scores: Tensor, image_size: tuple[int, int]) -> dict[str, Tensor]:
        """Select the best detections of an image.

        Args:
            boxes: a box per class, (n, K, 4).
            scores: a score per class, (n, K).
            image_size: height and width.
        """
        boxes = clip_boxes_to_image(boxes, image_size)
        roi, label = torch.where(scores > self.min_score)
        boxes, scores = boxes[roi, label], scores[roi, label]
        kept = batched_nms(boxes, scores, label, self.box.NMS_IOU)[: self.box.DETECTIONS]
        return {'boxes': boxes[kept], 'labels': label[kept] + 1, 'scores': scores[kept]}

    def detect_masks(self, feature_maps: list[Tensor], detections: list[dict[str, Tensor]]) -> tuple[Tensor, ...]:
        """Mask probabilities (n, 1, size, size) of each image's detections: the mean over the stages."""
        labels = torch.cat([x['labels'] for x in detections])
        pooled = self.mask_pool(feature_maps, [x['boxes'] for x in detections])
        masks = sum(head(pooled, labels).sigmoid() for head in self.mask_heads) / len(self.mask_heads)
        return masks.split([len(x['labels']) for x in detections])


def mask_loss(logits: Tensor, samples: list[SampledBoxes], targets: Sequence[GroundTruth]) -> Tensor:
    """Mean binary cross entropy of the mask pixels of positive RoIs, each in its own class.

    Args:
        logits: mask logits of the RoIs of all images, (n, K, size, size).
        samples: RoIs of each image; those that are negative, or whose objects have no mask, have no logits.
        targets: ground truth of each image.
    """
    samples = [x.with_masks(target) for x, target in zip(samples, targets, strict=True)]
    labels = torch.cat([x.labels for x in samples])
    if len(labels) == 0:  # every parameter still gets a gradient, as DistributedDataParallel requires
        return logits.sum() * 0
    mask_targets = torch.cat(
        [
            crop_masks(target['masks'], x.boxes, x.matched_gt, logits.shape[-1])
            for x, target in zip(samples, targets, strict=True)
        ]
    )
    selected = logits[torch.arange(len(labels), device=labels.device), labels - 1]
    return F.binary_cross_entropy_with_logits(selected, mask_targets)


@torch.no_grad()
def crop_masks(masks: Tensor, boxes: Tensor, matched_gt: Tensor, size: int) -> Tensor:
    """Mask targets of RoIs, 0 or 1.

    Args:
        masks: masks of the image's objects, (m, H, W).
        boxes: RoIs, (n, 4).
        matched_gt: index of each RoI's object, (n,).
        size: height and width of a mask target.

    Returns:
        (n, size, size).
    """
    cropped = boxes.new_zeros(len(boxes), size, size)
    for first in range(0, len(masks), MASKS_AT_A_TIME):
        index = matched_gt - first
        selected = torch.where((index >= 0) & (index < MASKS_AT_A_TIME))[0]
        if len(selected):
            rois = torch.cat((index[selected, None].to(boxes.dtype), boxes[selected]), dim=1)  # (selected, 5)
            chunk = masks[first : first + MASKS_AT_A_TIME, None].to(boxes.dtype)
            cropped[selected] = roi_align(chunk, rois, size, 1.0, sampling_ratio=0, aligned=True)[:, 0]
    return (cropped >= 0.5).to(boxes.dtype)
