import codecs
import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from data import DataError, build_eval_loader
from data.images import find_images, load_image, read_header, report_other_files
from tests.helpers.images import damage, noise, set_orientation, write_images


def test_exif_rotation_is_optional(tmp_path):
    turned = Image.new('RGB', (4, 2), 'red')
    turned.getexif()[0x0112] = 6  # a quarter to the right
    turned.save(tmp_path / 'turned.jpg', exif=turned.getexif())
    assert load_image(tmp_path / 'turned.jpg').size == (4, 2)
    assert load_image(tmp_path / 'turned.jpg', upright=True).size == (2, 4)


@pytest.mark.parametrize('suffix', ['jpg', 'png', 'tif', 'webp'])
@pytest.mark.parametrize(
    ('orientation', 'upright'), [(None, (4, 2)), (1, (4, 2)), (3, (4, 2)), (6, (2, 4)), (9, (4, 2))]
)
def test_a_header_tells_the_size_of_the_upright_image(tmp_path, monkeypatch, suffix, orientation, upright):
    path = tmp_path / f'image.{suffix}'
    Image.new('RGB', (4, 2), 'red').save(path)
    if orientation:
        set_orientation(path, orientation)
    assert load_image(path, upright=True).size == upright
    monkeypatch.setattr(Image.Image, 'load', lambda _: pytest.fail('decoded'))
    header = read_header(path)
    assert (header.size, header.upright_size) == ((4, 2), upright)
    assert header.orientation == (orientation if orientation in (3, 6) else 1)


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
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 700)  # of which Pillow allows twice as many
    for read in (load_image, read_header):
        with pytest.raises(DataError, match=r'large.png is too large \(.*1600 pixels.*\): scale it down or remove it'):
            read(tmp_path / 'large.png')


@pytest.mark.parametrize(('damage_type', 'workers'), [('truncated', 0), ('truncated', 1), ('garbage', 0), ('empty', 0)])
def test_unreadable_image_is_named_in_one_line(tiny_config, tmp_path, damage_type, workers):
    root = write_images(tmp_path / 'tree', val=1)
    damaged = root / 'val' / 'class_1' / 'damaged.jpg'
    damage(damaged, damage_type)
    loader = build_eval_loader(tiny_config(DATA__DATA_PATH=str(root), DATA__NUM_WORKERS=workers))
    with pytest.raises(DataError) as error:
        list(loader)
    reason = 'is empty' if damage_type == 'empty' else r'cannot be read \(.*\)'
    assert re.fullmatch(f'image {damaged} {reason}: replace or remove it', str(error.value))


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
    (folder / 'circle').symlink_to(folder)
    images = find_images([folder])
    assert images == [*(folder / f'{i}.png' for i in range(4)), *(folder / 'linked' / f'{i}.png' for i in range(8))]


def test_patterns_are_expanded_where_no_such_file_exists(image_tree, monkeypatch):
    monkeypatch.chdir(image_tree)
    folder = Path('val/class_1')
    (folder / 'notes.txt').write_text('not an image')
    (folder / '[0].png').write_bytes((folder / '3.png').read_bytes())
    numbered = [folder / f'{i}.png' for i in range(4)]
    assert find_images([folder / '?.png']) == numbered
    assert find_images([folder / '[0-2].png', folder / '[0].png']) == [*numbered[:3], folder / '[0].png']
    assert find_images([Path('val/*_1')]) == find_images([Path('val/class_1/*')]) == find_images([folder])
    assert find_images([Path('val/**')]) == sorted(Path('val').rglob('*.png'))  # each once
    with pytest.raises(DataError, match=r'val/\*.jpg matches no file'):
        find_images([Path('val/*.jpg')])
    with pytest.raises(DataError, match=r'no images in val/\*/\*.txt'):
        find_images([Path('val/*/*.txt')])


@pytest.mark.parametrize('end', ['\n', '\r\n'])
def test_paths_are_read_from_standard_input(image_tree, monkeypatch, end):
    folder, odd = image_tree / 'val' / 'class_0', f'{image_tree}/ name \udcff [0].png'
    listed = [str(folder), '', '  ', f'{folder}/missing.png', odd]
    data = codecs.BOM_UTF8 + os.fsencode(end.join(listed))
    monkeypatch.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO(data)))
    images, first = [folder / f'{i}.png' for i in range(4)], image_tree / 'val' / 'class_1' / '0.png'
    assert find_images([first, Path('-')]) == [first, *images, folder / 'missing.png', Path(odd)]
    with pytest.raises(DataError, match='no images in standard input'):  # all of it has been read
        find_images([Path('-')])


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('suffix', ['png', 'jpg', 'tif'])
def test_images_are_turned_as_pillow_does(tmp_path, suffix, orientation):
    path = tmp_path / f'image.{suffix}'
    noise(40, 30).save(path)
    set_orientation(path, orientation)
    with Image.open(path) as file:
        assert np.array_equal(load_image(path, upright=True), ImageOps.exif_transpose(file))


def test_damaged_exif_turns_nothing(tmp_path):
    path = tmp_path / 'image.jpg'
    noise(40, 30).save(path)
    plain = load_image(path)
    set_orientation(path, 6)
    data = bytearray(path.read_bytes())
    start = data.index(b'Exif')
    data[start + 6 : start + 14] = bytes(8)  # the header of EXIF's own file
    path.write_bytes(data)
    assert load_image(path, upright=True).size == plain.size
    assert read_header(path).orientation == 1


def test_files_of_other_kinds_are_counted(image_tree, capsys):
    report_other_files([image_tree, image_tree / 'val' / 'class_0' / '0.png'])
    assert capsys.readouterr().err == ''
    for name in ('notes.txt', 'class_0/movie.mp4', 'class_1/raw.CR2', 'class_1/.hidden'):
        (image_tree / 'val' / name).write_text('not an image')
    report_other_files([image_tree])
    assert capsys.readouterr().err == '3 file(s) of other kinds left out (1 .cr2, 1 .mp4, 1 .txt)\n'
