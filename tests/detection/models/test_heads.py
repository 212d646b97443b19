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


def test_masks_of_given_labels_are_those_of_all_classes():
    head, pooled, labels = MaskHead(16, convs=[16], upsampled=8, classes=3), torch.rand(4, 16, 7, 7), [1, 3, 2, 3]
    of_labels = head(pooled, torch.tensor(labels))
    assert of_labels.shape == (4, 1, 14, 14)
    expected = head(pooled)[torch.arange(4), torch.tensor(labels) - 1, None]
    torch.testing.assert_close(of_labels, expected)
    assert head(pooled[:0], torch.tensor([], dtype=torch.long)).shape == (0, 1, 14, 14)
