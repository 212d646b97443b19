"""docs/command_line.md has the help of every program, as it is now."""

import os
import sys

import pytest

from tests.helpers.paths import ROOT
from tools import list_commands
from tools.benchmark.__main__ import COMMANDS

PROGRAMS = {program for programs in list_commands.PROGRAMS.values() for program in programs}


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason='other versions of Python lay --help out differently')
def test_document_is_current():
    written = (ROOT / 'docs' / 'command_line.md').read_text()
    assert written == list_commands.document(), 'stale: python -m tools.list_commands > docs/command_line.md'


def test_every_program_is_listed():
    internal = {'tools.export.nncf_process'}  # tools.export starts it
    paths = [ROOT / 'main.py', *ROOT.glob('tools/**/*.py'), *ROOT.glob('detection/**/*.py')]
    found = {
        '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__main__')
        for path in paths
        if "\nif __name__ == '__main__':\n" in path.read_text()
    }
    listed = {program.partition(' ')[0].removesuffix('.py') for program in PROGRAMS}
    assert listed == found - internal
    assert {program for program in PROGRAMS if ' ' in program} == {f'tools.benchmark {name}' for name in COMMANDS}


def test_reading_a_help_leaves_no_traces(monkeypatch):
    monkeypatch.delenv('COLUMNS', raising=False)
    argv = list(sys.argv)
    assert list_commands.help_of('tools.plot').startswith('usage: python -m tools.plot [-h] --run DIR')
    assert sys.argv == argv
    assert 'COLUMNS' not in os.environ


def test_summary_is_the_first_sentence():
    text = 'usage: x [-h]\n         FILE\n\nDraw a | b, or\n<c>. More of it.\n\noptions:\n'
    assert list_commands.summary(text) == 'Draw a \\| b, or &lt;c>.'
