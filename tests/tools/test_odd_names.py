"""Names of files and classes that are not Unicode, or that the terminal's encoding lacks, in the tools for datasets."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from data.formats import open_samples
from tests.helpers.paths import ROOT
from tests.helpers.processes import environment

# Runs programs one after the other, with `--` between them, and writes their exit codes to stderr.
PROGRAMS = """
import runpy, sys
commands = [[]]
for argument in sys.argv[1:]:
    commands.append([]) if argument == '--' else commands[-1].append(argument)
for command in commands:
    sys.argv = command
    code = 0
    try:
        runpy.run_module(command[0], run_name='__main__', alter_sys=True)
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    print('exit', code, file=sys.stderr)
"""


@pytest.fixture
def pictures(tmp_path):
    """Classes named in Latin-1 and in Chinese, with files of equal names in several folders."""
    folder, rng = tmp_path / os.fsdecode(b'gr\xfc\xdfe'), np.random.default_rng(0)
    for label in (b'caf\xe9', '汽车'.encode(), b'plain'):
        for part in (b'', b'one', b'two'):
            path = folder / os.fsdecode(label) / os.fsdecode(part)
            path.mkdir(parents=True, exist_ok=True)
            for name in (b'0.png', b'0.jpg', b'\xe9.png'):
                pixels = rng.integers(0, 255, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path / os.fsdecode(name))
    (folder / 'plain' / os.fsdecode(b'x.b\xfcd')).touch()
    shutil.copy(folder / 'plain' / '0.png', folder / os.fsdecode(b'caf\xe9') / 'copy.png')
    return folder


@pytest.mark.slow
def test_tools_for_datasets_take_any_name(pictures, tmp_path):
    split, shards = tmp_path / os.fsdecode(b'split \xe9'), tmp_path / 'shards'
    commands = [
        ['tools.split_dataset', pictures, '--output', split],
        ['tools.check_dataset', split, '--workers', '1', '--json', tmp_path / 'report.json'],
        ['tools.pack_dataset', split, shards],
        ['tools.check_dataset', shards, '--workers', '1'],
    ]
    arguments = [os.fsencode(x) for command in commands for x in ('--', *command)][1:]
    done = subprocess.run(
        [sys.executable, '-c', PROGRAMS, *arguments],
        cwd=ROOT,
        env=environment(LC_ALL='C', PYTHONIOENCODING='ascii'),
        capture_output=True,
        timeout=300,
    )
    err = done.stderr.decode()
    assert 'Error' not in err, err
    assert [line for line in err.splitlines() if line.startswith('exit')] == ['exit 0', 'exit 1', 'exit 0', 'exit 1']
    assert done.stdout.isascii()
    assert b'in two classes' in done.stdout
    assert 'split \\udce9' in done.stdout.decode()
    assert len([path for path in split.rglob('*') if path.is_file()]) == 28
    assert json.loads((tmp_path / 'report.json').read_text())['images'] != {}
    samples = open_samples('shards', shards, 'train')
    assert samples.classes == ['caf\udce9', 'plain', '汽车']
    assert list(samples.names) == list(open_samples('imagenet', split, 'train').names)
