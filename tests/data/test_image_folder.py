import pickle

import pytest

from data import DataError, formats
from data.image_folder import ClassFolders


def open_folder(image_tree, split='val'):
    return ClassFolders(image_tree, split)


def test_samples_are_sorted_by_class_and_name(image_tree):
    dataset = open_folder(image_tree)
    assert dataset.classes == ['class_0', 'class_1', 'class_2']
    assert dataset.targets.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert list(dataset.sample_names())[:5] == ['class_0/0', 'class_0/1', 'class_0/2', 'class_0/3', 'class_1/0']
    assert dataset.notes == []
    assert list(pickle.loads(pickle.dumps(dataset)).names) == list(dataset.names)


def test_hidden_files_and_folders_are_ignored(image_tree):
    before = list(open_folder(image_tree).names)
    for folder in ('val/.ipynb_checkpoints', 'val/class_0/.ipynb_checkpoints', 'val/class_0/sub/.cache/deep'):
        (image_tree / folder).mkdir(parents=True)
        (image_tree / folder / '0.png').touch()
    for name in ('._x.jpg', '.DS_Store'):
        (image_tree / 'val' / 'class_0' / name).touch()
    dataset = open_folder(image_tree)
    assert list(dataset.names) == before
    assert dataset.classes == ['class_0', 'class_1', 'class_2']
    assert dataset.notes == []


def test_hidden_folder_above_the_data_does_not_matter(image_tree):
    hidden = image_tree.rename(image_tree.parent / '.cache')
    assert len(open_folder(hidden)) == 12


def test_hidden_images_are_no_images_of_a_class(image_tree):
    folder = image_tree / 'val' / 'class_1'
    for path in folder.iterdir():
        path.rename(folder / f'._{path.name}')
    with pytest.raises(DataError, match='val/class_1 holds no images: add some or remove it'):
        formats.open_samples('imagenet', image_tree, 'val')


def test_linked_folders_count(image_tree):
    """A class folder, and the folder with all images of another, are links."""
    val, store = image_tree / 'val', image_tree / 'store'
    store.mkdir()
    for name in ('class_0', 'class_1'):
        (val / name).rename(store / name)
    (val / 'class_0').symlink_to(store / 'class_0')
    (val / 'class_1').mkdir()
    (val / 'class_1' / 'part').symlink_to(store / 'class_1')
    dataset = open_folder(image_tree)
    assert dataset.targets.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert list(dataset.sample_names())[4] == 'class_1/part/0'


def test_files_of_other_kinds_are_counted(image_tree):
    for name in ('class_0/a.heic', 'class_0/b.HEIC', 'class_1/c.heic', 'class_1/README'):
        (image_tree / 'val' / name).touch()
    dataset = open_folder(image_tree)
    assert len(dataset) == 12
    assert dataset.notes == [f'4 file(s) of other kinds in {image_tree / "val"} left out (3 .heic, 1 no suffix)']
