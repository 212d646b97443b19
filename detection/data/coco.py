"""A data set of images and objects in COCO's format, with errors that name the file or entry at fault."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from data import DataError
from data.image_folder import load_image
from detection.data.annotations import clipped_boxes, decode_masks, has_area, read_annotations

Target = dict[str, Any]


class CocoDataset(Dataset):
    """The images of `<root>/<split>/` with the objects of `<root>/annotations/instances_<split>.json`.

    A sample is an image (3, H, W) in 0 to 1, and a target with `boxes` (n, 4) as x1, y1, x2, y2 in pixels, `labels`
    (n,) from 1 on in the order of the categories, `masks` (n, H, W) of 0 and 1, and `image_id`. Regions marked as
    crowds, and boxes that are less than a pixel wide or high inside the image, are not among the objects.

    Args:
        root: folder of the data.
        split: such as train2017.
        transform: of image and target; None leaves them as they are.
        is_train: leave out images without objects, which training learns nothing from.

    Attributes:
        annotation_file: where the objects are from.
        categories: the file's entries; label i + 1 is `categories[i]`.
        images: the entries of the images that it has.
        notes: what there is to know of the file.

    Raises:
        DataError: the data cannot be used.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        transform: Callable[[Tensor, Target], tuple[Tensor, Target]] | None = None,
        is_train: bool = False,
    ):
        self.folder, self.transform = root / split, transform
        self.annotation_file = root / 'annotations' / f'instances_{split}.json'
        tree = read_annotations(self.annotation_file)
        self.categories = tree['categories']
        self.label_of = {category['id']: label for label, category in enumerate(self.categories, start=1)}
        objects, crowds, flat = _objects_by_image(tree)
        self.images = [image for image in tree['images'] if objects[image['id']] or not is_train]
        if not self.images:
            raise DataError(f'{self.annotation_file}: none of its images has an object to learn')
        # Packed: as Python objects, COCO's would be copied anew into each loader process that touches them.
        self.objects = [pickle.dumps(objects[image['id']]) for image in self.images]
        left_out = len(tree['images']) - len(self.images)
        counts = {'images without objects': left_out, 'crowd regions': crowds, 'boxes without area': flat}
        self.notes = [f'{count} {what} left out' for what, count in counts.items() if count]
        self._check_files()

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        entry, objects = self.images[index], pickle.loads(self.objects[index])
        path = self.folder / entry['file_name']
        picture = load_image(path)
        if picture.size != (entry['width'], entry['height']):
            raise DataError(
                f'image {path} has {picture.width} x {picture.height} pixels, but {self.annotation_file} says '
                f'{entry["width"]} x {entry["height"]}: replace one of them'
            )
        image = pil_to_tensor(picture).float() / 255
        target = {
            'boxes': clipped_boxes(objects, entry),
            'labels': torch.tensor([self.label_of[each['category_id']] for each in objects], dtype=torch.int64),
            'masks': decode_masks(objects, entry),
            'image_id': entry['id'],
        }
        return self.transform(image, target) if self.transform else (image, target)

    def __len__(self) -> int:
        return len(self.images)

    def _check_files(self) -> None:
        """Look for all images now, by listing their folders once, not when an epoch comes to them."""
        there: dict[Path, set[str]] = {}
        paths = [self.folder / entry['file_name'] for entry in self.images]
        for folder in {path.parent for path in paths}:
            if not folder.is_dir():
                raise DataError(f'folder {folder}, with images of {self.annotation_file}, does not exist: add it')
            there[folder] = set(os.listdir(folder))
        missing = [path for path in paths if path.name not in there[path.parent]]
        if missing:
            raise DataError(
                f'image {missing[0]} does not exist, and {len(missing) - 1} more of {self.annotation_file} do not: '
                f'add the files, or remove their entries'
            )


def _objects_by_image(tree: dict[str, Any]) -> tuple[dict[Any, list[dict]], int, int]:
    """By id of image, the annotations that can be learned; and how many are crowds, and how many have no area."""
    images = {image['id']: image for image in tree['images']}
    objects: dict[Any, list[dict]] = {image_id: [] for image_id in images}
    crowds = flat = 0
    for annotation in tree['annotations']:
        if annotation['iscrowd']:
            crowds += 1
        elif not has_area(annotation, images[annotation['image_id']]):
            flat += 1
        else:
            objects[annotation['image_id']].append(annotation)
    return objects, crowds, flat
