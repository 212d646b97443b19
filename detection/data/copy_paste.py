"""Copy-paste augmentation: objects of one training image are pasted on another (Ghiasi et al., CVPR 2021)."""

import torch
from torch import Tensor

from detection.data.transforms import (
    OBJECT_KEYS,
    Target,
    crop,
    fit_boxes,
    fit_cut_boxes,
    has_masks,
    random_integer,
    select_objects,
)


def paste_objects(image: Tensor, target: Target, source: Tensor, source_target: Target) -> tuple[Tensor, Target]:
    """Paste a random number of the objects of another image, without blending.

    The other image is laid over this one at a random position. Its objects are cut at the border of this image, and
    those without a mask are not pasted. Of this image's objects, masks lose what is hidden, boxes are fitted to the
    rest, and hidden objects are dropped; those without a mask stay as they are.

    Args:
        image: (3, H, W).
        target: its objects, with masks.
        source: the other image, of any size.
        source_target: its objects, with masks.
    """
    size = tuple(image.shape[1:])
    excess = [length - own for length, own in zip(source.shape[1:], size, strict=True)]
    top, left = (random_integer(min(x, 0), max(x, 0)) for x in excess)
    source, pasted = crop(source, source_target, top, left, *size)
    pasted = fit_cut_boxes(select_objects(pasted, has_masks(pasted)), size)
    count = len(pasted['boxes'])
    if not count:
        return image, target
    pasted = select_objects(pasted, torch.randperm(count)[: random_integer(1, count)])
    covered = pasted['masks'].any(dim=0).bool()  # PyTorch's `any` of bytes gives bytes
    masks = target['masks'] * ~covered
    is_partly_hidden = (masks != target['masks']).flatten(1).any(dim=1)
    target = fit_boxes(target | {'masks': masks}, is_partly_hidden)
    merged = {key: torch.cat((target[key], pasted[key])) for key in OBJECT_KEYS if key in target}
    return torch.where(covered, source, image), target | merged
