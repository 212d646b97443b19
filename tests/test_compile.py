"""The network, and its training, as `torch.compile` runs them: minutes of compilation, so slow."""

import copy

import pytest
import torch
import torch.nn.functional as F

import main as program
from checkpoint import load_checkpoint
from tests.conftest import TINY
from tests.helpers.golden import GOLDEN, V2, assert_close, fill_, golden_network, images, labels, micro
from tests.test_command_line import start
from tests.test_training import folder_of, records
from timing import Setting, Task

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def forgotten():
    """Networks of a class count together, and PyTorch refuses to compile a ninth."""
    torch._dynamo.reset()


@pytest.mark.parametrize(('version', 'size'), GOLDEN)
@torch.inference_mode()
def test_recorded_outputs(version, size):
    record = GOLDEN[version, size]
    model = torch.compile(golden_network(version, size).eval(), fullgraph=True)
    logits = model(images(2, record['size']))
    assert_close(logits[:, :10], record['logits'])
    assert_close([logits.mean(), logits.std()], [record['logits_mean'], record['logits_std']])


@pytest.mark.parametrize(('version', 'size'), [key for key, record in GOLDEN.items() if 'loss' in record])
def test_recorded_loss_and_gradient_norms(version, size):
    record = GOLDEN[version, size]
    model = golden_network(version, size).train()
    graph = torch.compile(model, fullgraph=True)
    loss = F.cross_entropy(graph(images(2, record['size'])), labels(2, model.num_classes))
    loss.backward()
    assert_close(loss.item(), record['loss'])
    for name, p in model.named_parameters():
        assert p.grad.norm().item() == pytest.approx(record['grad_norm'][name], rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize('types', [{}, V2], ids=['v1', 'v2'])
def test_training_forward_and_backward(types):
    plain = fill_(micro(**types)).train()
    compiled = copy.deepcopy(plain)
    graph = torch.compile(compiled, fullgraph=True)
    for model in (plain, graph):
        F.cross_entropy(model(images(2, 56)), labels(2, 10)).backward()
    for (name, one), two in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_frozen_weights_give_the_same():
    task = Task(fill_(micro()), Setting(compile='frozen', batch=2, size=56), torch.device('cpu'))
    task.warm_up()
    with torch.inference_mode():
        torch.testing.assert_close(task(), task.network(task.images), rtol=1e-4, atol=1e-4)


def losses(config):
    return [(record['train_loss'], record['val_loss']) for record in records(config, 'epoch')]


def test_compiled_training_and_evaluation_are_those_of_eager_ones(tiny_config, image_tree):
    data = {'DATA__DATA_PATH': str(image_tree), 'TRAIN__OPTIMIZER__NAME': 'sgd'}  # AdamW makes steps of rounding noise
    plain = tiny_config(**data, TAG='plain')
    both = tiny_config(**data, TAG='compiled', TRAIN__COMPILE='True', TEST__COMPILE='True')
    program.main(plain)
    program.main(both)
    torch.testing.assert_close(losses(both), losses(plain), rtol=1e-4, atol=1e-4)
    one, two = (load_checkpoint(folder_of(config) / 'ckpt_epoch_1.pth')['model'] for config in (plain, both))
    assert one.keys() == two.keys()  # without the prefix of a wrapper
    program.main(tiny_config(THROUGHPUT_MODE='True', TEST__COMPILE='True'))


def test_compiled_training_on_two_processes_accumulates_unsynchronised(tiny_config, image_tree, tmp_path):
    options = ['DATA.DATA_PATH', str(image_tree), 'OUTPUT', str(tmp_path / 'output'), 'TRAIN.OPTIMIZER.NAME', 'sgd']
    options += ['TRAIN.ACCUMULATION_STEPS', '2', 'DATA.BATCH_SIZE', '2']
    launch = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', 'main.py', '--cfg', TINY]
    for tag, compiles in (('plain', 'False'), ('compiled', 'True')):
        done = start(*launch, '--tag', tag, '--opts', *options, 'TRAIN.COMPILE', compiles)
        assert done.returncode == 0, done.stderr
    plain, compiled = (tiny_config(TAG=tag) for tag in ('plain', 'compiled'))
    torch.testing.assert_close(losses(compiled), losses(plain), rtol=1e-4, atol=1e-4)
