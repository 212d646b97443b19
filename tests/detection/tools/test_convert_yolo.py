"""YOLO's text files: kinds of lines, names of classes, layouts."""

import codecs
import shutil

import pytest

from data import DataError
from detection.tools.convert_dataset.formats import detect_format
from detection.tools.convert_dataset.yolo import read_yolo
from tests.helpers.exports import write_image, write_yolo

BOX = '0 0.5 0.5 0.2 0.4'
POSES = {2: f'{BOX} 0.45 0.4 0.55 0.4 0.45 0.6 0.55 0.6', 3: f'{BOX} 0.45 0.4 2 0.55 0.4 2 0.45 0.6 1 0 0 0'}


def objects_of(source, split='train'):
    return [x for item in source.splits[split] for x in item.objects]


@pytest.mark.parametrize('step', [2, 3])
def test_keypoints_are_left_out_and_boxes_kept(tmp_path, step):
    yaml = f'train: images\nval: images\nkpt_shape: [4, {step}]\nnames: [x]\n'
    source = read_yolo(write_yolo(tmp_path, f'{POSES[step]}\n{BOX}\n', yaml=yaml))
    for found in objects_of(source):
        assert found == {'category': 'x', 'bbox': pytest.approx([80, 30, 40, 40])}
    assert 'keypoints of 2 objects are left out, and their boxes kept' in source.notes
    with pytest.raises(DataError, match='write a class and a box, or corners, between 0 and 1; keypoints need a kpt_'):
        read_yolo(write_yolo(tmp_path / 'other', f'{BOX} 0.5 0.5', yaml=yaml))


@pytest.mark.parametrize('step', [2, 3])
def test_lines_that_may_be_keypoints_are_not_taken_for_polygons_unless_they_are_said_to_be(tmp_path, step):
    folder = write_yolo(tmp_path, POSES[step], POSES[step])
    count = 4 + 4 * step
    with pytest.raises(
        DataError, match=rf'all lines have {count} numbers .* add kpt_shape: .*\[4, {step}\].*--polygons'
    ):
        read_yolo(folder)
    (found, _) = objects_of(read_yolo(folder, polygons=True))
    assert len(found['segmentation'][0]) == count


def test_polygons_and_oriented_boxes_have_masks(tmp_path):
    corners = '0 0.1 0.1 0.3 0.1 0.3 0.4 0.1 0.4'
    source = read_yolo(write_yolo(tmp_path / 'quads', corners, corners))
    assert objects_of(source)[0]['bbox'] == pytest.approx([20, 10, 40, 30])
    assert any('all 4 polygons have four corners, as oriented boxes have' in note for note in source.notes)
    source = read_yolo(write_yolo(tmp_path / 'mixed', corners, '0 0.1 0.1 0.3 0.1 0.3 0.4', BOX))
    assert ['segmentation' in x for x in objects_of(source)] == [True, True, False]
    assert not any('oriented' in note for note in source.notes)


NAMES = ['yes', 'no', 'on', 'off', 'null', '~', '2024-01-01', '010', '1_000', '1e3', '.nan', 'True', '0x10', '12:30:00']


@pytest.mark.parametrize('form', ['list', 'mapping', 'file'])
def test_names_of_classes_are_texts_as_written(tmp_path, form):
    text = {
        'list': f'[{", ".join(NAMES)}]',
        'mapping': ''.join(f'\n  {i}: {name}' for i, name in enumerate(NAMES)),
        'file': 'words.names',
    }[form]
    folder = write_yolo(tmp_path, BOX, yaml=f'train: images\nval: images\nnc: {len(NAMES)}\nnames: {text}\n')
    (folder / 'words.names').write_text('\n'.join(NAMES))
    assert read_yolo(folder).categories == NAMES


@pytest.mark.parametrize('path', ['C:\\data', '/content/data', 'a' * 300])
def test_a_path_of_another_computer_is_told(tmp_path, path):
    folder = write_yolo(tmp_path, BOX, yaml=f'path: {path}\ntrain: images\nval: images\nnc:\nnames: [x]\n')
    (note,) = (note for note in read_yolo(folder).notes if 'data.yaml' in note)
    assert note.endswith(f'data.yaml, does not exist: folders are those in {folder}')


@pytest.mark.parametrize(
    'encode', [lambda x: codecs.BOM_UTF8 + x.encode(), lambda x: x.encode('utf-16'), lambda x: x.encode()]
)
def test_byte_order_marks_and_line_ends_of_windows_are_read(tmp_path, encode):
    folder = write_yolo(tmp_path, BOX)
    (folder / 'labels' / '0.txt').write_bytes(encode(f'{BOX}\r\n{BOX}\r\n'))
    (folder / 'data.yaml').write_bytes(encode('train: images\r\nval: .\\images\r\ntest:\r\nnames:\r\n- café\r\n'))
    source = read_yolo(folder)
    assert source.categories == ['café']
    assert len(objects_of(source)) == 2


