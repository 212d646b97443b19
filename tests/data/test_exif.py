"""`DATA.EXIF`: images as stored, or turned upright, in both pipelines."""

import pytest
import torch
from PIL import ExifTags, Image

from data.build import EvalTransform, build_sample_transform, open_dataset
from data.decoding import EncodedImage
from data.images import ImageHeader
from data.seeding import seeded
from tests.helpers.datasets import encoded, photograph
from tests.helpers.images import set_orientation

PIPELINES = pytest.mark.parametrize('pipeline', ['fast', 'published'])

# What a camera held in some way stores: undone by the viewer, as Pillow's `exif_transpose` does
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def rotated(image, orientation, format_):
    """An image file that looks like `image` where its orientation is obeyed."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = image if STORED[orientation] is None else image.transpose(STORED[orientation])
    return encoded(stored, format_, exif=exif, **({'quality': 95, 'subsampling': 0} if format_ == 'JPEG' else {}))


@PIPELINES
@pytest.mark.parametrize('orientation', STORED)
def test_turned_images_look_as_the_upright_one(tiny_config, pipeline, orientation):
    """To the bit without loss; as JPEG within its loss, at an eighth of the size too."""
    config = tiny_config(DATA__PIPELINE=pipeline, DATA__EXIF='True')
    upright = photograph(163, 120)
    for is_train in (False, True):
        transform = build_sample_transform(config, is_train)
        views = []
        for data in (encoded(upright), rotated(upright, orientation, 'PNG')):
            with seeded(1):
                views.append(transform(data, 'image')[0])
        assert torch.equal(*views)
    transform, large = EvalTransform(config), photograph(1203, 900)
    expected, turned = (transform(data, 'x').float() for data in (encoded(large), rotated(large, orientation, 'JPEG')))
    assert (expected - turned).abs().mean() < (2 if pipeline == 'fast' else 0.02)


@PIPELINES
@pytest.mark.parametrize('format_', ['JPEG', 'PNG'])
def test_images_are_read_as_stored_by_default(tiny_config, pipeline, format_):
    image = photograph()
    transform = EvalTransform(tiny_config(DATA__PIPELINE=pipeline))
    plain, tagged = (transform(rotated(image, 1, format_), 'x'), rotated(image, 6, format_))
    stored = encoded(image.transpose(STORED[6]), format_, quality=95, subsampling=0)
    assert torch.equal(transform(tagged, 'x'), transform(stored, 'x'))
    assert not torch.equal(transform(tagged, 'x'), plain)


@pytest.mark.parametrize('mode', ['RGB', 'L'])
def test_large_photographs_are_turned_after_they_are_decoded_small(monkeypatch, tiny_config, mode):
    shapes, decode = [], EncodedImage._decode
    monkeypatch.setattr(EncodedImage, '_decode', lambda *args: shapes.append((x := decode(*args)).shape) or x)
    config = tiny_config(DATA__EXIF='True', MODEL__MSG__IN_CHANS='3' if mode == 'RGB' else '1')
    EvalTransform(config)(rotated(photograph(1200, 800), 8, 'JPEG'), 'x')
    assert [shape[:2] for shape in shapes] == [(100, 150)]  # (height, width) of the upright image, an eighth


def test_only_jpegs_with_metadata_have_their_header_parsed(monkeypatch):
    monkeypatch.setattr('data.decoding.read_header', lambda *_: pytest.fail('parses it'))
    assert EncodedImage(encoded(photograph(), 'JPEG'), 'x', 'RGB', upright=True).size == (160, 120)


@pytest.mark.parametrize(('exif', 'effect'), [('True', 'turned upright'), ('False', 'read as stored')])
def test_the_log_tells_of_rotated_images(tiny_config, image_tree, exif, effect):
    config = tiny_config(DATA__DATA_PATH=str(image_tree), DATA__EXIF=exif)
    assert open_dataset(config, 'train').notes == []
    for number in range(3):
        set_orientation(image_tree / 'train' / 'class_1' / f'{number}.png', 3)
    (image_tree / 'train' / 'class_1' / '7.png').write_bytes(b'')  # for ON_ERROR to deal with
    (note,) = open_dataset(config, 'train').notes
    assert note.startswith(f'3 of 24 sampled images are rotated by their EXIF tag and {effect}')
    assert ('DATA.EXIF True turns them upright' in note) == (exif == 'False')


def test_few_headers_of_many_images_are_read(tiny_config, tmp_path, monkeypatch):
    for split in ('train', 'val'):
        for label in range(3):
            folder = tmp_path / 'tree' / split / str(label)
            folder.mkdir(parents=True)
            for number in range(90 if split == 'train' else 1):
                (folder / f'{number}.png').touch()
    read = []
    monkeypatch.setattr('data.build.read_header', lambda name, data: read.append(name) or ImageHeader((1, 1), 1))
    open_dataset(tiny_config(DATA__DATA_PATH=str(tmp_path / 'tree')), 'train')
    assert len(read) == 90  # of 270, each third one
