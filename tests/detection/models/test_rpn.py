import pytest
import torch
from torchvision.models.detection.image_list import ImageList

from detection.models.rpn import StridedAnchors


def test_anchors_have_exact_strides_sizes_and_ratios_in_fp32():
    generator = StridedAnchors((4, 8, 16, 32, 64), 8, (0.5, 1.0, 2.0))
    images = ImageList(torch.zeros(2, 3, 800, 1280), [(800, 1280), (700, 1280)])
    grids = [(200, 320), (100, 160), (50, 80), (25, 40), (13, 20)]
    anchors = generator(images, [torch.zeros(2, 1, *grid, dtype=torch.float16) for grid in grids])
    assert len(anchors) == 2
    assert anchors[0].dtype == torch.float32
    assert len(anchors[0]) == 3 * sum(height * width for height, width in grids)
    last = anchors[0][-3:]  # at row 12, column 19 of the coarsest
    torch.testing.assert_close((last[:, :2] + last[:, 2:]) / 2, torch.tensor([[19 * 64.0, 12 * 64.0]] * 3))
    size = last[:, 2:] - last[:, :2]
    torch.testing.assert_close(size[1], torch.tensor([512.0, 512.0]))
    assert (size[:, 1] / size[:, 0]).tolist() == pytest.approx([0.5, 1, 2])
    assert size.prod(dim=1).tolist() == pytest.approx([512.0**2] * 3)
