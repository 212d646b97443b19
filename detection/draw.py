"""Pictures of detections."""

import colorsys
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes

from detection.models.masks import BoxMasks

MIN_SHORT = 400  # pixels; smaller images are enlarged
MAX_LONG = 4000  # pixels of an enlarged image
FONT = str(Path(matplotlib.get_data_path()) / 'fonts' / 'ttf' / 'DejaVuSans.ttf')


def draw_detections(
    image: Tensor, detections: dict[str, Tensor | BoxMasks], class_names: list[str], threshold: float = 0.5
) -> Image.Image:
    """Draw boxes, masks, and names with scores, highest scores on top; small images are enlarged to make names legible.

    Args:
        image: (3, H, W) in [0, 1].
        detections: of `Detector.detect`: `boxes` (n, 4), `labels` (n,) from 1, `scores` (n,) and perhaps `masks`.
        class_names: names of the labels, from label 1.
        threshold: lowest score that is drawn.
    """
    short, long = sorted(image.shape[1:])
    factor = max(min(round(MIN_SHORT / short), MAX_LONG // long), 1)
    image = image.cpu()
    if factor > 1:
        image = F.interpolate(image[None], scale_factor=factor, mode='bilinear')[0]
    picture = (image * 255).round_().clamp_(0, 255).to(torch.uint8)
    scores = detections['scores'].cpu()
    order = scores.argsort()
    order = order[scores[order] >= threshold]
    if len(order):
        boxes, labels = (detections[key].cpu()[order] for key in ('boxes', 'labels'))
        masks = detections['masks'].cpu()[order].enlarged(factor) if 'masks' in detections else ()
        colors = [instance_color(rank) for rank in reversed(range(len(order)))]
        texts = [f'{class_names[i - 1]} {score:.0%}' for i, score in zip(labels.tolist(), scores[order], strict=True)]
        short = min(picture.shape[1:])
        style = {'width': max(short // 250, 1), 'font': FONT, 'font_size': max(short // 35, 9), 'fill_labels': True}
        # torchvision's masks turn black where they overlap
        for (rows, columns, mask), color in zip(masks, colors, strict=False):  # perhaps none
            region = picture[:, rows, columns]
            region[:, mask] = region[:, mask] // 2 + torch.tensor(color, dtype=torch.uint8)[:, None] // 2
        picture = draw_bounding_boxes(picture, boxes * factor, texts, colors, **style)
    return to_pil_image(picture)


def instance_color(rank: int) -> tuple[int, int, int]:
    """A bright colour; instances of neighbouring ranks are far apart, by the golden section of the hue circle."""
    red, green, blue = colorsys.hsv_to_rgb(rank * 0.618034 % 1, 0.75, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)
