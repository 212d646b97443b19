import json

import pytest
import torch

from models.pyramid import Size
from tests.helpers.paths import TINY, TINY_DETECTOR
from tests.helpers.processes import error_line, run_here
from tests.helpers.runs import CPU
from tools.benchmark.cases import Setting
from tools.benchmark.detectors import OBJECTS, DetectorCase, build_network

PROGRAM = ['-m', 'tools.benchmark', 'detectors']
SMALL = ['--height', '64', '--width', '96', '--rounds', '2', '--device', 'cpu']
SIZE = Size(64, 96)


def test_time_and_memory_of_each_mode_are_reported(tmp_path):
    done = run_here(*PROGRAM, TINY_DETECTOR, *SMALL, '--output', tmp_path / 'detectors')
    assert done.returncode == 0, done.stderr
    inference, train = json.loads((tmp_path / 'detectors.json').read_text())['results']
    assert [x['setting']['mode'] for x in (inference, train)] == ['inference', 'train']
    assert 0 < inference['memory'] < train['memory']
    assert '| tiny_detector | inference, fp32, eager, batch 1, 64 x 96 px | ' in done.stdout
    assert '| case | setting | ms (quartiles) | images/s | memory, MB |' in done.stdout
    assert 'revision' in done.stdout


def test_an_evaluation_has_all_its_detections():
    network = build_network(str(TINY_DETECTOR), SIZE, ['MODEL.BOX.DETECTIONS', '7'])
    (detections,) = DetectorCase(network, Setting(batch=1, size=SIZE), CPU)()
    assert detections['masks'].shape == (7, 1, 64, 96)


def test_a_train_step_updates_every_part_of_the_detector():
    case = DetectorCase(build_network(str(TINY_DETECTOR), SIZE), Setting('train', batch=2, size=SIZE), CPU)
    before = {name: parameter.detach().clone() for name, parameter in case.network.named_parameters()}
    losses = []
    case.network.register_forward_hook(lambda module, inputs, output: losses.append(sum(output.values()).detach()))
    assert torch.equal(case(), losses[0])
    same = [name for name, parameter in case.network.named_parameters() if torch.equal(parameter, before[name])]
    assert not [name for name in same if name.endswith('weight')]
    assert all(parameter.grad is None for parameter in case.network.parameters())
    boxes = case.targets[0]['boxes']
    assert boxes.shape == (OBJECTS, 4)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= torch.tensor([96, 64])).all()


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('torchvision:resnet50', "no detector 'torchvision:resnet50': give a config file"),
        ('torchvision:ssdlite320_mobilenet_v3_large', 'not of the family of Faster R-CNN'),
        ('nothing.yaml', 'config file nothing.yaml: No such file'),
        (TINY, 'tiny.yaml'),
    ],
)
def test_networks_that_are_no_detectors_are_refused_in_one_line(name, message, tmp_path):
    assert message in error_line(*PROGRAM, name, *SMALL, '--output', tmp_path / 'none').splitlines()[-1]
