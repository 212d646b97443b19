import cv2
import pytest
from sklearn.datasets import load_digits

from tools.make_digits import make_digits


def test_digits_are_real_with_a_fixed_stratified_split(tmp_path):
    assert make_digits(tmp_path / 'one') == {'train': 1437, 'val': 360}
    make_digits(tmp_path / 'two')
    files = sorted(path.relative_to(tmp_path / 'one') for path in (tmp_path / 'one').rglob('*.png'))
    assert len(files) == 1797
    assert len({path.name for path in files}) == 1797  # none in both splits
    for path in files[::100]:
        assert (tmp_path / 'one' / path).read_bytes() == (tmp_path / 'two' / path).read_bytes()
        original = load_digits().images[int(path.stem)]
        assert load_digits().target[int(path.stem)] == int(path.parent.name)
        image = cv2.imread(str(tmp_path / 'one' / path), cv2.IMREAD_GRAYSCALE)
        assert image.shape == (56, 56)
        centres = image[3::7, 3::7].astype(float)  # of the 8 x 8 original pixels
        assert abs(centres - original * 255 / 16).mean() < 10
    for digit in range(10):
        val = len([path for path in files if path.parts[:2] == ('val', str(digit))])
        total = (load_digits().target == digit).sum()
        assert val == pytest.approx(0.2 * total, abs=1)
