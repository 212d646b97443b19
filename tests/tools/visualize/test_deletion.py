import numpy as np
import pytest
import torch

from config import TREE
from engine.predictor import Predictor
from models import build_model
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.golden import fill_
from tests.helpers.images import damage, noise, write_images
from tests.helpers.processes import error_line, run_here
from tests.helpers.runs import CPU
from tools.visualize.deletion import RANDOM, deletion_score, empty_image, importance_maps, mean_interval, table

NAMES = ['class_0', 'class_1', 'class_2']


class Brightness(torch.nn.Module):
    """A classifier whose first logit is the weighted sum of the image's patches of 2 x 2 pixels."""

    def __init__(self, weights):
        super().__init__()
        self.weights = weights
        self.patch_embed = torch.nn.Module()
        self.patch_embed.patch_size = 2

    def forward(self, images):
        """Logits (B, 2)."""
        logit = (torch.nn.functional.avg_pool2d(images, 2)[:, 0] * self.weights).sum(dim=(1, 2))
        return torch.stack((logit, torch.zeros_like(logit)), dim=1)


def score(importance, weights, steps, ties=None):
    """Deletion score of the first class on a white image."""
    predictor = Predictor(TREE.defaults(), Brightness(weights), ['a', 'b'], CPU)
    image = torch.ones(1, 1, 2 * weights.shape[0], 2 * weights.shape[1])
    ties = torch.arange(weights.numel()) if ties is None else ties
    return deletion_score(predictor, image, torch.zeros_like(image), importance, 0, steps, ties)


def test_the_score_is_the_area_under_the_probability():
    weights = torch.tensor([[4.0, 0.0, 2.0], [1.0, 0.0, 0.0]])
    sums = {'right': [7, 3, 1, 0, 0, 0, 0], 'wrong': [7, 7, 7, 7, 6, 4, 0]}  # after each removed patch
    for name, importance in (('right', weights), ('wrong', -weights)):
        probability = torch.tensor(sums[name]).float().sigmoid()
        assert score(importance, weights, 6) == pytest.approx(((probability[1:] + probability[:-1]) / 2).mean().item())
    halves = torch.tensor([7.0, 0.0, 0.0]).sigmoid()  # three patches at a time
    assert score(weights, weights, 2) == pytest.approx((halves[0] / 2 + halves[1] + halves[2] / 2).item() / 2)
    assert score(weights, weights, 6) < score(-weights, weights, 6)


def test_patches_of_the_same_importance_are_removed_in_the_order_of_ties():
    weights = torch.tensor([[1.0, 2.0, 3.0]])
    constant, ties = torch.zeros(1, 3), torch.tensor([2, 0, 1])
    assert score(constant, weights, 3, ties) == score(torch.tensor([[2.0, 1.0, 3.0]]), weights, 3)


@pytest.mark.parametrize('size', [(28, 28), (27, 31)])
def test_maps_lie_on_the_patches_of_the_first_stage(tiny_config, size):
    config = tiny_config()
    predictor = Predictor(config, fill_(build_model(config)).eval(), NAMES, CPU)
    image = torch.randn(1, 3, *size)
    class_index, maps = importance_maps(predictor, image, torch.Generator().manual_seed(0))
    assert class_index == predictor.model(image).argmax()
    methods = ('attention rollout', 'Grad-CAM')
    assert list(maps) == [*(f'{method}, stage {i}' for method in methods for i in (1, 2)), RANDOM]
    grid = tuple(-(-side // 2) for side in size)
    for name, importance in maps.items():
        assert importance.shape == grid
        for removal in ('mean', 'blur'):
            empty = empty_image(image, removal)
            ties = torch.randperm(importance.numel())
            assert 0 < deletion_score(predictor, image, empty, importance, class_index, 3, ties) < 1, name
    assert not empty_image(image, 'mean').any()
    assert empty_image(image, 'blur').std() < 0.3 * image.std()


def test_differences_are_paired_by_image():
    random = np.linspace(0.1, 0.9, 50)
    scores = {'attention rollout, stage 1': random - 0.1, 'Grad-CAM, stage 1': random - 0.05, RANDOM: random}
    rollout, cam, last = table(scores)[2:]
    assert rollout.endswith('| -0.100 [-0.100, -0.100] | -0.050 [-0.050, -0.050] |')
    assert cam.endswith('| -0.050 [-0.050, -0.050] |  |')
    assert last.startswith('| random | 0.500 [0.4')
    mean, low, high = mean_interval(random)
    error = random.std() / 50**0.5
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.01)


def test_the_program_prints_a_table_and_reports_a_damaged_image(tiny_config, tmp_path):
    checkpoint = write_checkpoint(tmp_path / 'w.pth', tiny_config(), NAMES)
    images = write_images(tmp_path / 'images') / 'val'
    damage(images / 'bad.jpg', 'truncated')
    done = run_here('-m', 'tools.visualize.deletion', images, '--resume', checkpoint, '--steps', '2')
    assert done.returncode == 3, done.stderr
    assert 'bad.jpg cannot be read' in done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == '12 images, patches replaced by: mean; mean [95 % interval], lower is better'
    assert lines[1:3] == ['', '| order of removal | deletion score | minus random | minus Grad-CAM of the stage |']
    assert len(lines) == 9


def test_mistakes(tiny_config, tmp_path):
    noise(60, 40).save(tmp_path / 'a.png')
    checkpoint = write_checkpoint(tmp_path / 'w.pth', tiny_config(MODEL__NUM_CLASSES='0'), [])
    line = error_line('-m', 'tools.visualize.deletion', tmp_path / 'a.png', '--resume', checkpoint)
    assert line == 'error: one image has no interval: give two or more'
    noise(60, 40).save(tmp_path / 'b.png')
    done = run_here('-m', 'tools.visualize.deletion', tmp_path, '--resume', checkpoint)
    message = 'error: the deletion score needs the probability of a class, and the network has no classes'
    assert done.stderr.splitlines()[-1] == message
    assert done.returncode == 1