def test_labels_are_counted_and_must_be_there(tmp_path):
    folder = write_yolo(tmp_path, BOX, BOX, '')
    write_image(folder / 'images' / '3.jpg')
    (folder / 'labels' / 'other.txt').write_text(BOX)
    (folder / 'labels' / 'classes.txt').write_text('x')
    notes = read_yolo(folder).notes
    assert 'train: 3 of 4 images have a label file; the others count as images without objects' in notes
    assert 'train and val share 4 images' in notes
    assert any(note.startswith('1 text files next to the labels belong to no image: ') for note in notes)
    shutil.move(folder / 'labels', folder / 'annotations')
    with pytest.raises(DataError, match=r'4 images of train, and none has a label file, such as .*labels/0.txt: put'):
        read_yolo(folder)


def test_images_to_test_with_need_no_labels(tmp_path):
    folder = write_yolo(tmp_path, BOX, yaml='train: images\nval: images\ntest: other\nnames: [x]\n')
    write_image(folder / 'other' / '1.jpg')
    source = read_yolo(folder)
    assert list(source.splits) == ['train', 'val']
    assert 'test: 1 images without any label file are left out' in source.notes


@pytest.mark.parametrize('place', ['classes.txt', 'labels/classes.txt', 'obj.names'])
def test_folders_without_data_yaml_have_a_list_of_classes(tmp_path, place):
    folder = write_yolo(tmp_path, BOX, '1 0.5 0.5 0.1 0.1')
    (folder / 'data.yaml').unlink()
    (folder / 'notes.json').write_text('{}')  # Label Studio's
    (folder / place).write_text('cat\nno\n')
    assert detect_format(folder) == 'yolo'
    source = read_yolo(folder)
    assert source.categories == ['cat', 'no']
    assert [len(items) for items in source.splits.values()] == [2]


def test_lists_of_darknet_are_read(tmp_path):
    """As CVAT exports them: paths begin with data/, which is the folder itself; labels are beside the images."""
    for name in ('a', 'b'):
        write_image(tmp_path / 'obj_train_data' / f'{name}.jpg').with_suffix('.txt').write_text(BOX)
    (tmp_path / 'obj.data').write_text(
        'classes = 1\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n'
    )
    (tmp_path / 'obj.names').write_text('cat\n')
    (tmp_path / 'train.txt').write_text('data/obj_train_data/a.jpg\ndata\\obj_train_data\\b.jpg\n')
    assert detect_format(tmp_path) == 'yolo'
    source = read_yolo(tmp_path)
    assert source.categories == ['cat']
    assert [item.name for item in source.splits['train']] == ['a.jpg', 'b.jpg']
    assert len(objects_of(source)) == 2
    (tmp_path / 'train.txt').write_text('\ndata/none.jpg\n')
    with pytest.raises(DataError, match='image data/none.jpg of .*train.txt, line 2, does not exist: add it'):
        read_yolo(tmp_path)


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        ('0 0,5 0,5 0,2 0,4', 'write a class and numbers, with points as decimal marks and spaces between them'),
        ('0 0.5 0.5 nan 0.4', 'between 0 and 1'),
        ('0 0.5 0.5 -0.2 0.4', 'a box has a negative size'),
        ('nan 0.5 0.5 0.2 0.4', 'it has class nan, which names does not have'),
        (f'{BOX} 0.9', 'a confidence after the box is of predictions, not of labels$'),
        (f'{BOX} 0.9 0.9 0.9', 'keypoints need a kpt_shape in data.yaml'),
    ],
)
def test_other_lines_are_refused(tmp_path, line, message):
    with pytest.raises(DataError, match=f'labels/0.txt, line 1 is .*{message}'):
        read_yolo(write_yolo(tmp_path, line))


@pytest.mark.parametrize(
    ('yaml', 'message'),
    [
        ('names: [x]\nnc: 2\ntrain: images', 'has 1 names, but another number of classes as nc'),
        ('names: [x, ""]\ntrain: images', 'has a class without a name'),
        ('names: [[x]]\ntrain: images', 'has no names of the classes'),
        ('names: [x]\ntrain: {a: images}', 'train is not a folder or a list of folders'),
        ('names: [x]\ntrain: images\nkpt_shape: 17', 'kpt_shape is not a number of keypoints with 2 or 3'),
        ('names: [x]\ntrain: labels', 'labels, for the images of train, has none'),
        ('names: [x]\ntrain: ~', 'has no train'),
        ('names: [x]\ntrain: /', 'train is /, which is a whole disk: write the folder of the images'),
        (f'names: [x]\npath: {"a/" * 3000}\ntrain: no', 'train is no, which does not exist'),
        ('names: ' + '[' * 600, 'is nested too deeply'),
    ],
)
def test_other_descriptions_are_refused(tmp_path, yaml, message):
    with pytest.raises(DataError, match=f'{message}'):
        read_yolo(write_yolo(tmp_path, BOX, yaml=yaml))
