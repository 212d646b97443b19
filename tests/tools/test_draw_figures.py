import cv2
import numpy as np

from tests.helpers.paths import ROOT
from tests.helpers.processes import run_here


def test_figures_are_those_in_docs(tmp_path):
    done = run_here('-m', 'tools.draw_figures', '--output', tmp_path)
    assert done.returncode == 0, done.stderr
    for name, document in (('windows.svg', 'README.md'), ('block.svg', 'docs/network.md')):
        assert (tmp_path / name).read_text() == (ROOT / 'docs' / name).read_text(), f'{name} is stale: run `make docs`'
        assert name in (ROOT / document).read_text()
    drawn, kept = (cv2.imread(str(folder / 'influence.png')) for folder in (tmp_path, ROOT / 'docs'))
    assert drawn.shape == kept.shape  # pixels differ with the version of matplotlib
    assert np.abs(drawn.astype(int) - kept).mean() < 5, 'influence.png is stale: run `make docs`'
    assert (ROOT / 'docs' / 'influence.png').stat().st_size < 300_000
