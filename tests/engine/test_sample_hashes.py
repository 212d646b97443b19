import hashlib

from PIL import Image

from data.image_folder import ClassFolders
from engine.experiment import describe_samples


def describe(root):
    return describe_samples(ClassFolders(root.parent, root.name).sample_names())


def test_description_of_names():
    description = describe_samples(iter(['a/1', 'b/\udcff']))
    assert description == {'images': 2, 'sha256': hashlib.sha256(b'a/1\0b/\xff\0').hexdigest()}
    others = [['b/\udcff', 'a/1'], ['a/1'], ['a/1b/', '\udcff'], []]
    hashes = {describe_samples(names)['sha256'] for names in others} | {description['sha256']}
    assert len(hashes) == 5


def test_description_depends_on_the_samples_but_not_on_their_place_and_format(image_tree):
    before = describe(image_tree / 'val')
    assert before['images'] == 12
    moved = (image_tree / 'val').rename(image_tree / 'elsewhere')
    for path in moved.rglob('*.png'):
        Image.open(path).save(path.with_suffix('.jpg'))
        path.unlink()
    assert describe(moved) == before
    (moved / 'class_0' / '3.jpg').rename(moved / 'class_1' / '4.jpg')
    after = describe(moved)
    assert after['images'] == 12
    assert after['sha256'] != before['sha256']
