"""Images listed in CSV and Parquet files: columns, paths, classes, several labels, and what is said of mistakes."""

import re
import sys

import numpy as np
import pytest

from data import DataError
from data.formats import find_format, open_samples
from data.table import Table
from tests.helpers.processes import error_line

IMAGES = {'cat': b'0', 'dog': b'1', 'größe': b'2'}  # what is decoded is tested elsewhere


@pytest.fixture
def folder(tmp_path):
    """Files below `photos/` and, in class folders, below `train/`."""
    for name, content in IMAGES.items():
        for path in (tmp_path / 'photos' / f'{name}.jpg', tmp_path / 'train' / name / '0.jpg'):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return tmp_path


def write(path, text, encoding='utf-8'):
    path.write_bytes(text.encode(encoding, errors='surrogateescape'))
    return path


def read(folder, split='train'):
    samples = Table(folder, split)
    return [(samples.classes[target], samples.read(i)) for i, target in enumerate(samples.targets.tolist())]


PAIRS = [('a', b'1'), ('b', b'0'), ('a', b'2')]


@pytest.mark.parametrize(
    ('text', 'encoding'),
    [
        ('path,label\nphotos/dog.jpg,a\nphotos/cat.jpg,b\nphotos/größe.jpg,a\n', 'utf-8'),
        ('image;height;label\r\nphotos/dog.jpg;1;a\r\n\r\nphotos/cat.jpg;2; b \r\nphotos/größe.jpg;3;a', 'utf-8-sig'),
        ('LABEL\tfile_name\na\tphotos\\dog.jpg\nb\t./photos/cat.jpg\na\tphotos/gro\u0308ße.jpg', 'utf-8'),
        ('"path","class"\n"{folder}/photos/dog.jpg","a"\n"photos/cat.jpg","b"\n"photos/größe.jpg","a"', 'utf-8'),
    ],
    ids=['plain', 'semicolons', 'tabs, backslashes, decomposed letters', 'quotes, absolute'],
)
def test_csv_files_of_every_kind(folder, text, encoding):
    write(folder / 'train.csv', text.replace('{folder}', str(folder)), encoding)
    assert read(folder) == PAIRS


def test_parquet_files_and_splits_in_a_column(folder):
    pyarrow, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    rows = {'path': [f'photos/{name}.jpg' for name in ('dog', 'cat', 'größe', 'cat')]}
    rows |= {'label': [3, 12, 3, 12], 'split': ['train', 'train', 'Validation', 'test'], 'x': [b'', b'', b'', b'']}
    parquet.write_table(pyarrow.table(rows), folder / 'labels.parquet')
    assert read(folder) == [('3', b'1'), ('12', b'0')]  # numbers in their order
    assert read(folder, 'val') == [('3', b'2')]
    assert Table(folder, 'val').notes == [f'1 row(s) of other splits in {folder / "labels.parquet"} left out (1 test)']
    rows['label'] = [0.5, 1.0, 1.5, 2.0]
    parquet.write_table(pyarrow.table(rows), folder / 'labels.parquet')
    with pytest.raises(DataError, match='row 1 of .*labels.parquet has a float: write texts or whole numbers'):
        read(folder)


def test_without_labels_the_folders_are_the_classes(folder):
    write(folder / 'train.csv', 'path\ntrain/dog/0.jpg\ntrain/cat/0.jpg\n')
    samples = Table(folder, 'train')
    assert read(folder) == [('dog', b'1'), ('cat', b'0')]
    assert list(samples.names) == ['dog/0.jpg', 'cat/0.jpg']  # as in class folders
    write(folder / 'train.csv', 'path\ndog/0.jpg\n./cat/0.jpg\n')  # relative to the split's folder
    assert read(folder) == [('dog', b'1'), ('cat', b'0')]


