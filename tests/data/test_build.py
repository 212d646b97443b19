import shutil

import pytest
import torch

from data import DataError, build_eval_loader, build_loaders


def test_loaders(tiny_config, image_tree):
    config = tiny_config(DATA__DATA_PATH=str(image_tree), DATA__BATCH_SIZE='10', DATA__NUM_WORKERS='2')
    train, val = build_loaders(config)
    assert [len(batch.image) for batch in train] == [10, 10]  # of 24: full batches only
    assert [len(batch.image) for batch in val] == [10, 2]  # of 12: every image
    assert torch.cat([batch.target for batch in val]).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    orders = []
    for epoch in (0, 1, 0):
        train.sampler.set_epoch(epoch)
        orders.append(list(train.sampler))
    assert orders[0] != orders[1]
    assert orders[0] == orders[2]


def test_missing_folders_are_named(tiny_config, tmp_path):
    with pytest.raises(DataError, match='no data: give --data-path'):
        build_loaders(tiny_config())
    with pytest.raises(DataError, match=r'nowhere/train does not exist: give --data-path'):
        build_loaders(tiny_config(DATA__DATA_PATH=str(tmp_path / 'nowhere')))
    (tmp_path / 'flat' / 'val').mkdir(parents=True)
    with pytest.raises(DataError, match='flat/val has no class folders'):
        build_eval_loader(tiny_config(DATA__DATA_PATH=str(tmp_path / 'flat')))


def test_empty_class_is_named(tiny_config, image_tree):
    for image in (image_tree / 'train' / 'class_1').iterdir():
        image.unlink()
    with pytest.raises(DataError, match=r'train/class_1 holds no images: add some or remove it'):
        build_loaders(tiny_config(DATA__DATA_PATH=str(image_tree)))


def test_wrong_number_of_classes_is_reported(tiny_config, image_tree):
    with pytest.raises(DataError, match='has 3 classes, but MODEL.NUM_CLASSES is 10.*MODEL.NUM_CLASSES 3'):
        build_loaders(tiny_config(DATA__DATA_PATH=str(image_tree), MODEL__NUM_CLASSES='10'))


@pytest.mark.parametrize('build', [build_loaders, build_eval_loader])
@pytest.mark.parametrize('num_classes', ['2', '3'])
def test_splits_with_different_classes_are_reported(tiny_config, image_tree, build, num_classes):
    config = tiny_config(DATA__DATA_PATH=str(image_tree), MODEL__NUM_CLASSES=num_classes)
    (image_tree / 'val' / 'class_2').rename(image_tree / 'val' / 'class_3')
    with pytest.raises(DataError, match='different class folders: val/ has no class_2, train/ has no class_3: add'):
        build(config)
    shutil.rmtree(image_tree / 'val' / 'class_3')
    with pytest.raises(DataError, match='different class folders: val/ has no class_2: add what is missing'):
        build(config)


def test_evaluation_needs_no_training_images(tiny_config, image_tree):
    config = tiny_config(DATA__DATA_PATH=str(image_tree))
    for folder in (image_tree / 'train').iterdir():
        shutil.rmtree(folder)
    assert len(build_eval_loader(config).dataset) == 12
    (image_tree / 'train').rmdir()
    assert len(build_eval_loader(config).dataset) == 12


def test_impossible_batch_sizes_are_reported(tiny_config, image_tree):
    with pytest.raises(DataError, match='24 training images make no full batch.*needs 60'):
        build_loaders(tiny_config(DATA__DATA_PATH=str(image_tree), DATA__BATCH_SIZE='30'), world_size=2)
    with pytest.raises(DataError, match='BATCH_SIZE is 3.*write an even --batch-size'):
        build_loaders(tiny_config(DATA__DATA_PATH=str(image_tree), DATA__BATCH_SIZE='3'))
    build_loaders(tiny_config(DATA__DATA_PATH=str(image_tree), DATA__BATCH_SIZE='3', AUG__MIXUP='0', AUG__CUTMIX='0'))
    build_eval_loader(tiny_config(DATA__DATA_PATH=str(image_tree), DATA__BATCH_SIZE='3'))
