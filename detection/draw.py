"""Pictures of detections and of ground truth."""

from collections.abc import Sequence

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from data.drawn_text import fit_font, shorten
from data.images import choose_images
from detection.data import CocoDataset
from detection.detections import Detections
from detection.models.masks import BoxMasks

MIN_SHORT = 400  # pixels; smaller images are enlarged
MAX_LONG = 4000  # pixels of an enlarged image
MAX_NAME = 40  # characters of a name with its score

Color = tuple[int, int, int]

# Red, green and blue of 80 colours: Okabe and Ito's seven, then each time the one that is farthest from those before,
# to people who see all colours, no red, or no green (Machado et al., 2009). By CIE76, any two of the first 20 differ by
# 17 or more, as Okabe and Ito's do, and any two of all by 7.8.
_CLASS_COLORS = bytes.fromhex("""
e69f00 56b4e9 009e73 f0e442 0072b2 d55e00 cc79a7 0000ff 87ffa5 870f0f
6969ff 692d5a 4bffff 3c2da5 5af0c3 ff005a f0a55a 6996ff 2d2dd2 2d693c
780f78 87c387 b42d00 3cc3d2 a54b87 e1f078 3c69d2 c30fa5 0f873c 69e178
964b69 5ae1d2 69c3a5 69e1ff 3c4bd2 5a4bff 96962d d2d24b 0096d2 782d4b
5aa569 c3002d 1e4b87 4b4b1e 00c34b 1ef0a5 ff783c 96a5ff b478b4 a56987
001ee1 5affe1 5a78d2 5a2d96 ffc300 4b785a 783cb4 3c87ff a5002d 69b487
1eb4d2 4bd2ff 78d2a5 69c3c3 87ffc3 69b469 782d3c 4be187 00e1e1 c34b0f
692d69 5a875a 0f3cff 96ff96 4b1eb4 f04b96 5a5a96 873c69 a5ff5a 962de1
""")


def draw_detections(image: Tensor, detections: Detections) -> Image.Image:
    """Draw boxes, masks, and names with scores, highest scores on top, in the colours of their classes.

    Small images are enlarged to make names legible.

    Args:
        image: (3, H, W) in [0, 1].
        detections: of the image.
    """
    shown = detections.select(detections.scores.argsort())
    texts = [f'{detection.name} {detection.score:.0%}' for detection in shown]
    colors = [class_color(label) for label in shown.labels.tolist()]
    return _draw(image, shown.boxes, texts, colors, shown.box_masks)


def draw_ground_truth(image: Tensor, target: dict[str, Tensor], class_names: list[str]) -> Image.Image:
    """Draw an image's objects: boxes, names, and masks if there are any.

    Args:
        image: (3, H, W) in [0, 1].
        target: `boxes` (n, 4), `labels` (n,) from 1, and perhaps `masks` (n, H, W) of 0 and 1.
        class_names: names of the labels, from label 1.
    """
    boxes, masks = target['boxes'], None
    if 'masks' in target:
        height, width = image.shape[1:]
        whole = boxes.new_tensor([[0, 0, width, height]]).expand(len(boxes), 4)
        masks = BoxMasks(target['masks'][:, None].float(), whole, (height, width))
    labels = target['labels'].tolist()
    return _draw(image, boxes, [class_names[i - 1] for i in labels], list(map(class_color, labels)), masks)


