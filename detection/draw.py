"""Pictures of detections and of ground truth."""

import colorsys

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes

from data.drawn_text import fit_font, shorten
from data.images import choose_images
from detection.data import CocoDataset
from detection.detections import Detections
from detection.models.masks import BoxMasks

MIN_SHORT = 400  # pixels; smaller images are enlarged
MAX_LONG = 4000  # pixels of an enlarged image
MAX_NAME = 40  # characters of a name with its score


def draw_detections(image: Tensor, detections: Detections) -> Image.Image:
    """Draw boxes, masks, and names with scores, highest scores on top; small images are enlarged to make names legible.

    Args:
        image: (3, H, W) in [0, 1].
        detections: of the image.
    """
    shown = detections.select(detections.scores.argsort())
    texts = [f'{detection.name} {detection.score:.0%}' for detection in shown]
    return _draw(image, shown.boxes, texts, shown.box_masks)


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
    return _draw(image, boxes, [class_names[i - 1] for i in target['labels'].tolist()], masks)


def _draw(image: Tensor, boxes: Tensor, texts: list[str], masks: BoxMasks | None) -> Image.Image:
    """Draw objects, the last on top."""
    short, long = sorted(image.shape[1:])
    factor = max(min(round(MIN_SHORT / short), MAX_LONG // long), 1)
    image = image.cpu()
    if factor > 1:
        image = F.interpolate(image[None], scale_factor=factor, mode='bilinear')[0]
    picture = (image * 255).round_().clamp_(0, 255).to(torch.uint8)
    colors = [instance_color(rank) for rank in reversed(range(len(boxes)))]
    if masks is not None:
        # torchvision's masks turn black where they overlap
        for (rows, columns, mask), color in zip(masks.enlarged(factor), colors, strict=True):
            region = picture[:, rows, columns]
            region[:, mask] = region[:, mask] // 2 + torch.tensor(color, dtype=torch.uint8)[:, None] // 2
    if len(boxes):
        short = min(picture.shape[1:])
        texts, font = fit_font([shorten(text, MAX_NAME) for text in texts])
        style = {'width': max(short // 250, 1), 'font': str(font), 'font_size': max(short // 35, 9)}
        picture = draw_bounding_boxes(picture, boxes * factor, texts, colors, fill_labels=True, **style)
    return to_pil_image(picture)


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


def instance_color(rank: int) -> tuple[int, int, int]:
    """A bright colour; instances of neighbouring ranks are far apart, by the golden section of the hue circle."""
    red, green, blue = colorsys.hsv_to_rgb(rank * 0.618034 % 1, 0.75, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)
