"""The cascade: each stage finds the classes, boxes and masks of the regions that the stage before it has refined.

With one stage it is Mask R-CNN.

Letters: n regions, K classes, H x W pixels of an image as the network sees it. Labels are 1 to K, the background 0.

Source: Cai and Vasconcelos, Cascade R-CNN, arXiv:1712.00726; He et al., Mask R-CNN, arXiv:1703.06870.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder, Matcher
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, generalized_box_iou_loss, roi_align
from yacs.config import CfgNode

from detection.models.heads import BoxHead, MaskHead
from detection.models.pooler import AlignedPooler

Target = Mapping[str, Tensor]


class Regions(NamedTuple):
    """Regions of an image that a stage's losses have sampled.

    Attributes:
        boxes: (n, 4).
        labels: (n,), 0 where there is no object.
        objects: which of the image's objects each is, (n,); any where the label is 0.
        is_given: whether it is an object's own box, (n,).
    """

    boxes: Tensor
    labels: Tensor
    objects: Tensor
    is_given: Tensor


class CascadeHeads(nn.Module):
    """All stages, in the place of torchvision's `RoIHeads`.

    Args:
        config: the config tree; `MODEL.BOX`, `MODEL.MASK`, `FPN_CHANNELS` and `NUM_CLASSES` are read.
        strides: pixels a step of each level that regions are pooled from.
    """

    def __init__(self, config: CfgNode, strides: Sequence[int]):
        super().__init__()
        self.box, mask = config.MODEL.BOX, config.MODEL.MASK
        box, channels, classes = self.box, config.MODEL.FPN_CHANNELS, config.MODEL.NUM_CLASSES
        stages = range(len(box.IOUS))
        self.box_pool = AlignedPooler(box.POOL_SIZE, strides)
        self.box_heads = nn.ModuleList(
            BoxHead(channels, box.POOL_SIZE, box.CONVS, box.LINEARS, classes) for _ in stages
        )
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
        targets: Sequence[Target] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections while evaluating, losses while training; the other is empty.

        Args:
            features: maps by level, (B, C, H, W).
            proposals: regions of each image, (n, 4).
            image_sizes: height and width of each, without padding.
            targets: `boxes` (n, 4), `labels` (n,) and `masks` (n, H, W) of each image's objects.
        """
        maps = list(features.values())
        if self.training:
            return [], self.losses(maps, proposals, image_sizes, targets)
        return self.detect(maps, proposals, image_sizes), {}

    def losses(
        self,
        maps: list[Tensor],
        proposals: list[Tensor],
        image_sizes: list[tuple[int, int]],
        targets: Sequence[Target],
    ) -> dict[str, Tensor]:
        """Weighted losses of every stage, each on regions sampled anew from what the stage before has refined."""
        losses = {}
        for i, (head, mask_head, weight) in enumerate(
            zip(self.box_heads, self.mask_heads, self.box.STAGE_WEIGHTS, strict=True)
        ):
            regions = self.sample(i, proposals, targets, image_sizes)
            boxes, labels = [each.boxes for each in regions], torch.cat([each.labels for each in regions])
            logits, offsets = head(self.box_pool(maps, boxes))
            objects = [
                target['boxes'][each.objects] if len(target['boxes']) else each.boxes
                for each, target in zip(regions, targets, strict=True)
            ]
            losses[f'loss_classifier_{i}'] = weight * F.cross_entropy(logits, labels)
            losses[f'loss_box_{i}'] = weight * self.box_loss(i, offsets, labels, torch.cat(boxes), torch.cat(objects))
            found = [of_image[each.labels > 0] for of_image, each in zip(boxes, regions, strict=True)]
            masks = mask_head(self.mask_pool(maps, found))
            losses[f'loss_mask_{i}'] = weight * mask_loss(masks, regions, targets)
            if i + 1 < len(self.box_heads):
                # A region of an object is refined as that object's class, others as the likeliest.
                classes = torch.where(labels > 0, labels, logits[:, 1:].argmax(dim=1) + 1)
                refined = self.refine(i, boxes, offsets.detach(), classes, image_sizes)
                proposals = [box[~each.is_given] for box, each in zip(refined, regions, strict=True)]
        return losses

    @torch.no_grad()
    def sample(
        self, stage: int, proposals: list[Tensor], targets: Sequence[Target], image_sizes: list[tuple[int, int]]
    ) -> list[Regions]:
        """Regions of each image for a stage's losses, the objects' own boxes among them.

        An image with neither objects nor proposals has itself, so that every image has one.
        """
        matched = []
        for proposed, target, (height, width) in zip(proposals, targets, image_sizes, strict=True):
            given = target['boxes'].to(proposed.dtype)
            boxes = torch.cat((proposed, given))
            if len(boxes) == 0:
                boxes = boxes.new_tensor([[0, 0, width, height]])
            objects = torch.full((len(boxes),), -1, device=boxes.device)
            if len(given):
                objects = self.matchers[stage](box_iou(given, boxes))
            labels = torch.zeros_like(objects)
            labels[objects >= 0] = target['labels'][objects[objects >= 0]]
            is_given = torch.arange(len(boxes), device=boxes.device) >= len(boxes) - len(given)
            matched.append(Regions(boxes, labels, objects.clamp(min=0), is_given))
        sampled = zip(*self.sampler([regions.labels for regions in matched]), strict=True)
        chosen = [torch.where(positive | negative)[0] for positive, negative in sampled]
        return [Regions(*(each[index] for each in of)) for of, index in zip(matched, chosen, strict=True)]

    def box_loss(self, stage: int, offsets: Tensor, labels: Tensor, boxes: Tensor, objects: Tensor) -> Tensor:
        """Loss of the regions' boxes, summed over those of objects and divided by the number of all.

        Args:
            stage: index of the stage.
            offsets: (n, K, 4).
            labels: (n,).
            boxes: of the regions, (n, 4).
            objects: boxes of the objects, (n, 4).
        """
        positive = torch.where(labels > 0)[0]
        offsets = offsets[positive, labels[positive] - 1]
        boxes, objects, coder = boxes[positive], objects[positive].float(), self.coders[stage]
        if self.box.LOSS == 'giou':
            loss = generalized_box_iou_loss(coder.decode_single(offsets, boxes), objects, reduction='sum')
        else:
            loss = F.l1_loss(offsets, coder.encode_single(objects, boxes), reduction='sum')
        return self.box.LOSS_WEIGHT * loss / len(labels)

    @torch.no_grad()
    def refine(
        self, stage: int, boxes: list[Tensor], offsets: Tensor, classes: Tensor, image_sizes: list[tuple[int, int]]
    ) -> list[Tensor]:
        """Boxes of each image (n, 4), moved by the offsets (n of all, K, 4) of their classes (n of all,)."""
        chosen = offsets[torch.arange(len(classes), device=classes.device), classes - 1]
        refined = self.coders[stage].decode_single(chosen, torch.cat(boxes))
        parts = refined.split([len(of_image) for of_image in boxes])
        return [clip_boxes_to_image(part, size) for part, size in zip(parts, image_sizes, strict=True)]

    def detect(
        self, maps: list[Tensor], boxes: list[Tensor], image_sizes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Detections of each image: boxes of the last stage, classes by the mean of all stages' logits, masks."""
        sums = 0.0
        for i, head in enumerate(self.box_heads):
            logits, offsets = head(self.box_pool(maps, boxes))
            sums = sums + logits
            if i + 1 < len(self.box_heads):
                boxes = self.refine(i, boxes, offsets, logits[:, 1:].argmax(dim=1) + 1, image_sizes)
        n, K = offsets.shape[:2]
        scores = (sums / len(self.box_heads)).softmax(dim=1)[:, 1:]  # (n, K)
        decoded = self.coders[-1].decode_single(offsets.flatten(1), torch.cat(boxes)).view(n, K, 4)
        counts = [len(of_image) for of_image in boxes]
        parts = zip(decoded.split(counts), scores.split(counts), image_sizes, strict=True)
        detections = [self.select(*part) for part in parts]
        masks = self.detect_masks(maps, detections)
        return [found | {'masks': mask} for found, mask in zip(detections, masks, strict=True)]

    def select(self, boxes: Tensor, scores: Tensor, image_size: tuple[int, int]) -> dict[str, Tensor]:
        """The best detections of an image.

        Args:
            boxes: of each class, (n, K, 4).
            scores: of each class, (n, K).
            image_size: height and width.
        """
        boxes = clip_boxes_to_image(boxes, image_size)
        region, label = torch.where(scores > self.box.SCORE)
        boxes, scores = boxes[region, label], scores[region, label]
        kept = batched_nms(boxes, scores, label, self.box.NMS_IOU)[: self.box.DETECTIONS]
        return {'boxes': boxes[kept], 'labels': label[kept] + 1, 'scores': scores[kept]}

    def detect_masks(self, maps: list[Tensor], detections: list[dict[str, Tensor]]) -> tuple[Tensor, ...]:
        """Probabilities (n, 1, side, side) of each image's detections: the mean over the stages."""
        labels = torch.cat([found['labels'] for found in detections])
        pooled = self.mask_pool(maps, [found['boxes'] for found in detections])
        mean = sum(head(pooled).sigmoid() for head in self.mask_heads) / len(self.mask_heads)
        masks = mean[torch.arange(len(labels), device=labels.device), labels - 1]
        return masks[:, None].split([len(found['labels']) for found in detections])


def mask_loss(logits: Tensor, regions: list[Regions], targets: Sequence[Target]) -> Tensor:
    """Mean cross entropy of the pixels of the objects' masks, each in its class.

    Args:
        logits: of the regions of objects, of all images, (n, K, side, side).
        regions: of each image, those of the background too.
        targets: of each image.
    """
    found = [(each.boxes[each.labels > 0], each.objects[each.labels > 0]) for each in regions]
    labels = torch.cat([each.labels[each.labels > 0] for each in regions])
    if len(labels) == 0:  # every parameter still gets a gradient, as DistributedDataParallel wants it
        return logits.sum() * 0
    side = logits.shape[-1]
    parts = [
        crop_masks(target['masks'], boxes, objects, side)
        for (boxes, objects), target in zip(found, targets, strict=True)
    ]
    chosen = logits[torch.arange(len(labels), device=labels.device), labels - 1]
    return F.binary_cross_entropy_with_logits(chosen, torch.cat(parts))


@torch.no_grad()
def crop_masks(masks: Tensor, boxes: Tensor, objects: Tensor, side: int) -> Tensor:
    """What regions should have as their masks, 0 or 1.

    Args:
        masks: of the image's objects, (m, H, W).
        boxes: regions, (n, 4).
        objects: which object each region is of, (n,).
        side: of the result.

    Returns:
        (n, side, side).
    """
    if len(boxes) == 0:
        return boxes.new_zeros(0, side, side)
    rois = torch.cat((objects[:, None].to(boxes.dtype), boxes), dim=1)  # (n, 5)
    cropped = roi_align(masks[:, None].to(boxes.dtype), rois, side, 1.0, sampling_ratio=0, aligned=True)
    return (cropped[:, 0] >= 0.5).to(boxes.dtype)