def _draw(
    image: Tensor, boxes: Tensor, texts: list[str], colors: Sequence[Color], masks: BoxMasks | None
) -> Image.Image:
    """Draw objects, the last on top."""
    short, long = sorted(image.shape[1:])
    factor = max(min(round(MIN_SHORT / short), MAX_LONG // long), 1)
    image = image.cpu()
    if factor > 1:
        image = F.interpolate(image[None], scale_factor=factor, mode='bilinear')[0]
    picture = (image * 255).round_().clamp_(0, 255).to(torch.uint8)
    short = min(picture.shape[1:])
    line = max(short // 250, 1)
    if masks is not None:
        for (rows, columns, mask), color in zip(masks.enlarged(factor), colors, strict=True):
            region, pixel = picture[:, rows, columns], torch.tensor(color, dtype=torch.uint8)[:, None]
            region[:, mask] = region[:, mask] // 2 + pixel // 2
            region[:, _outline(mask, line)] = pixel
    drawn = to_pil_image(picture)
    if len(boxes):
        _draw_boxes(drawn, (boxes * factor).tolist(), texts, colors, line, max(short // 36, 11))
    return drawn


def _outline(mask: Tensor, width: int) -> Tensor:
    """The pixels of a mask (H, W) that are at most `width` from its edge."""
    whole = mask.numpy().astype(np.uint8)
    inner = cv2.erode(whole, np.ones((3, 3), np.uint8), iterations=width)
    return torch.from_numpy(whole > inner)


def _draw_boxes(
    picture: Image.Image,
    boxes: Sequence[Sequence[float]],
    texts: Sequence[str],
    colors: Sequence[Color],
    line: int,
    font_size: int,
) -> None:
    """Draw boxes, and above each its text on its colour; texts stay within the picture."""
    texts, face = fit_font([shorten(text, MAX_NAME) for text in texts])
    font = ImageFont.truetype(str(face), font_size)
    draw = ImageDraw.Draw(picture)
    for (x1, y1, x2, y2), color in zip(boxes, colors, strict=True):
        draw.rectangle((round(x1), round(y1), max(round(x2), round(x1)), max(round(y2), round(y1))), None, color, line)
    margin = max(font_size // 6, 1)
    height = sum(font.getmetrics()) + margin
    for (x1, y1, _, _), text, color in zip(boxes, texts, colors, strict=True):
        width = round(font.getlength(text)) + 2 * margin
        left = max(min(round(x1), picture.width - width), 0)
        top = round(y1) - height if y1 >= height else min(max(round(y1), 0), max(picture.height - height, 0))
        draw.rectangle((left, top, left + width, top + height), color)
        draw.text((left + margin, top), text, contrasting(color), font)


def class_color(label: int) -> Color:
    """The colour of a class by its number, from 1; up to 80 classes have different ones."""
    start = 3 * (label - 1) % len(_CLASS_COLORS)
    red, green, blue = _CLASS_COLORS[start : start + 3]
    return red, green, blue


def contrasting(color: Color) -> Color:
    """Black or white: the one with more contrast to a colour, by its luminance as the WCAG defines it."""
    red, green, blue = ((value / 255) ** 2.2 for value in color)
    return (0, 0, 0) if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else (255, 255, 255)


def draw_sheet(dataset: CocoDataset, count: int = 24, columns: int = 4, side: int = 400, seed: int = 0) -> Image.Image:
    """Draw some samples of a dataset, a random but fixed choice, as its transform leaves them.

    Args:
        dataset: the dataset.
        count: number of samples.
        columns: samples in a row.
        side: of the square that a sample is fitted into, in pixels.
        seed: of the transform's random numbers.
    """
    chosen = choose_images(range(len(dataset)), count)
    rows = -(-len(chosen) // columns)
    sheet = Image.new('RGB', (columns * side, rows * side), 'white')
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for number, index in enumerate(chosen):
            picture = draw_ground_truth(*dataset[index], dataset.classes)
            picture.thumbnail((side - 8, side - 8))
            row, column = divmod(number, columns)
            sheet.paste(picture, (column * side, row * side))
    return sheet


def beside(left: Image.Image, right: Image.Image, gap: int = 8) -> Image.Image:
    """Two pictures of one height next to each other, on white."""
    both = Image.new('RGB', (left.width + gap + right.width, left.height), 'white')
    both.paste(left, (0, 0))
    both.paste(right, (left.width + gap, 0))
    return both
