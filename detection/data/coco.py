"""A dataset of images and objects in COCO's format, with errors that name the file or entry at fault."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from data import DataError
from data.images import ImageHeader, choose_images, existing_path, load_image, read_header
from data.sharing import Shareable
from detection.data.annotation_cache import Log, open_annotations
from detection.data.annotation_table import AnnotationTable, ImageTable
from detection.data.annotations import clipped_boxes, decode_masks, select_categories
from detection.data.copy_paste import paste_objects
from detection.data.transforms import Target
from utils import first_few

# Images whose headers are read when a dataset is opened.
SAMPLED_HEADERS = 100


class SplitFiles(NamedTuple):
    """Paths of a split: its annotation file and its folder of images."""

    annotations: Path
    images: Path


class Selection(NamedTuple):
    """Which categories and images of a split are used.

    Attributes:
        classes: names of the categories; empty for all.
        limit: number of images, chosen at random but always the same; 0 for all.
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
    (n,). Crowd regions, and boxes whose width or height within the image is less than a pixel, are left out.

    Args:
        root: folder of the data.
        split: such as train2017.
        transform: takes and returns an image and its target; None for none.
        is_train: leave out images without objects, which training cannot use.
        with_masks: read masks too.
        files: paths of the split, if they are not the default ones.
        selection: which categories and images are used.
        copy_paste: probability that objects of another image of the dataset are pasted on a sample, after the transform
            of both; needs masks.
        upright: turn images as their EXIF orientation says, so that annotations are of the upright images; otherwise,
            they are of the images as stored.
        log: gets lines about reading a large file.

    Attributes:
        annotation_file: the file of the objects.
        categories: its entries; label i + 1 is `categories[i]`.
        images: a table of the images in the dataset.
        notes: for the log: what was left out of training or is absent, loose boxes, EXIF orientations.
        is_labelled: whether the file has annotations at all.
        num_objects: number of objects in the dataset, without crowd regions.

    Raises:
        DataError: the data cannot be used.
    """

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
        copy_paste: float = 0.0,
        log: Log = lambda text: None,
    ):
        files = files or SplitFiles(root / 'annotations' / f'instances_{split}.json', root / split)
        self.annotation_file, self.folder = files
        self.transform, self.with_masks, self.upright = transform, with_masks, upright
        self._is_train, self.copy_paste = is_train, copy_paste
        tree = open_annotations(self.annotation_file, with_masks, needs_objects=is_train, log=log)
        self.is_labelled, self._info = tree['is_labelled'], tree['info']
        self.categories = select_categories(tree['categories'], selection.classes, self.annotation_file)
        self._labels = {category['id']: label for label, category in enumerate(self.categories, start=1)}
        self._select(tree['images'], tree['annotations'], selection, tree['notes'])
        self._check_files()
        self._check_headers()

    def _select(
        self, images: ImageTable, annotations: AnnotationTable, selection: Selection, notes: Sequence[str]
    ) -> None:
        """Select images and annotations of a file.

        Args:
            images: images of the file.
            annotations: annotations of the file.
            selection: which images are used; categories have been chosen already.
            notes: notes on the file.
        """
        if selection.classes:
            is_chosen = np.isin(annotations.columns['category_id'], list(self._labels))
            annotations = annotations.take(np.flatnonzero(is_chosen))
        columns = annotations.columns
        is_crowd, of_image = columns['iscrowd'], columns['image']
        is_object = columns['has_area'] & ~is_crowd
        objects_per_image = np.bincount(of_image[is_object], minlength=len(images))
        keeps_empty = selection.empty_images or not self._is_train
        usable = np.arange(len(images)) if keeps_empty else np.flatnonzero(objects_per_image)
        chosen = np.asarray(choose_images(usable, selection.limit or None), dtype=np.int64)
        position = np.full(len(images), -1)  # in the dataset, of each image of the file
        position[chosen] = np.arange(len(chosen))
        is_chosen = position[of_image] >= 0
        self.num_objects = int((is_chosen & is_object).sum())
        if not len(chosen) or (self._is_train and not self.num_objects):
            raise DataError(f'{self.annotation_file}: none of its images has an object to train on')
        self.images = images.take(chosen)
        kept = np.flatnonzero(is_chosen & is_object if self._is_train else is_chosen)
        self._annotations = annotations.take(kept)
        rows = np.flatnonzero(is_object[kept])
        self._rows = rows[np.argsort(position[of_image[kept[rows]]], kind='stable')]
        self._row_ends = objects_per_image[chosen].cumsum()
        counts = {
            'images without objects': len(images) - len(usable),
            'crowd regions': is_crowd.sum(),
            'boxes without area': (~is_crowd & ~columns['has_area']).sum(),
        }
        self.notes = [f'{count} {what} left out' for what, count in counts.items() if count and self._is_train]
        self.notes += [*self._notes_on_absence(), *notes]
        if len(chosen) < len(usable):
            self.notes.append(f'{len(chosen)} of {len(usable)} images, a random but fixed choice')

    def _notes_on_absence(self) -> list[str]:
        """Notes on images and categories without objects, which are allowed, but are often a mistake."""
        if not self._is_train:
            return [] if self.num_objects or not self.is_labelled else ['no objects: AP and AR are undefined']
        empty = int((np.diff(self._row_ends, prepend=0) == 0).sum())
        notes = [f'{empty} images without objects are trained on as background'] if empty else []
        used = set(np.unique(self._annotations.columns['category_id']).tolist())
        unused = [category['name'] for category in self.categories if category['id'] not in used]
        if unused:
            names = first_few(unused, 5)
            notes.append(f'{len(unused)} of {len(self.categories)} categories have no object to train on: {names}')
        return notes

    @property
    def ground_truth(self) -> dict[str, Any] | None:
        """The file's content for these images and categories, for pycocotools; None in training."""
        if self._is_train:
            return None
        tables = {'images': self.images, 'annotations': self._annotations}
        return {'info': self._info, 'categories': self.categories} | tables

    def _rows_of(self, index: int) -> list[int]:
        """Where the objects of an image are in the table of annotations."""
        start = self._row_ends[index - 1] if index else 0
        return self._rows[start : self._row_ends[index]].tolist()

    def objects(self, index: int) -> list[dict[str, Any]]:
        """Annotations of an image, without crowd regions and boxes without area."""
        return [self._annotations[row] for row in self._rows_of(index)]

    def labels_of_images(self) -> np.ndarray:
        """(objects, 2): the index of each object's image, in order, and its label."""
        ids = self._annotations.columns['category_id'][self._rows]
        images = np.repeat(np.arange(len(self)), np.diff(self._row_ends, prepend=0))
        return np.column_stack((images, [self._labels[number] for number in ids.tolist()]))

    @property
    def classes(self) -> list[str]:
        """Names of the labels, from label 1."""
        return [category['name'] for category in self.categories]

    def sample_names(self) -> Iterator[str]:
        """A name per image for the record of a run: its file without the suffix, and its objects."""
        shapes = self._annotations.shapes
        content = memoryview(shapes.content)
        for first in range(0, len(self), 1000):  # several times as fast as one by one
            row_ends = self._row_ends[first : first + 1000]
            start = int(self._row_ends[first - 1]) if first else 0
            rows = self._rows[start : row_ends[-1]]
            texts = [
                content[x:y] for x, y in zip(shapes.starts[rows].tolist(), shapes.ends[rows].tolist(), strict=True)
            ]
            low = 0
            for index, high in enumerate((row_ends - start).tolist(), start=first):
                name = _without_suffix(self.images.names[index])
                yield f'{name} [{b", ".join(texts[low:high]).decode()}]'
                low = high

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        image, target = self._read(index)
        if self.copy_paste and torch.rand(()) < self.copy_paste:
            other = int(torch.randint(len(self), ()))
            image, target = paste_objects(image, target, *self._read(other))
        return image, target

    def _read(self, index: int) -> tuple[Tensor, Target]:
        """An image and its objects, transformed."""
        index = range(len(self))[index]
        entry, objects = self.images[index], self.objects(index)
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
        names: dict[str, set[str]] = {}
        paths = []
        for name in self.images.names:  # strings: Path takes seconds for the images of COCO
            is_plain = name.isascii() and '/' not in name and name.strip('.')
            paths.append(os.path.join(self.folder, name) if is_plain else str(existing_path(self.folder, name)))
        for folder in {os.path.dirname(path) for path in paths}:
            if not os.path.isdir(folder):
                raise DataError(f'folder {folder}, with images of {self.annotation_file}, does not exist: add it')
            names[folder] = set(os.listdir(folder))
        missing = [path for path in paths if os.path.basename(path) not in names[os.path.dirname(path)]]
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


def _without_suffix(name: str) -> str:
    """A file's name as its path is written, without the suffix; `Path` takes ten times as long for plain names."""
    dot = name.rfind('.')
    is_plain = 0 < dot < len(name) - 1 and '/' not in name and name.isascii()
    return name[:dot] if is_plain else str(Path(name).with_suffix(''))
