"""Pascal VOC's XML files: encodings, names of images, lists of splits, objects."""

import pytest

from data import DataError
from detection.tools.convert_dataset.formats import detect_format
from detection.tools.convert_dataset.voc import read_voc
from tests.helpers.exports import voc_object, write_image, write_voc


def objects_of(source, split='train'):
    return [x for item in source.splits[split] for x in item.objects]


@pytest.mark.parametrize(
    ('declared', 'encoding', 'name'),
    [
        ('gb2312', 'gb2312', '汽车'),
        ('GBK', 'gb18030', '汽车镕'),
        ('Shift-JIS', 'cp932', '自転車①'),
        ('Big5', 'big5', '汽車'),
        ('euc-kr', 'euc-kr', '자동차'),
        ('windows-1251', 'cp1251', 'кот'),
        ('utf-16', 'utf-16', 'café'),
        ('utf-16', 'utf-8', 'café'),  # as .NET writes texts
        ('utf-8', 'utf-8-sig', 'café'),
        (None, 'utf-8', 'café'),
    ],
)
def test_encodings_are_those_declared(tmp_path, declared, encoding, name):
    path = write_voc(tmp_path, 'a', voc_object(name))
    declaration = f'<?xml version="1.0" encoding="{declared}"?>\n' if declared else ''
    path.write_bytes((declaration + path.read_text()).encode(encoding))
    assert read_voc(tmp_path).categories == [name]


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('<?xml version="1.0" encoding="klingon"?><annotation/>', 'is not text in KLINGON: save it as UTF-8'),
        ('<?xml version="1.0" encoding="hex"?><annotation/>', 'is not text in HEX'),
        ('<?xml version="1.0"?><annotation>caf\xe9</annotation>', 'is not text in UTF-8'),
        ('<annotations><image/></annotations>', "is not in Pascal VOC's format: its root is annotations"),
        ('<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><annotation>&b;</annotation>', 'has a DOCTYPE'),
        ('<!DOCTYPE a [<!ENTITY b "x"><!ENTITY c "&b;&b;">]><annotation>&c;</annotation>', 'has a DOCTYPE'),
    ],
)
def test_other_contents_are_refused(tmp_path, content, message):
    write_voc(tmp_path, 'a').write_bytes(content.encode('latin-1'))
    with pytest.raises(DataError, match=message):
        read_voc(tmp_path)


@pytest.mark.parametrize(
    ('given', 'image', 'note'),
    [
        ('a', 'a.JPEG', 'have another suffix than <filename>'),
        ('a.jpg', 'a.png', 'have another suffix than <filename>'),
        ('C:\\me\\images\\a.jpg', 'a.jpg', None),
        ('/home/me/a.jpg', 'a.jpg', None),
        ('img.v1', 'img.v1.jpg', 'have another suffix than <filename>'),
        ('', 'a.jpg', None),
        ('before_renaming.jpg', 'a.jpg', 'are found by the name of the XML file, not by <filename>'),
    ],
)
def test_images_are_found_and_unusual_names_told(tmp_path, given, image, note):
    write_voc(tmp_path, 'a', image=image).write_text(f'<annotation><filename>{given}</filename></annotation>')
    source = read_voc(tmp_path)
    assert [item.name for item in source.splits['train']] == [image]
    assert source.notes == ([f'1 images {note}, such as {tmp_path}/Annotations/a.xml'] if note else [])


def test_an_image_belongs_to_one_file(tmp_path):
    write_voc(tmp_path, 'a')
    write_voc(tmp_path, 'b').write_text('<annotation><filename>a.jpg</filename></annotation>')
    with pytest.raises(DataError, match='b.xml and .*a.xml are both of image .*a.jpg: remove one of them'):
        read_voc(tmp_path)
    (tmp_path / 'Annotations' / 'b.xml').write_text('<annotation><filename>b</filename></annotation>')
    write_image(tmp_path / 'JPEGImages' / 'b.png')
    with pytest.raises(DataError, match='image b may be .*b.jpg or .*b.png: remove one of them'):
        read_voc(tmp_path)


def write_lists(root, **lists):
    folder = root / 'ImageSets' / 'Main'
    folder.mkdir(parents=True)
    for name, text in lists.items():
        (folder / f'{name}.txt').write_text(text)
    for stem in 'abcdef':
        write_voc(root, stem)


