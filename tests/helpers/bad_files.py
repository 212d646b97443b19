"""Many bad files, made of a good one by seeded random damage, and limits on the time and memory of reading them."""

import contextlib
import copy
import json
import random
import resource
import signal
import traceback
from itertools import chain, islice
from pathlib import Path

from utils import UserError

GIGABYTE = 2**30

COUNT = 200

# What an entry of a file may hold in place of what it should.
VALUES = [
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**30, 0.5, -1e-300, 1e308, float('nan'), float('inf')),
    *('', 'x', '7', '../../x', '/dev/zero', 'a\0b', '\x1b[2J', '\ud800', '汽车', 'x' * 10_000, '=1+1'),
    *([], [None], [[]], [0, 'x'], list(range(1000)), {}, {'x': None}, {'': []}),
]


def as_json(tree):
    return json.dumps(tree).encode()


def as_lines(records):
    """JSON Lines; a bad tree need not be a list."""
    return b'\n'.join(map(as_json, records if isinstance(records, list) else [records]))


def bad_files(tree, encode, values=VALUES, count=COUNT):
    """Contents of bad files of a format: half of them well-formed with wrong entries, half of them damaged.

    Args:
        tree: of the good file.
        encode: gives the content (bytes) of a tree.
        values: what wrong entries hold.
        count: number of files.
    """
    trees = map(encode, islice(bad_trees(tree, 0, values), count // 2))
    return chain(trees, damaged_files(encode(tree), count - count // 2))


def damaged_files(content, count=COUNT):
    """Damaged copies of a good file's content (bytes)."""
    return islice(bad_contents(content, 0), count)


def bad_trees(tree, seed, values=VALUES):
    """Endless copies of a tree of lists and mappings, in each of which one to three entries are wrong or missing.

    Args:
        tree: of the good file.
        seed: of the changes.
        values: what wrong entries hold.
    """
    rng = random.Random(seed)
    while True:
        bad = [copy.deepcopy(tree)]
        for _ in range(rng.randint(1, 3)):
            parent, key = _entry(bad, rng)
            if parent is not bad and rng.random() < 0.2:
                del parent[key]
            elif parent is not bad and isinstance(parent, list) and rng.random() < 0.1:
                parent.insert(key, copy.deepcopy(parent[key]))
            else:
                parent[key] = copy.deepcopy(rng.choice(values))
        yield bad[0]


def _entry(node, rng):
    """A random entry at or below the only one of `node`, as the list or mapping that holds it and its key in there."""
    while True:
        key = rng.choice(list(range(len(node)) if isinstance(node, list) else node))
        child = node[key]
        if not (isinstance(child, list | dict) and child and rng.random() < 0.8):
            return node, key
        node = child


def bad_contents(content, seed):
    """Endless damaged copies of a file's content (bytes): cut short, with other bytes or in other encodings."""
    rng = random.Random(seed)
    while True:
        bad, start = bytearray(content), rng.randrange(len(content))
        length = rng.choice([1, 2, 4, 8, 100])
        match rng.randrange(9):
            case 0:
                del bad[start:]
            case 1:
                del bad[start : start + length]
            case 2:
                bad[start : start + length] = rng.randbytes(length)
            case 3:
                bad[start : start + length] = rng.choice([b'\xff', b'\0', b'9', b'-', b'\n', b'"', b'[']) * length
            case 4:
                bad[start:start] = bad[rng.randrange(len(content)) :][:1000]
            case 5:
                bad = bytearray(content.decode('latin-1').encode(rng.choice(['utf-16', 'utf-32', 'utf-8-sig'])))
            case 6:
                bad = bytearray(rng.randbytes(rng.randrange(2000)))
            case 7:
                bad[start] ^= 1 << rng.randrange(8)
            case 8:
                bad[start:start] = content[start : start + rng.randint(1, 8)] * 4_000
        yield bytes(bad)


def assert_bad_files_are_told(read, contents, path):
    """Read bad files: each is accepted, or refused in one line, within ten seconds and a gigabyte.

    Args:
        read: reads the file at `path`.
        contents: of the files, in bytes.
        path: where each is written in turn.

    Returns:
        The number of files that are refused.
    """
    refused = 0
    for number, content in enumerate(contents):
        path.write_bytes(content)
        try:
            with _limits(seconds=10, memory=GIGABYTE):
                read()
        except UserError as error:
            if len(str(error).splitlines()) != 1:
                raise AssertionError(f'file {number} is refused in several lines, or none: {error}') from error
            refused += 1
        except Exception as error:
            kept = path.with_name(f'{path.name}.{number}.failed')
            kept.write_bytes(content)
            lines = traceback.format_exception(error)[-4:]
            raise AssertionError(
                f'file {number} ({kept}): {type(error).__name__}: {error}\n{"".join(lines)}'
            ) from error
    return refused


@contextlib.contextmanager
def _limits(seconds, memory):
    """Context in which this process may take so much time, and so much more memory than it has."""

    def stop(number, frame):
        raise TimeoutError(f'more than {seconds} s')

    before, (soft, hard) = signal.signal(signal.SIGALRM, stop), resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path('/proc/self/statm').read_text().split()[0])
    signal.alarm(seconds)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