def test_several_labels(folder):
    write(
        folder / 'train.csv', 'path,labels\nphotos/dog.jpg,pet|dog\nphotos/cat.jpg,\nphotos/größe.jpg,pet | word |pet\n'
    )
    samples = Table(folder, 'train')
    assert samples.is_multi_label
    assert samples.classes == ['dog', 'pet', 'word']
    assert [samples.labels(i) for i in range(3)] == [[1, 0], [], [1, 2]]
    assert samples.load(2) == (b'2', [1, 2])
    assert samples.targets.tolist() == [1, -1, 1]
    assert samples.empty_classes() == []
    write(folder / 'val.csv', 'path,labels\nphotos/dog.jpg,word\nphotos/cat.jpg,bird\n')  # without rare classes
    val = Table(folder, 'val')
    assert val.classes == Table.find_classes(folder, 'train') == Table(folder, 'train').classes
    assert [[val.classes[label] for label in val.labels(i)] for i in (0, 1)] == [['word'], ['bird']]
    (folder / 'val.csv').unlink()
    write(folder / 'train.csv', 'path,label\nphotos/dog.jpg,pet|dog\nphotos/cat.jpg,pet\n')
    samples = Table(folder, 'train')
    assert (samples.classes, samples.labels(0), samples.is_multi_label) == (['pet', 'pet|dog'], [1], False)
    write(folder / 'train.csv', 'path,labels\nphotos/dog.jpg,a|b\nphotos/cat.jpg,b')
    line = error_line('-m', 'tools.pack_dataset', folder, folder / 'new', '--format', 'table')
    assert f'{folder}/train.csv has images of several classes, and a shard has one for each' in line


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('', 'has the columns : rename that of the image files to path, and that of'),
        ('photos/dog.jpg,a\nphotos/cat.jpg,b', 'has the columns photos/dog.jpg, a: rename that'),
        ('id_code,diagnosis\n0a,1', 'has the columns id_code, diagnosis: rename that'),
        ('path,image,label\na,b,c', 'has the columns path, image, label: rename that'),
        ('path,label\n', 'train.csv has no rows of train: add some'),
        ('path,label\nphotos/dog,a', "names 'photos/dog', but the image is 'photos/dog.jpg': write all"),
        ('path,label\ndog/0,a', "names 'dog/0', but the image is 'train/dog/0.jpg': write all"),
        ('image,label\ncat.jpg,a', "names 'cat.jpg', but the image is 'photos/cat.jpg': write all"),
        ('path,label,note\nphotos/dog.jpg,a,"5 inch\nphotos/cat.jpg,b,', 'train.csv cannot be read .*unexpected end'),
        (
            'path,label\nphotos/cow.jpg,a',
            "names 'photos/cow.jpg', but .*photos/cow.jpg does not exist",
        ),
        ('path,label\nphotos/dog.jpg,', 'line 2 of .*train.csv has no label: write one, or remove the row'),
        ('path,label\n,a', 'line 2 of .*train.csv names no image: write its path'),
        (
            'path,label\nphotos/../../x.jpg,a',
            "names 'photos/../../x.jpg', outside .*: write",
        ),
        ('path,label\n/etc/passwd,a', "line 2 of .*train.csv names '/etc/passwd', outside"),
        ('path,label\nC:\\x.jpg,a', "names 'C:/x.jpg', outside"),
        ('path,label\nphotos/dog.jpg,a,b', r'line 2 of .*train.csv has 3 columns, not 2: put texts with \',\' in "'),
        (
            'path,name\nphotos/dog.jpg,a',
            "has no column label, and all its images are in the folder 'photos': add",
        ),
        ('path,name\ndog.jpg,a', 'line 2 of .* has neither a label nor a folder that names its class: add the column'),
        ('path,labels\nphotos/dog.jpg,', 'has no label in any row of train: write some in the column labels'),
    ],
)
def test_mistakes_are_one_line(folder, text, message):
    write(folder / 'train.csv', text)
    with pytest.raises(DataError) as error:
        Table(folder, 'train')
    assert re.search(message, str(error.value))
    assert str(folder) in str(error.value)
    assert '\n' not in str(error.value)


def test_mistakes_of_folders(folder, monkeypatch):
    with pytest.raises(DataError, match=r'has no table of val images: write val.csv or val.parquet with the columns'):
        Table(folder, 'val')
    path = write(folder / 'labels.csv', 'path,label\nphotos/dog.jpg,a\n')
    with pytest.raises(DataError, match='has the columns path, label: add the column split, with train or val in each'):
        Table(folder, 'train')
    path.unlink()
    write(folder / 'train.csv', 'path,label\nphotos/dog.jpg,a\n')
    write(folder / 'val.csv', 'path,label\nphotos/dog.jpg,b\n')
    with pytest.raises(DataError, match='val/ has no a, train/ has no b'):
        open_samples('table', folder, 'train')
    assert find_format(folder) == 'imagenet'
    (folder / 'train').rename(folder / 'other')
    assert find_format(folder) == 'table'
    with pytest.raises(DataError, match='has the format table: write --opts DATA.DATASET table'):
        open_samples('imagenet', folder, 'train')
    write(folder / 'train.csv', 'path,label\nphotos/dog.jpg,a\nphotos/cow.jpg,a\n')
    with pytest.raises(DataError, match='image .*photos/cow.jpg cannot be read'):
        Table(folder, 'train').read(1)
    (folder / 'train.csv').rename(folder / 'train.parquet')
    with pytest.raises(DataError, match=r'train.parquet cannot be read \(.*\): write it again'):
        Table(folder, 'train')
    monkeypatch.setitem(sys.modules, 'pyarrow.parquet', None)
    with pytest.raises(DataError, match=r'train.parquet needs the package pyarrow: pip install pyarrow, or'):
        Table(folder, 'train')


def test_a_file_that_changes_is_read_again(folder):
    write(folder / 'train.csv', 'path,label\nphotos/dog.jpg,a\n')
    assert read(folder) == [('a', b'1')]
    write(folder / 'train.csv', 'path,label\nphotos/dog.jpg,a\nphotos/cat.jpg,b\n')
    assert read(folder) == [('a', b'1'), ('b', b'0')]
    assert np.array_equal(Table(folder, 'train').share().targets, [0, 1])
