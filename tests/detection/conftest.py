import pytest

from tests.helpers.coco_data import write_coco
from tests.helpers.runs import one_thread


@pytest.fixture
def coco(tmp_path):
    """A folder of six training and four evaluation images in COCO's layout."""
    return write_coco(tmp_path / 'coco')


@pytest.fixture
def sums_in_one_order():
    """One thread, for results that must agree to the last digits."""
    with one_thread():
        yield
