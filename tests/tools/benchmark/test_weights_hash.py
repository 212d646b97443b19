import re
import sys

from tests.helpers.paths import TINY
from tools.benchmark import weights_hash


def test_a_row_for_each_config(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['weights_hash', str(TINY), '--rounds', '1', '--batch', '1'])
    weights_hash.main()
    header, _, row = capsys.readouterr().out.splitlines()
    assert 'ms per update of 1 images' in header
    assert re.fullmatch(rf'\| {re.escape(str(TINY))} \| 0\.\d \| [\d.]+ \| [\d.]+ \| [\d.]+ % \|', row)
