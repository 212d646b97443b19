"""Two hundred malformed files of each format: accepted, or refused in one line, at once and in little memory."""

import copy
import json
import random
import resource
import time

import pytest
import yaml

from detection.data import CocoDataset
from detection.tools.convert_dataset.__main__ import convert, open_converted
from detection.tools.convert_dataset.coco import read_coco
from detection.tools.convert_dataset.voc import read_voc
from detection.tools.convert_dataset.yolo import read_yolo
from tests.helpers.coco_data import read_tree, write_coco
from tests.helpers.exports import voc_object, write_voc, write_yolo
from utils import UserError, printable

FILES, GROUPS = 200, 5

# Values that programs, people and attackers write in place of others.
ODD_VALUES = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 10**400, 1e9, 1e308, 0.5, float('nan'), float('inf')),
    *('', '1', 'x', '\0', '../../x', 'caf\u00e9', '\ud800', 'a' * 5000, 'a/' * 3000),
    *([], [[]], [[[1]]], [None], {}, {'a': 1}, {'counts': '1', 'size': [1]}),
    *([1, 2, 3], [[1, 2, 3, 4]], [[0, 0, 10**9, 0, 10**9, 10**9]], [1, 2, 10**9, 10**9], [1e308] * 4),
]


def mutate_tree(rng, tree):
    """Replace, remove or add some values anywhere in a tree."""
    for _ in range(rng.randint(1, 3)):
        node = tree
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(node[key], dict | list) and rng.random() < 0.8:
                node = node[key]
                continue
            change = rng.choice(['replace', 'remove', 'repeat'])
            if change == 'replace':
                node[key] = copy.deepcopy(rng.choice(ODD_VALUES))
            elif change == 'remove':
                del node[key]
            elif isinstance(node, list):
                node.append(copy.deepcopy(node[key]))
            break
    return tree


def mutate_bytes(rng, content):
    """Cut, flip, repeat, or nest."""
    content, place = bytearray(content), rng.randrange(max(len(content), 1))
    match rng.choice(['cut', 'flip', 'drop', 'repeat', 'nest', 'insert']):
        case 'cut':
            return bytes(content[:place])
        case 'flip':
            for _ in range(rng.randint(1, 5)):
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        case 'drop':
            del content[place : place + rng.randint(1, 20)]
        case 'repeat':
            content[place:place] = content[place : place + 50] * rng.randint(1, 50)
        case 'nest':
            content[place:place] = rng.choice([b'[', b'{"a":', b'<a>', b'- ', b'{']) * 20_000
        case 'insert':
            words = [
                b'\0',
                b'\xff',
                b'NaN',
                b'1e999',
                b'9' * 5000,
                b'-',
                b',',
                b' ',
                b'\r',
                b'"',
                b'&',
                b'\xef\xbb\xbf',
            ]
            content[place:place] = rng.choice(words)
    return bytes(content)


LAUGHS = '<!DOCTYPE a [<!ENTITY l0 "ha">' + ''.join(
    f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10)
)  # a billion of them
BOMBS = [
    f'{LAUGHS}]><annotation><filename>&l9;</filename></annotation>',
    f'<!DOCTYPE a [<!ENTITY q "{"x" * 100_000}">]><annotation><filename>{"&q;" * 10_000}</filename></annotation>',
    '<!DOCTYPE a [<!ENTITY f SYSTEM "file:///dev/zero">]><annotation><filename>&f;</filename></annotation>',
    '<!DOCTYPE a SYSTEM "http://127.0.0.1:9/x.dtd"><annotation/>',
    '<annotation>' + '<part>' * 50_000 + '</part>' * 50_000 + '</annotation>',
    f'<annotation><filename>{"x" * 10**6}</filename></annotation>',
]
ALIASES = 'a: &a [x, x, x, x, x, x, x, x, x, x]\n' + ''.join(
    f'{x}: &{x} [{", ".join([f"*{chr(ord(x) - 1)}"] * 10)}]\n' for x in 'bcdefghij'
)


