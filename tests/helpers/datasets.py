"""Datasets for tests in every format, made from a tree of class folders; good, odd and bad images."""

import io
import json
import os
import shutil
import struct
import tarfile
import zipfile
import zlib

import numpy as np
from PIL import Image

from data.formats import open_samples
from data.image_folder import ClassFolders
from tools.pack_dataset import pack_split

SPLITS = ('train', 'val')


def as_shards(tree, target, samples_per_shard=5):
    """Pack a tree into shards."""
    for split in SPLITS:
        pack_split(ClassFolders(tree, split), target / split, samples_per_shard)
    return target


def as_zip(tree, target, compression=zipfile.ZIP_STORED, slash='', comment=b'', **options):
    """Write Swin's zip layout; options are those of `ZipFile.open`."""
    target.mkdir()
    for split in SPLITS:
        samples = ClassFolders(tree, split)
        with zipfile.ZipFile(target / f'{split}.zip', 'w', compression) as archive:
            archive.comment = comment
            for i in reversed(range(len(samples))):  # the order is the map's
                with archive.open(samples.names[i], 'w', **options) as file:
                    file.write(samples.read(i))
        lines = [f'{slash}{name}\t{label}\n' for name, label in zip(samples.names, samples.targets, strict=True)]
        (target / f'{split}_map.txt').write_text(''.join(lines), encoding='utf-8')
    return target


def as_huggingface(tree, target):
    """Save a tree as a DatasetDict."""
    import datasets

    splits = {}
    for split, name in zip(SPLITS, ('train', 'validation'), strict=True):
        samples = ClassFolders(tree, split)
        rows = [{'bytes': samples.read(i), 'path': samples.names[i]} for i in range(len(samples))]
        features = datasets.Features({'image': datasets.Image(), 'label': datasets.ClassLabel(names=samples.classes)})
        splits[name] = datasets.Dataset.from_dict({'image': rows, 'label': samples.targets.tolist()}, features)
    datasets.DatasetDict(splits).save_to_disk(target)
    return target


def as_table(tree, target, header='path,label'):
    """Copy a tree, with a CSV file for each split."""
    shutil.copytree(tree, target)
    for split in SPLITS:
        names = ClassFolders(tree, split).names
        lines = [header, *(f'{split}/{name},{name.partition("/")[0]}' for name in names)]
        (target / f'{split}.csv').write_text('\n'.join(lines), encoding='utf-8')
    return target


def as_webdataset(tree, target, label='.cls', samples_per_tar=10):
    """Write a tree as tars beside each other, with labels as class indices, or as names in .json."""
    target.mkdir()
    for split in SPLITS:
        samples = ClassFolders(tree, split)
        for start in range(0, len(samples), samples_per_tar):
            with tarfile.open(target / f'digits-{split}-{start:04d}.tar', 'w') as tar:
                for i in range(start, min(start + samples_per_tar, len(samples))):
                    key, suffix = os.path.splitext(samples.names[i])
                    number = samples.targets[i]
                    text = str(number) if label == '.cls' else json.dumps({'label': samples.classes[number]})
                    for name, content in ((key + suffix, samples.read(i)), (key + label, text.encode())):
                        info = tarfile.TarInfo(name)
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
        (target / 'classnames.txt').write_text('\n'.join(samples.classes), encoding='utf-8')
    return target


WRITERS = {'imagenet': lambda tree, target: tree, 'shards': as_shards, 'zip': as_zip, 'huggingface': as_huggingface}
WRITERS |= {'table': as_table, 'webdataset': as_webdataset}


def samples_of(name, folder, split='train'):
    """Class, target and content of each sample of a split, in order."""
    samples = open_samples(name, folder, split)
    return [(samples.classes[target], target, samples.read(i)) for i, target in enumerate(samples.targets.tolist())]


def flip_byte(path, position):
    """Change one byte of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def cut(path, size):
    """Keep the first bytes of a file only."""
    path.write_bytes(path.read_bytes()[:size])


def photograph(width=160, height=120):
    """An RGB image as smooth as a photograph."""
    coarse = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, format_='PNG', **options):
    """Content of an image file."""
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


def _rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(photograph(), 'JPEG', exif=exif)


def _deep():
    grey = np.asarray(photograph().convert('L')).astype(np.uint16) * 256 + 99
    return encoded(Image.fromarray(grey))


def _deep_colour():
    """A PNG of 16 bits per channel, which Pillow reads but does not write."""
    pixels = np.asarray(photograph()).astype('>u2') * 257
    rows = b''.join(b'\0' + row.tobytes() for row in pixels)

    def chunk(kind, data):
        return struct.pack('>L', len(data)) + kind + data + struct.pack('>L', zlib.crc32(kind + data))

    header = struct.pack('>2L5B', *pixels.shape[1::-1], 16, 2, 0, 0, 0)
    chunks = chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')
    return b'\x89PNG\r\n\x1a\n' + chunks


# Odd images, which both pipelines read
ODD = {
    'plain': lambda: encoded(photograph(), 'JPEG'),
    'large': lambda: encoded(photograph(1200, 900), 'JPEG'),
    'progressive': lambda: encoded(photograph(), 'JPEG', progressive=True),
    'grey': lambda: encoded(photograph().convert('L'), 'JPEG'),
    'cmyk': lambda: encoded(photograph().convert('CMYK'), 'JPEG'),
    'rotated': _rotated,
    'deep': _deep,
    'deep_colour': _deep_colour,
    'palette': lambda: encoded(photograph().convert('P'), transparency=bytes(range(200))),
    'alpha': lambda: encoded(photograph().convert('RGBA')),
    'pixel': lambda: encoded(photograph(1, 1)),
    'pixel_jpeg': lambda: encoded(photograph(1, 1), 'JPEG'),
    'wide': lambda: encoded(photograph(20_000, 1)),
    'tall': lambda: encoded(photograph(1, 20_000), 'JPEG'),
}

# Bad images, and what is said of them
BAD = {
    'empty': (lambda: b'', 'is empty: replace or remove it'),
    'no_image': (lambda: b'no image' * 50, r'cannot be read \(no known image format\): replace or remove it'),
    'zeros': (lambda: bytes(5000), r'cannot be read \(no known image format\): replace or remove it'),
    'truncated': (lambda: ODD['plain']()[:2000], r'cannot be read \(.*truncated.*\): replace or remove it'),
    'last_bytes': (lambda: ODD['plain']()[:-40], r'cannot be read \(.*truncated.*\): replace or remove it'),
    'header_only': (lambda: ODD['plain']()[:30], r'cannot be read \(.*\): replace or remove it'),
    'truncated_png': (lambda: ODD['alpha']()[:900], r'cannot be read \(.*truncated.*\): replace or remove it'),
    'bomb': (lambda: encoded(photograph(800, 600)), r'is too large \(.*480000 pixels.*\): scale it down or remove it'),
    'bomb_jpeg': (lambda: encoded(photograph(800, 600), 'JPEG'), r'is too large \(.*\): scale it down or remove it'),
}
