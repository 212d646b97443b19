"""Training and evaluation under `torch.compile`: minutes of compilation, so slow."""

import pytest
import torch

import main as program
from tests.helpers.paths import TINY
from tests.helpers.processes import TORCHRUN, start
from tests.helpers.runs import records, weights

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def reset():
    torch.compiler.reset()


def losses(config):
    return [(record['train_loss'], record['val_loss']) for record in records(config, 'epoch')]


def test_compiled_run_equals_eager_run(tiny_config, image_tree):
    data = {'DATA__DATA_PATH': str(image_tree), 'TRAIN__OPTIMIZER__NAME': 'sgd'}  # AdamW amplifies rounding
    plain = tiny_config(**data, TAG='plain')
    both = tiny_config(**data, TAG='compiled', TRAIN__COMPILE='True', TEST__COMPILE='True')
    program.main(plain)
    program.main(both)
    torch.testing.assert_close(losses(both), losses(plain), rtol=1e-4, atol=1e-4)
    assert weights(plain).keys() == weights(both).keys()  # without the prefix of a wrapper
    program.main(tiny_config(THROUGHPUT_MODE='True', TEST__COMPILE='True'))


def test_compiled_run_with_accumulation_on_two_processes(tiny_config, image_tree, tmp_path):
    options = ['DATA.DATA_PATH', str(image_tree), 'OUTPUT', str(tmp_path / 'output'), 'TRAIN.OPTIMIZER.NAME', 'sgd']
    options += ['TRAIN.ACCUMULATION_STEPS', '2', 'DATA.BATCH_SIZE', '2']
    launch = [*TORCHRUN, '2', 'main.py', '--cfg', TINY]
    for tag, compiles in (('plain', 'False'), ('compiled', 'True')):
        done = start(*launch, '--tag', tag, '--opts', *options, 'TRAIN.COMPILE', compiles)
        assert done.returncode == 0, done.stderr
    plain, compiled = (tiny_config(TAG=tag) for tag in ('plain', 'compiled'))
    torch.testing.assert_close(losses(compiled), losses(plain), rtol=1e-4, atol=1e-4)
