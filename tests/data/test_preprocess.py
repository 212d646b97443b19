import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from data import DataError, Preprocess, Sample
from data.device_copies import DeviceCopies
from data.transforms import mean_and_std
from tests.helpers.runs import CPU, as_samples

SIZE = 28


def batch_of(rectangles, images=None):
    """A batch of the fast pipeline with these rectangles, (B, boxes, 5)."""
    erasing = torch.tensor(rectangles)
    images = torch.zeros(len(erasing), SIZE, SIZE, 3, dtype=torch.uint8) if images is None else images
    return Sample(images, torch.zeros(len(erasing), dtype=torch.long), erasing, torch.full((len(erasing),), -1))


def test_images_are_normalised_as_torchvision_does(tiny_config):
    config = tiny_config()
    pixels = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)
    published = transforms.Compose([transforms.ToTensor(), transforms.Normalize(*mean_and_std(config))])
    expected = torch.stack([published(Image.fromarray(image)) for image in pixels])
    images, _ = Preprocess(config, CPU)(batch_of([[[0] * 5]] * 2, torch.from_numpy(pixels)))
    assert torch.equal(images, expected)
    assert images.is_contiguous()


def test_published_images_pass_through(tiny_config):
    images = torch.randn(3, 3, SIZE, SIZE)
    batch = torch.utils.data.default_collate(as_samples(images, torch.arange(3)))
    result, targets = Preprocess(tiny_config(), CPU)(batch)
    assert torch.equal(result, images)
    assert targets.tolist() == [0, 1, 2]


def test_rectangles_that_nothing_would_erase_are_refused(tiny_config):
    """A user's transform that normalises its images, as the published pipeline does, and leaves erasing to this one."""
    batch = batch_of([[[0, 0, 4, 4, 1]]] * 2, torch.zeros(2, 3, SIZE, SIZE))
    with pytest.raises(DataError, match='images of torch.float32 and rectangles to erase, which are for .*torch.uint8'):
        Preprocess(tiny_config(), CPU)(batch)


def test_copies_keep_the_batch_as_it_is():
    image, boxes = torch.rand(3, 4, 4), torch.arange(4)
    images, targets = DeviceCopies(CPU)(([image], [{'boxes': boxes, 'image_id': 7}]))
    assert torch.equal(images[0], image)
    assert torch.equal(targets[0]['boxes'], boxes)
    assert targets[0]['image_id'] == 7


def test_erasing_depends_on_the_rectangles_seed_and_on_nothing_else(tiny_config):
    preprocess = Preprocess(tiny_config(), CPU)
    first, second, none = [[2, 3, 10, 20, 7]], [[2, 3, 10, 20, 8]], [[0] * 5]
    images, _ = preprocess(batch_of([first, none, second]))
    again, _ = preprocess(batch_of([second, first]))
    assert torch.equal(images[0], again[1])
    assert torch.equal(images[2], again[0])
    assert not torch.equal(images[0], images[2])
    blank = images[1, :, :1, :1]
    assert torch.equal(images[1], blank.expand(3, SIZE, SIZE))
    erased = (images[0] != blank).any(0)
    assert erased[2:12, 3:23].all()
    assert erased.sum() == 10 * 20


@pytest.mark.parametrize(('mode', 'colours'), [('pixel', 200), ('rand', 1), ('const', 1)])
def test_fills_of_random_erasing(tiny_config, mode, colours):
    images, _ = Preprocess(tiny_config(AUG__REMODE=mode), CPU)(batch_of([[[0, 0, 10, 20, 5]]]))
    filled = images[0, :, :10, :20].flatten(1)
    assert len(filled.unique(dim=1)[0]) == colours
    if mode == 'pixel':
        assert abs(filled.mean()) < 0.15
        assert abs(filled.std() - 1) < 0.1
    assert (filled == 0).all() == (mode == 'const')
