import pytest
import torch

from detection.models.heads import BoxHead, MaskHead


@pytest.mark.parametrize('count', [5, 0])
def test_heads_give_logits_box_deltas_and_masks_per_class_in_fp32(count):
    pooled = torch.rand(count, 16, 7, 7)
    box_head = BoxHead(16, 7, convs=[16], linears=[32, 32], classes=3).eval()
    mask_head = MaskHead(16, convs=[16, 16], upsampled=8, classes=3)
    with torch.autocast('cpu', torch.bfloat16):
        logits, box_deltas = box_head(pooled)
        mask_logits = mask_head(pooled)
    assert (logits.shape, box_deltas.shape, mask_logits.shape) == ((count, 4), (count, 3, 4), (count, 3, 14, 14))
    assert logits.dtype == box_deltas.dtype == mask_logits.dtype == torch.float32
