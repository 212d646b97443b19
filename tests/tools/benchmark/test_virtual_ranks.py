import re
import sys

import pytest

from engine.config_tree import ConfigError
from tests.helpers.paths import TINY
from tools.benchmark import virtual_ranks


def test_both_train_as_many_images_per_update(tmp_path, image_tree, monkeypatch, capsys):
    monkeypatch.setattr(virtual_ranks, 'ROUNDS', 1)
    command = ['virtual_ranks', '--cfg', str(TINY), '--data-path', str(image_tree), '--output', str(tmp_path)]
    monkeypatch.setattr(sys, 'argv', [*command, '--opts', 'TRAIN.VIRTUAL_RANKS', '2', 'TRACKER', 'none'])
    virtual_ranks.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith('|')]
    assert re.fullmatch(r'\| DDP \| 1 \| 8 \| \d+ \| 1.00 \(1.00 to 1.00\) \| 0.0 \|', rows[2])
    assert re.fullmatch(r'\| 2 virtual ranks \| 1 \| 8 \| \d+ \| [\d.]+ \([\d.]+ to [\d.]+\) \| 0.0 \|', rows[3])
    monkeypatch.setattr(sys, 'argv', command)
    with pytest.raises(ConfigError, match='write --opts TRAIN.VIRTUAL_RANKS 4'):
        virtual_ranks.main()
    too_many = ['--opts', 'TRAIN.VIRTUAL_RANKS', '2', 'TRAIN.ACCUMULATION_STEPS', '8']
    monkeypatch.setattr(sys, 'argv', [*command, *too_many])
    with pytest.raises(ConfigError, match='an update has 16 batches, and the data 6: give more images'):
        virtual_ranks.main()
