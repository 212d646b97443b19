"""A trained detector as a graph of fixed shapes, for ONNX: the same detections as `Detector`, in padded outputs.

`Detector` works on as many proposals, RoIs and detections as it finds, which `torch.export` cannot trace. Here, every
image has the same number of each. Suppressed proposals stay, and are marked by a score of `NOTHING`. A RoI is pooled
from every level, but on all levels except its own it is an empty box, which costs little and adds zero. The layers, the
box coders and the rule for the level are those of the trained detector.

NMS is ONNX's NonMaxSuppression, on each level of the RPN and on each class by itself. It keeps the boxes that
torchvision's NMS keeps: both compare IoU > threshold, in the order of the scores.

Letters: B images of H x W pixels, n RoIs of an image, K classes, D detections of an image, G groups of m boxes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import nms, roi_align

from detection.models.build import Detector
from detection.models.pooler import AlignedPooler
from models.pyramid import Size, ceil_div

NOTHING = -1.0  # the score of boxes that do not count; scores are in [0, 1]


class FixedDetector(nn.Module):
    """A detector for images of one size, with outputs of fixed shapes.

    Args:
        detector: in evaluation mode.
        size: height and width of the padded images: multiples of the stride of the coarsest feature map of the
            backbone.
    """

    def __init__(self, detector: Detector, size: Size):
        super().__init__()
        rpn, heads = detector.rpn, detector.roi_heads
        self.backbone, self.rpn_head, self.heads = detector.backbone, rpn.head, heads
        self.rpn_coder, self.min_side = rpn.box_coder, rpn.min_size
        self.pre_nms, self.post_nms, self.rpn_iou = rpn.pre_nms_top_n(), rpn.post_nms_top_n(), rpn.nms_thresh
        grids = [tuple(ceil_div(side, stride) for side in size) for stride in rpn.anchor_generator.strides]
        empty_images = ImageList(torch.zeros(1, 3, 1, 1), [tuple(size)])
        anchors = rpn.anchor_generator(empty_images, [torch.zeros(1, 1, *grid) for grid in grids])[0]
        self.counts = [len(anchors) * h * w // sum(a * b for a, b in grids) for h, w in grids]
        self.register_buffer('anchors', anchors, persistent=False)  # of all levels, finest first

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """Detect objects.

        Args:
            images: normalised, and padded with zeros on the right and at the bottom, (B, 3, H, W).
            sizes: height and width of each image without its padding, (B, 2), float32.

        Returns:
            Detections of each image, the best first; rows after the last one are empty. Boxes (B, D, 4), x1, y1, x2, y2
            in pixels of the input, 0 in empty rows; scores (B, D), 0 in empty rows; labels (B, D), from 1, -1 in empty
            rows; with mask heads, mask probabilities within each box, (B, D, size, size), 0 in empty rows.
        """
        features = self.backbone(images)
        limits = sizes.flip(1).repeat(1, 2)[:, None]  # (B, 1, 4): width, height, width, height
        boxes, is_proposal = self.propose(list(features.values()), limits)
        boxes, scores = self.classify(list(features.values()), boxes, limits)
        scores = scores.where(is_proposal[..., None], NOTHING)
        boxes, scores, labels = self.select(boxes, scores)
        is_detection = scores > self.heads.min_score  # (B, D)
        outputs = boxes * is_detection[..., None], scores * is_detection, labels.where(is_detection, -1)
        if self.heads.mask_heads is None:
            return outputs
        masks = self.detect_masks(list(features.values()), boxes, labels)
        return *outputs, masks * is_detection[..., None, None]

    def propose(self, feature_maps: list[Tensor], limits: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (B, n, 4) of the RPN, and which of them are proposals (B, n); see `RegionProposalNetwork`.

        Args:
            feature_maps: of all levels, (B, C, height, width).
            limits: (B, 1, 4), see `forward`.
        """
        level_boxes, level_scores = [], []
        for objectness, deltas, anchors in zip(
            *self.rpn_head(feature_maps), self.anchors.split(self.counts), strict=True
        ):
            logits = objectness.permute(0, 2, 3, 1).flatten(1)  # (B, anchors of the level)
            deltas = deltas.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3)  # (B, anchors, 4)
            logits, best = logits.topk(min(self.pre_nms, len(anchors)), dim=1)  # (B, m)
            deltas = take(deltas, best)
            boxes = self.rpn_coder.decode_single(deltas.flatten(0, 1), anchors[best.flatten()]).view(deltas.shape)
            boxes = clip(boxes, limits)
            is_large = (boxes[..., 2:] - boxes[..., :2] >= self.min_side).all(dim=2)  # (B, m)
            scores = logits.sigmoid().where(is_large, NOTHING)
            is_kept = keep_best(boxes, scores, self.rpn_iou, NOTHING, self.post_nms)
            level_boxes.append(boxes)
            level_scores.append(scores.where(is_kept, NOTHING))
        boxes, scores = torch.cat(level_boxes, dim=1), torch.cat(level_scores, dim=1)
        scores, best = scores.topk(min(self.post_nms, scores.shape[1]), dim=1)
        return take(boxes, best), scores > NOTHING

    def classify(self, feature_maps: list[Tensor], boxes: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
        """A box (B, n, K, 4) and a score (B, n, K) of each class for RoIs (B, n, 4); see `CascadeHeads.detect`."""
        B, n = boxes.shape[:2]
        logits_sum = 0.0
        for head, coder in zip(self.heads.box_heads, self.heads.coders, strict=True):
            logits, deltas = head(pool(self.heads.box_pool, feature_maps, boxes))  # (Bn, K + 1), (Bn, K, 4)
            logits_sum = logits_sum + logits
            if head is not self.heads.box_heads[-1]:
                best = logits[:, 1:].argmax(dim=1)  # (Bn,)
                decoded = coder.decode_single(take(deltas, best[:, None])[:, 0], boxes.flatten(0, 1))
                boxes = clip(decoded.view(B, n, 4), limits)
        scores = (logits_sum / len(self.heads.box_heads)).softmax(dim=1)[:, 1:]
        decoded = coder.decode_single(deltas.flatten(1), boxes.flatten(0, 1))
        return clip(decoded.view(B, n, -1, 4), limits[:, None]), scores.view(B, n, -1)

    def select(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (B, D, 4), scores and labels (B, D) of the best detections; see `CascadeHeads.select`.

        Args:
            boxes: a box per class, (B, n, K, 4).
            scores: a score per class, (B, n, K).
        """
        B, n, K = scores.shape
        heads = self.heads
        groups = boxes.transpose(1, 2).flatten(0, 1), scores.transpose(1, 2).flatten(0, 1)  # (BK, n, 4), (BK, n)
        is_kept = keep_best(*groups, heads.box.NMS_IOU, heads.min_score, heads.box.DETECTIONS)
        scores = scores.where(is_kept.view(B, K, n).transpose(1, 2), NOTHING)
        scores, best = scores.flatten(1).topk(min(heads.box.DETECTIONS, n * K), dim=1)  # (B, D)
        return take(boxes.flatten(1, 2), best), scores, best % K + 1

    def detect_masks(self, feature_maps: list[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        """Mask probabilities (B, D, size, size) of detections; see `CascadeHeads.detect_masks`."""
        pooled, labels = pool(self.heads.mask_pool, feature_maps, boxes), labels.flatten()
        masks = sum(head(pooled, labels).sigmoid() for head in self.heads.mask_heads) / len(self.heads.mask_heads)
        return masks[:, 0].unflatten(0, boxes.shape[:2])


def clip(boxes: Tensor, limits: Tensor) -> Tensor:
    """Clip boxes (..., 4) to images; `limits` (..., 4) are width, height, width, height."""
    return torch.minimum(boxes.clamp(min=0), limits)


def take(x: Tensor, indices: Tensor) -> Tensor:
    """Rows of each image: x (B, n, C) at indices (B, m), (B, m, C)."""
    return x.gather(1, indices[..., None].expand(-1, -1, x.shape[2]))


def pool(pooler: AlignedPooler, feature_maps: list[Tensor], boxes: Tensor) -> Tensor:
    """Features of RoIs (B, n, 4), (Bn, C, size, size); see `AlignedPooler`."""
    B, n = boxes.shape[:2]
    image_index = torch.arange(B, device=boxes.device)[:, None, None].expand(B, n, 1).to(boxes)
    flat = boxes.flatten(0, 1)
    levels = pooler.map_levels([flat])
    pooled = 0.0
    for level, (features, stride) in enumerate(zip(feature_maps, pooler.strides, strict=False)):
        rois = torch.cat((image_index.flatten(0, 1), flat * (levels == level)[:, None]), dim=1)  # (Bn, 5)
        pooled = pooled + roi_align(features, rois, pooler.size, 1 / stride, sampling_ratio=0, aligned=True)
    return pooled


@torch.library.custom_op('msg_detection::keep_best', mutates_args=())
def keep_best(boxes: Tensor, scores: Tensor, iou: float, min_score: float, limit: int) -> Tensor:
    """Which boxes NMS keeps in each group. This operator has fixed shapes; `keep_best_onnx` writes it to ONNX.

    Args:
        boxes: (G, m, 4).
        scores: (G, m).
        iou: boxes that overlap a better one by more are suppressed.
        min_score: only boxes with a higher score count.
        limit: the most boxes that are kept in a group.

    Returns:
        Boolean, (G, m).
    """
    is_kept = torch.zeros_like(scores, dtype=torch.bool)
    for group, (group_boxes, group_scores) in enumerate(zip(boxes, scores, strict=True)):
        counts = torch.where(group_scores > min_score)[0]
        kept = nms(group_boxes[counts], group_scores[counts], iou)[:limit]
        is_kept[group, counts[kept]] = True
    return is_kept


@keep_best.register_fake
def _(boxes: Tensor, scores: Tensor, iou: float, min_score: float, limit: int) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


def onnx_translations() -> Mapping[object, object]:
    """How `torch.onnx.export` writes `keep_best`, for its `custom_translation_table`."""
    from onnxscript import opset20 as op  # only ONNX needs the package

    def keep_best_onnx(boxes, scores, iou: float, min_score: float, limit: int):
        found = op.NonMaxSuppression(boxes, op.Unsqueeze(scores, [1]), [limit], [iou], [min_score])
        indices = op.Gather(found, [0, 2], axis=1)  # group and box, (kept, 2)
        ones = op.Expand(1.0, op.Shape(indices, start=0, end=1))
        return op.Greater(op.ScatterND(op.Mul(scores, 0.0), indices, ones), 0.0)

    return {torch.ops.msg_detection.keep_best.default: keep_best_onnx}
