import pytest

from tests.helpers.coco_data import write_coco


@pytest.fixture
def coco(tmp_path):
    """A folder of six training and four evaluation images in COCO's layout."""
    return write_coco(tmp_path / 'coco')
