import numpy as np
import pytest
from PIL import Image

from data import DataError, build_eval_loader
from data.images import find_images, load_image
from tests.helpers.images import damage, noise, write_images


def test_exif_rotation_is_optional(tmp_path):
    turned = Image.new('RGB', (4, 2), 'red')
    turned.getexif()[0x0112] = 6  # a quarter to the right
    turned.save(tmp_path / 'turned.jpg', exif=turned.getexif())
    assert load_image(tmp_path / 'turned.jpg').size == (4, 2)
    assert load_image(tmp_path / 'turned.jpg', upright=True).size == (2, 4)


def test_16_bit_images_keep_their_upper_8_bits(tmp_path):
    Image.fromarray(np.array([[0, 256, 40000, 65535]], dtype=np.uint16)).save(tmp_path / 'deep.png')
    assert np.asarray(load_image(tmp_path / 'deep.png', 'L')).tolist() == [[0, 1, 156, 255]]


@pytest.mark.parametrize(
    ('dtype', 'values', 'expected'),
    [
        (np.float32, [0, 0.25, 0.5, 1], [0, 64, 128, 255]),
        (np.float32, [0, 0.25, np.nan, 1], [0, 64, 0, 255]),
        (np.float32, [-5, 0.5, 128, 300], [0, 0, 128, 255]),
        (np.int32, [0, 1, 128, 255], [0, 1, 128, 255]),
        (np.int32, [-1, 256, 40000, 65535], [0, 1, 156, 255]),
        (np.int32, [0, 256, 40000, 2**24], [0, 1, 156, 255]),
    ],
)
@pytest.mark.parametrize('mode', ['L', 'RGB'])
def test_32_bit_images_are_not_clipped(tmp_path, dtype, values, expected, mode):
    Image.fromarray(np.array([values], dtype=dtype)).save(tmp_path / 'deep.tif')
    image = load_image(tmp_path / 'deep.tif', mode)
    assert image.mode == mode
    assert np.asarray(image.convert('L')).tolist() == [expected]


def test_image_that_is_too_large_is_named_in_one_line(tmp_path, monkeypatch):
    noise(40, 40).save(tmp_path / 'large.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 700)
    with pytest.raises(DataError, match=r'large.png is too large \(.*1600 pixels.*\): scale it down or remove it'):
        load_image(tmp_path / 'large.png')


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


def test_find_images_ignores_hidden_ones_and_follows_links(image_tree, tmp_path):
    hidden = tmp_path / '.hidden'  # what lies above the folder does not matter
    image_tree.rename(hidden)
    folder, elsewhere = hidden / 'val' / 'class_0', hidden / 'train' / 'class_1'
    (folder / '.ipynb_checkpoints').mkdir()
    for name in ('._0.png', '.ipynb_checkpoints/0.png'):
        (folder / name).touch()
    (folder / 'linked').symlink_to(elsewhere)
    images = find_images([folder])
    assert images == [*(folder / f'{i}.png' for i in range(4)), *(folder / 'linked' / f'{i}.png' for i in range(8))]
