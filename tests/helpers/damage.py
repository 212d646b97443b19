"""Damaged files of metrics, from a fixed seed."""

import json
import random

_VALUES = [
    None,
    True,
    -1,
    0,
    1,
    2.5,
    10**400,
    1e308,
    float('nan'),
    float('inf'),
    '',
    'x',
    '\ud800',
    [],
    {},
    [[1]],
    'train',
]
_NAMES = ['kind', 'epoch', 'step', 'updates', 'loss', 'lr', 'acc1', 'val_loss', 'images_per_s', 'other']


def damaged_metrics(count=200):
    """Contents of files: whole records among records of wrong types, half lines and bytes that are no text."""
    rng = random.Random(0)
    yield from (b'', b'\n', b'[]', b'null\n', b'\xff\xfe\n', b'[' * 9_000 + b'\n', b'9' * 9_000, b'\0' * 99)
    for _ in range(count):
        lines = []
        for updates in range(rng.randint(1, 6)):
            kind = rng.choice(['train', 'epoch'])
            record = {'kind': kind, 'epoch': updates // 2, 'step': 0, 'updates': updates, 'loss': 1.0, 'acc1': 50.0}
            for _ in range(rng.choice([0, 0, 1, 3])):
                record[rng.choice(_NAMES)] = rng.choice(_VALUES)
            for name in rng.sample(list(record), rng.choice([0, 0, 0, 1])):
                del record[name]
            line = bytearray(json.dumps(record).encode())
            if rng.random() < 0.2:
                line[rng.randrange(len(line))] = rng.randrange(256)
            lines.append(bytes(line[: rng.randrange(len(line))] if rng.random() < 0.1 else line))
        yield b'\n'.join(lines) + rng.choice([b'', b'\n'])