def write_coco_file(rng, root):
    if rng.random() < 0.7:
        content = json.dumps(mutate_tree(rng, read_tree(root, 'train'))).encode()
    else:
        content = mutate_bytes(rng, json.dumps(read_tree(root, 'train')).encode())
    (root / 'annotations' / 'instances_x.json').write_bytes(content)
    if not (root / 'x').exists():
        (root / 'x').symlink_to(root / 'train')


def read_coco_file(root):
    dataset = CocoDataset(root, 'x', is_train=True, with_masks=True)
    for i in range(len(dataset)):
        dataset[i]


def write_yolo_file(rng, root):
    good = 'path: .\ntrain: images\nval: images\nnc: 2\nnames: {0: a, 1: b}\n'
    folder = write_yolo(root, '0 0.5 0.5 0.2 0.2\n1 0.1 0.1 0.3 0.1 0.3 0.3\n', '1 0.5 0.5 0.4 0.4\n', yaml=good)
    file = rng.choice([folder / 'data.yaml', folder / 'labels' / '0.txt'])
    if file.suffix == '.txt':
        words = file.read_text().split(' ')
        words[rng.randrange(len(words))] = rng.choice(
            ['nan', 'inf', '1e999', '-1', '0,5', '', 'x', '9' * 400, '0x1', '\0']
        )
        file.write_bytes(rng.choice([' '.join(words).encode(), mutate_bytes(rng, file.read_bytes())]))
    elif rng.random() < 0.1:
        file.write_text(ALIASES + 'train: images\nnames: *j\n')
    elif rng.random() < 0.5:
        file.write_bytes(mutate_bytes(rng, file.read_bytes()))
    else:
        tree = mutate_tree(rng, yaml.safe_load(good))
        file.write_text(json.dumps(tree))  # which is YAML too


def write_voc_file(rng, root):
    size = '<size><width>1000000000</width><height>9</height></size>'
    path = write_voc(root, 'a', voc_object() + voc_object('dog', (1, 2, 30, 40), '<difficult>0</difficult>') + size)
    write_voc(root, 'b', voc_object())
    content = path.read_bytes()
    if rng.random() < 0.15:
        content = rng.choice(BOMBS).encode()
    elif rng.random() < 0.5:
        number = rng.choice([b'nan', b'1e400', b'', b'x', b'-5', b'1,5', b'9' * 400, b'<a/>', b'\xff', b'1_0'])
        content = content.replace(rng.choice([b'>5<', b'>30<', b'>40<', b'>cat<', b'>a.jpg<']), b'>' + number + b'<')
    else:
        content = mutate_bytes(rng, content)
    path.write_bytes(content)


def convert_with(reader):
    def read(root):
        convert(reader(root), root / 'out')
        for split in ('train', 'val'):
            open_converted(root / 'out', split, root)

    return read


CASES = {
    'coco': (write_coco_file, read_coco_file),
    'coco converted': (
        write_coco_file,
        convert_with(lambda root: read_coco(root / 'annotations' / 'instances_x.json')),
    ),
    'yolo': (write_yolo_file, convert_with(read_yolo)),
    'voc': (write_voc_file, convert_with(read_voc)),
}


@pytest.mark.parametrize('group', range(GROUPS))
@pytest.mark.parametrize('name', CASES)
def test_files_are_accepted_or_refused_in_one_line(tmp_path, name, group):
    write, read = CASES[name]
    before, refused = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    for seed in range(group, FILES, GROUPS):
        rng, root = random.Random(f'{name} {seed}'), tmp_path / str(seed)
        if write is write_coco_file:
            write_coco(root, train=3, val=0)
        write(rng, root)
        start = time.monotonic()
        try:
            read(root)
        except UserError as error:
            refused += 1
            printable(error).encode()
        except Exception as error:
            raise AssertionError(f'{name}, seed {seed}: {type(error).__name__}') from error
        assert time.monotonic() - start < 10, seed
    assert refused > FILES // GROUPS // 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
