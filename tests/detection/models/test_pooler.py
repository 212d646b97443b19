import torch

from detection.models.pooler import AlignedPooler
from tests.helpers.detectors import STRIDES


def test_bins_are_at_their_positions_in_the_image():
    """On feature maps that hold the position of their own pixels' centres, a bin holds the position of its centre."""
    strides = (4, 8)
    feature_maps = []
    for stride in strides:
        centre = (torch.arange(256 // stride) + 0.5) * stride
        feature_maps.append(torch.stack(torch.meshgrid(centre, centre, indexing='ij'))[None])  # (1, 2, H, W): y, x
    boxes = torch.tensor([[20.0, 30.0, 34.0, 51.0], [10.0, 20.0, 220.0, 230.0]])
    pooled = AlignedPooler(7, strides)(feature_maps, [boxes])
    for box, features in zip(boxes, pooled, strict=True):
        x, y, step_x, step_y = *box[:2], (box[2] - box[0]) / 7, (box[3] - box[1]) / 7
        bins = torch.arange(7) + 0.5
        torch.testing.assert_close(features[0], (y + bins * step_y)[:, None].expand(7, 7))
        torch.testing.assert_close(features[1], (x + bins * step_x)[None].expand(7, 7))


def test_rois_are_pooled_from_the_level_of_their_size_and_from_their_image():
    feature_maps = [torch.full((2, 1, 256 // 2**i, 256 // 2**i), float(i)) for i in range(4)]
    for level in feature_maps:
        level[1] += 10
    pooler = AlignedPooler(2, STRIDES)
    sizes = torch.tensor([111.0, 113.0, 223.0, 225.0, 447.0, 449.0, 900.0, 10.0])
    boxes = torch.stack((torch.zeros(8), torch.zeros(8), sizes, sizes), dim=1)
    pooled = pooler(feature_maps, [boxes[:5], boxes[5:]])
    assert pooled.mean(dim=(1, 2, 3)).tolist() == [0, 1, 1, 2, 2, 13, 13, 10]
    assert pooler(feature_maps, [boxes[:0], boxes[:0]]).shape == (0, 1, 2, 2)
