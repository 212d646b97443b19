import cv2
import numpy as np
import pytest
import torch

from models.exchange import EXCHANGES
from tests.helpers.paths import ROOT
from tests.helpers.processes import run_here
from tools.draw_figures import token_shares


def test_shares_of_tokens_are_those_that_the_module_mixes():
    """New token 1 of the first region: window b, beside a and above f; e is below a."""
    a, b, e, f = (slice(4 * token, 4 * token + 4) for token in (0, 1, 4, 5))
    shares = {name: token_shares(exchange)[b] for name, exchange in EXCHANGES.items()}  # (4, 32)
    for name, share in shares.items():
        assert share.sum(dim=1).tolist() == pytest.approx([1] * 4)
        others = share.clone()
        for token in (a, b, e, f):
            others[:, token] = 0
        assert (others.sum() > 0) == (name == 'global')
    assert torch.equal(shares['none'][:, b], torch.eye(4))
    assert [share.argmax().item() for share in shares['shuf']] == [1, 5, 17, 21]  # chunk 1 of each token
    assert [share.argmax().item() for share in shares['shift']] == [20, 21, 2, 3]  # of f, below and above, and of a
    assert torch.equal(shares['mean'][3, [3, 7, 19, 23]], torch.full((4,), 0.25))


def test_figures_are_those_in_docs(tmp_path):
    done = run_here('-m', 'tools.draw_figures', '--output', tmp_path)
    assert done.returncode == 0, done.stderr
    pictures = {'windows.svg': 'README.md', 'block.svg': 'docs/network.md', 'exchange.svg': 'docs/exchange.md'}
    for name, document in pictures.items():
        assert (tmp_path / name).read_text() == (ROOT / 'docs' / name).read_text(), f'{name} is stale: run `make docs`'
        assert name in (ROOT / document).read_text()
    drawn, kept = (cv2.imread(str(folder / 'influence.png')) for folder in (tmp_path, ROOT / 'docs'))
    assert drawn.shape == kept.shape  # pixels differ with the version of matplotlib
    assert np.abs(drawn.astype(int) - kept).mean() < 5, 'influence.png is stale: run `make docs`'
    assert (ROOT / 'docs' / 'influence.png').stat().st_size < 300_000
