"""A dataset of images and objects in COCO's format, with errors that name the file or entry at fault."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from data import DataError
from data.images import ImageHeader, choose_images, existing_path, load_image, read_header
from data.packed_lists import PackedList
from data.sharing import Shareable
from detection.data.annotations import clipped_boxes, decode_masks, has_area, read_annotations, select_classes

Target = dict[str, Any]

# Images whose headers are read when a dataset is opened.
SAMPLED_HEADERS = 100


class SplitFiles(NamedTuple):
    """Where a split is: its annotation file and the folder of its images."""

    annotations: Path
    images: Path


class Selection(NamedTuple):
    """What of a split is taken.

    Attributes:
        classes: names of categories; none takes all.
        limit: number of images, a random but fixed choice; 0 takes all.
        empty_images: train on images without objects too.
    """

    classes: Sequence[str] = ()
    limit: int = 0
    empty_images: bool = False


EVERYTHING = Selection()


class CocoDataset(Shareable, Dataset):
    """The images of `<root>/<split>/` with the objects of `<root>/annotations/instances_<split>.json`.

    A sample is an image (3, H, W) in [0, 1] and a target with `boxes` (n, 4) as x1, y1, x2, y2 in pixels, `labels` (n,)
    from 1, in the order of the categories, and `image_id`; with masks also `masks` (n, H, W) of 0 and 1 and `has_mask`
    (n,). Crowd regions, and boxes whose
    width or height within the image is less than a pixel, are left out.

    Args:
        root: folder of the data.
        split: such as train2017.
        transform: takes and returns an image and its target; None for none.
        is_train: leave out images without objects, which training cannot use.
        with_masks: read masks too.
        files: the split, where it is somewhere else.
        selection: what of it is taken.
        upright: turn images as their EXIF orientation says, so that annotations are of the upright images; otherwise,
            they are of the images as stored.

    Attributes:
        annotation_file: the file of the objects.
        categories: its entries; label i + 1 is `categories[i]`.
        images: its entries of the images in the dataset.
        notes: for the log: what was left out of training or is absent, loose boxes, EXIF orientations.
        ground_truth: the file's content for these images and categories, in evaluation; the process that has read the
            file has it, for pycocotools, and None in others.
        is_labelled: whether the file has annotations at all.
        num_objects: number of objects in the dataset, without crowd regions.

    Raises:
        DataError: the data cannot be used.
    """

    ground_truth: dict[str, Any] | None = None

    def __init__(
        self,
        root: Path,
        split: str,
        transform: Callable[[Tensor, Target], tuple[Tensor, Target]] | None = None,
        is_train: bool = False,
        with_masks: bool = True,
        files: SplitFiles | None = None,
        selection: Selection = EVERYTHING,
        upright: bool = True,
    ):
        files = files or SplitFiles(root / 'annotations' / f'instances_{split}.json', root / split)
        self.annotation_file, self.folder = files
        self.transform, self.with_masks, self.upright = transform, with_masks, upright
        tree = read_annotations(self.annotation_file, with_masks, needs_objects=is_train)
        self.is_labelled = tree['is_labelled']
        if selection.classes:
            tree = select_classes(tree, selection.classes, self.annotation_file)
        self.categories = tree['categories']
        self._labels = {category['id']: label for label, category in enumerate(self.categories, start=1)}
        objects, crowds, without_area = _objects_by_image(tree)
        keeps_empty = selection.empty_images or not is_train
        usable = [image for image in tree['images'] if objects[image['id']] or keeps_empty]
        images = choose_images(usable, selection.limit or None)
        chosen = [x for image in images for x in objects[image['id']]]
        if not images or (is_train and not chosen):
            raise DataError(f'{self.annotation_file}: none of its images has an object to train on')
        self.num_objects = len(chosen)
        self.images = PackedList.of(images)
        self._objects = PackedList.of(objects[image['id']] for image in images)
        without_objects = len(tree['images']) - len(usable)
        counts = {
            'images without objects': without_objects,
            'crowd regions': crowds,
            'boxes without area': without_area,
        }
        self.notes = [f'{count} {what} left out' for what, count in counts.items() if count and is_train]
        self.notes += self._notes_on_absence(images, objects, is_train) + tree['notes']
        if len(images) < len(usable):
            self.notes.append(f'{len(images)} of {len(usable)} images, a random but fixed choice')
        self.ground_truth = None if is_train else _ground_truth(tree, images)
        self._check_files()
        self._check_headers()

    def _notes_on_absence(
        self, images: Sequence[dict[str, Any]], objects: Mapping[Any, list[dict[str, Any]]], is_train: bool
    ) -> list[str]:
        """Notes on images and categories without objects: they are easily a mistake, and no error."""
        if not is_train:
            return [] if self.num_objects or not self.is_labelled else ['no objects: AP and AR are undefined']
        empty = sum(not objects[image['id']] for image in images)
        notes = [f'{empty} images without objects are trained on as background'] if empty else []
        used = {x['category_id'] for image in images for x in objects[image['id']]}
        unused = [category['name'] for category in self.categories if category['id'] not in used]
        if unused:
            names = ', '.join(unused[:5]) + (', ...' if len(unused) > 5 else '')
            notes.append(f'{len(unused)} of {len(self.categories)} categories have no object to train on: {names}')
        return notes

    def __getstate__(self) -> dict[str, Any]:
        """All but the ground truth, for other processes."""
        return {name: value for name, value in vars(self).items() if name != 'ground_truth'}

    @property
    def classes(self) -> list[str]:
        """Names of the labels, from label 1."""
        return [category['name'] for category in self.categories]

    def sample_names(self) -> Iterator[str]:
        """A name per image for the record of a run: its file without the suffix, and its objects."""
        keys = 'category_id', 'bbox', 'segmentation'
        for image, objects in zip(self.images, self._objects, strict=True):
            values = [[x[key] for key in keys if key in x] for x in objects]
            yield f'{Path(image["file_name"]).with_suffix("")} {json.dumps(values)}'

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        entry, objects = self.images[index], self._objects[index]
        path = existing_path(self.folder, entry['file_name'])
        picture = load_image(path, upright=self.upright)
        if picture.size != (entry['width'], entry['height']):
            raise self._size_error(entry, picture.size, read_header(path))
        image = pil_to_tensor(picture).float() / 255
        target = {
            'boxes': clipped_boxes(objects, entry),
            'labels': torch.tensor([self._labels[x['category_id']] for x in objects], dtype=torch.int64),
            'image_id': entry['id'],
        }
        if self.with_masks:
            target['masks'] = decode_masks(objects, entry)
            target['has_mask'] = torch.tensor(['segmentation' in x for x in objects], dtype=torch.bool)
        return self.transform(image, target) if self.transform else (image, target)

    def __len__(self) -> int:
        return len(self.images)

    def _check_files(self) -> None:
        """Look for all images now, listing each folder once, instead of when an epoch reaches them."""
        names: dict[Path, set[str]] = {}
        paths = [existing_path(self.folder, entry['file_name']) for entry in self.images]
        for folder in {path.parent for path in paths}:
            if not os.path.isdir(folder):  # Path.is_dir raises errors for names that are too long
                raise DataError(f'folder {folder}, with images of {self.annotation_file}, does not exist: add it')
            names[folder] = set(os.listdir(folder))
        missing = [path for path in paths if path.name not in names[path.parent]]
        if missing:
            raise DataError(
                f'image {missing[0]} does not exist, and {len(missing) - 1} more of {self.annotation_file} do not: '
                f'add the files, or remove their entries'
            )

    def _check_headers(self) -> None:
        """Compare the sizes of some images, evenly chosen, with the annotations, and note EXIF orientations."""
        sampled = [self.images[i] for i in range(0, len(self), -(-len(self) // SAMPLED_HEADERS))]
        turned = 0
        for entry in sampled:
            header = read_header(existing_path(self.folder, entry['file_name']))
            size = header.upright_size if self.upright else header.size
            if size != (entry['width'], entry['height']):
                raise self._size_error(entry, size, header)
            turned += header.orientation != 1
        if turned:
            effect = (
                'turned upright; their annotations must be of the upright images'
                if self.upright
                else 'read as stored; DATA.EXIF True turns them upright'
            )
            self.notes.append(f'{turned} of {len(sampled)} sampled images have an EXIF orientation and are {effect}')

    def _size_error(self, entry: dict[str, Any], size: tuple[int, int], header: ImageHeader) -> DataError:
        """The error of an image whose width and height, as they are read, are not those of its entry."""
        is_turned = self.upright and header.orientation != 1
        tag = f', turned upright by its EXIF orientation {header.orientation},' if is_turned else ''
        text = (
            f'image {self.folder / entry["file_name"]}{tag} has {size[0]} x {size[1]} pixels, '
            f'but {self.annotation_file} says {entry["width"]} x {entry["height"]}'
        )
        if is_turned and header.size == (entry['width'], entry['height']):
            return DataError(
                f'{text}, its size as stored: write --opts DATA.EXIF False, remove the EXIF tag, or annotate the '
                f'upright image'
            )
        if header.upright_size == (entry['width'], entry['height']):
            return DataError(f'{text}, its size as EXIF turns it upright: write --opts DATA.EXIF True')
        return DataError(f'{text}: replace one of them')


def _ground_truth(tree: dict[str, Any], images: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A file's content for these of its images."""
    ids = {image['id'] for image in images}
    annotations = [annotation for annotation in tree['annotations'] if annotation['image_id'] in ids]
    return tree | {'images': list(images), 'annotations': annotations}


def _objects_by_image(tree: dict[str, Any]) -> tuple[dict[Any, list[dict]], int, int]:
    """Annotations to train on, by image id; and the numbers of crowd regions and of boxes without area."""
    images = {image['id']: image for image in tree['images']}
    objects: dict[Any, list[dict]] = {image_id: [] for image_id in images}
    crowds = without_area = 0
    for annotation in tree['annotations']:
        if annotation['iscrowd']:
            crowds += 1
        elif not has_area(annotation, images[annotation['image_id']]):
            without_area += 1
        else:
            objects[annotation['image_id']].append(annotation)
    return objects, crowds, without_area
