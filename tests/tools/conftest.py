import pytest

from engine.predictor import Predictor
from models import build_model
from tests.helpers.golden import fill_
from tests.helpers.runs import CPU


@pytest.fixture
def predictor(tiny_config):
    """The tiny network with filled weights, whose classes have the names of `image_tree`'s."""
    config = tiny_config()
    return Predictor(config, fill_(build_model(config)).eval(), ['class_0', 'class_1', 'class_2'], CPU)