@pytest.mark.parametrize(
    ('lists', 'expected', 'note'),
    [
        ({'train': 'a\nb\n', 'val': 'c\n'}, {'train': 'ab', 'val': 'c'}, 'train.txt, val.txt; 3 XML files'),
        ({'trainval': 'a b\nc\nd', 'test': 'e\nf'}, {'train': 'acd', 'test': 'ef'}, 'trainval.txt, test.txt; 1 XML'),
        ({'trainval': 'a\nb\nc', 'val': 'c'}, {'train': 'ab', 'val': 'c'}, 'trainval.txt, val.txt; 3 XML files'),
        ({'train': 'a', 'trainval': 'a\nb', 'val': 'b'}, {'train': 'a', 'val': 'b'}, 'train.txt, val.txt; 4 XML files'),
        ({'default': 'a\r\nb.jpg\r\n'}, {'train': 'ab'}, 'default.txt; 4 XML files that they do not name are left out'),
        ({'val': 'a'}, {'val': 'a'}, 'val.txt; 5 XML files that they do not name are left out'),
        ({'train': 'a  1\nb -1\n', 'val': 'c 1'}, {'train': 'ab', 'val': 'c'}, 'train.txt, val.txt'),
        ({'cat_train': 'a 1\nb -1'}, {'train': 'abcdef'}, None),
    ],
)
def test_lists_are_those_told(tmp_path, lists, expected, note):
    write_lists(tmp_path, **lists)
    source = read_voc(tmp_path)
    stems = {split: ''.join(item.path.stem for item in items) for split, items in source.splits.items()}
    assert stems == expected
    assert bool(source.notes) == (note is not None)
    assert note is None or f'splits are those of ImageSets/Main: {note}' in source.notes[0]


def test_empty_lists_and_unknown_names_are_told(tmp_path):
    write_lists(tmp_path, train='a\n', val='')
    assert 'ImageSets/Main/val.txt names no images' in read_voc(tmp_path).notes
    (tmp_path / 'ImageSets' / 'Main' / 'val.txt').write_text('z 1\n')
    with pytest.raises(DataError, match='val.txt names z 1, which has no XML file in .*Annotations: add it'):
        read_voc(tmp_path)


def test_objects_may_have_floats_parts_and_flags(tmp_path):
    part = '<part><name>head</name><bndbox><xmin>8</xmin><ymin>8</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></part>'
    flags = '<truncated>1</truncated><difficult> 1 </difficult>'
    text = (
        voc_object('cat', (5.5, '6.0e0', 40.25, 30), part)
        + voc_object('dog', more=flags)
        + voc_object(box=(0, 1, 9, 9))
    )
    write_voc(tmp_path, 'a', text + '<size><width>100</width><height>200</height></size>')
    source = read_voc(tmp_path)
    cat, dog, other = objects_of(source)
    assert cat == {'category': 'cat', 'bbox': [4.5, 5, 35.75, 25]}
    assert dog['iscrowd'] == 1
    assert other['bbox'] == [-1, 0, 10, 9]
    assert [note.partition(', such as')[0] for note in source.notes] == [
        '1 XML files state another size than their images have',
        '1 objects have parts, which are left out',
        '1 difficult objects become crowd regions, which are ignored',
        '1 objects begin before pixel 1, from which boxes are counted',
    ]


@pytest.mark.parametrize(
    'text', [voc_object(' '), voc_object(box=(1, 2, 'nan', 4)), voc_object(box=('1,5', 2, 3, 4)), '<object/>']
)
def test_objects_without_name_or_box_are_refused(tmp_path, text):
    write_voc(tmp_path, 'a', text)
    with pytest.raises(DataError, match='a.xml has an object without name, or bndbox of four numbers'):
        read_voc(tmp_path)


def test_corners_in_the_wrong_order_are_refused(tmp_path):
    write_voc(tmp_path, 'a', voc_object(box=(40, 6, 5, 30)))
    with pytest.raises(
        DataError, match='a.xml has an object cat with xmin 40, xmax 5, ymin 6, ymax 30: write the smal'
    ):
        read_voc(tmp_path)


@pytest.mark.parametrize('layout', ['annotations and images', 'flat', 'split folders'])
def test_other_layouts_are_found(tmp_path, layout):
    for stem in ('a', 'b'):
        xml, image = {
            'annotations and images': (f'annotations/{stem}.xml', f'images/{stem}.png'),
            'flat': (f'{stem}.xml', f'{stem}.png'),
            'split folders': (f'train/{stem}.xml', f'train/{stem}.png'),
        }[layout]
        write_image(tmp_path / image)
        (tmp_path / xml).parent.mkdir(exist_ok=True)
        (tmp_path / xml).write_text(f'<annotation><filename>{stem}.png</filename>{voc_object()}</annotation>')
    assert detect_format(tmp_path) == 'voc'
    assert [item.name for item in read_voc(tmp_path).splits['train']] == ['a.png', 'b.png']
