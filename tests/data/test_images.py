import numpy as np
import pytest
from PIL import Image

from data import DataError, build_eval_loader
from data.images import find_images, load_image
from tests.helpers.images import damage, write_images


def test_exif_rotation_is_optional(tmp_path):
    turned = Image.new('RGB', (4, 2), 'red')
    turned.getexif()[0x0112] = 6  # a quarter to the right
    turned.save(tmp_path / 'turned.jpg', exif=turned.getexif())
    assert load_image(tmp_path / 'turned.jpg').size == (4, 2)
    assert load_image(tmp_path / 'turned.jpg', upright=True).size == (2, 4)


def test_16_bit_images_keep_their_upper_8_bits(tmp_path):
    Image.fromarray(np.array([[0, 256, 40000, 65535]], dtype=np.uint16)).save(tmp_path / 'deep.png')
    assert np.asarray(load_image(tmp_path / 'deep.png', 'L')).tolist() == [[0, 1, 156, 255]]


@pytest.mark.parametrize(('damage_type', 'workers'), [('truncated', 0), ('truncated', 1), ('garbage', 0), ('empty', 0)])
def test_unreadable_image_is_named_in_one_line(tiny_config, tmp_path, damage_type, workers):
    root = write_images(tmp_path / 'tree', val=1)
    damaged = root / 'val' / 'class_1' / 'damaged.jpg'
    damage(damaged, damage_type)
    loader = build_eval_loader(tiny_config(DATA__DATA_PATH=str(root), DATA__NUM_WORKERS=workers))
    with pytest.raises(DataError) as error:
        list(loader)
    assert str(error.value).startswith(f'image {damaged} cannot be read (')
    assert str(error.value).endswith('): replace or remove it')
    assert '\n' not in str(error.value)


def test_find_images(image_tree, tmp_path):
    single = image_tree / 'train' / 'class_0' / '0.png'
    (image_tree / 'val' / 'notes.txt').write_text('not an image')
    images = find_images([image_tree / 'val', single])
    assert images[:-1] == sorted((image_tree / 'val').rglob('*.png'))
    assert images[-1] == single
    with pytest.raises(DataError, match='nowhere does not exist: give image files or folders'):
        find_images([tmp_path / 'nowhere'])
    (tmp_path / 'empty').mkdir()
    with pytest.raises(DataError, match='no images in .*empty'):
        find_images([tmp_path / 'empty'])
