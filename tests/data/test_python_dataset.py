"""Datasets that users write: forms of images, classes, names, errors, worker processes; transforms of users."""

import io
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from config import load_config
from data import DataError
from data.build import build_eval_loader, build_loaders, open_dataset
from data.images import PartError
from data.python_dataset import PythonDataset, register_dataset
from data.seeding import SeededDataset
from data.transforms import UserTransform, register_transform
from engine.experiment import describe_samples
from extensions import import_modules
from tests.helpers.extensions import forgotten_modules
from tests.helpers.images import noise
from tests.helpers.paths import TINY
from tests.helpers.recipes import LIBRARY_TRANSFORMS


def encode(image):
    file = io.BytesIO()
    image.save(file, 'PNG')
    return file.getvalue()


FORMS = {'pil': lambda x: x, 'array': np.asarray, 'bytes': encode}


class Images(Dataset):
    """Images in a form, with labels of NumPy; as a user would write it."""

    def __init__(self, config, split, form='pil', count=12):
        self.form, self.count, self.classes = form, count, ['a', 'b', 'c']
        self.names = [f'{split} {i}' for i in range(count)]

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return FORMS[self.form](noise(40 + index, 32)), np.int64(index % 3)


class Flaky(Images):
    def __getitem__(self, index):
        if index == 3:
            raise FileNotFoundError(2, 'No such file or directory', 'x.png')
        return super().__getitem__(index)


class Inverted:
    def __init__(self, config):
        self.levels = 255

    def __call__(self, pixels):
        return np.where(random.random() < 0.5, self.levels - pixels, pixels).astype(np.uint8)


@pytest.fixture(autouse=True)
def registered():
    with forgotten_modules():
        register_dataset('images')(Images)
        register_transform('inverted')(Inverted)
        yield


def config_of(*opts):
    return load_config(TINY, ['DATA.DATASET', 'images', 'AUG.MIXUP', '0', 'AUG.CUTMIX', '0', *opts])


@pytest.mark.parametrize('pipeline', ['fast', 'published'])
def test_every_form_of_image_gives_the_same_samples(pipeline):
    batches = []
    for form in FORMS:
        register_dataset(f'images_{form}')(lambda config, split, form=form: Images(config, split, form))
        config = config_of('DATA.DATASET', f'images_{form}', 'DATA.PIPELINE', pipeline)
        train, val = build_loaders(config)
        train.sampler.set_epoch(1)
        batches.append([batch.image for loader in (train, val) for batch in loader])
    for batch in batches[1:]:
        for one, two in zip(batch, batches[0], strict=True):
            assert torch.equal(one, two)


def test_worker_processes_and_a_transform_give_what_this_process_gives():
    both = []
    for workers in ('0', '1'):
        train, _ = build_loaders(config_of('DATA.NUM_WORKERS', workers, 'AUG.TRANSFORM', 'inverted'))
        train.sampler.set_epoch(2)
        both.append(list(train))
    for one, two in zip(*both, strict=True):
        assert torch.equal(one.image, two.image)
        assert torch.equal(one.target, two.target)
    plain, _ = build_loaders(config_of())
    plain.sampler.set_epoch(2)
    before, after = (torch.cat([batch.image for batch in batches]) for batches in (plain, both[0]))
    inverted = [torch.equal(255 - one, two) for one, two in zip(before, after, strict=True)]
    assert 0 < sum(inverted) < len(inverted)


@pytest.mark.parametrize('pipeline', ['fast', 'published'])
@pytest.mark.parametrize('name', ['mixed', 'jitter'])
def test_transforms_of_libraries_depend_on_seed_epoch_and_index_alone(name, pipeline):
    import_modules([LIBRARY_TRANSFORMS])
    options = 'AUG.TRANSFORM', name, 'AUG.AUTO_AUGMENT', 'none', 'AUG.REPROB', '0', 'DATA.PIPELINE', pipeline
    dataset = open_dataset(config_of(*options), 'train')
    images = []
    for epoch, seed in ((1, 0), (2, 0), (1, 1)):
        samples = SeededDataset(dataset, seed)
        forwards = [samples[epoch, index].image for index in range(6)]
        in_a_worker = SeededDataset(pickle.loads(pickle.dumps(dataset)), seed)
        backwards = [in_a_worker[epoch, index].image for index in reversed(range(6))][::-1]
        assert all(map(torch.equal, forwards, backwards))
        images.append(torch.stack(forwards))
    assert len({image.numpy().tobytes() for group in images for image in group}) == 18


@pytest.mark.slow
def test_worker_processes_give_the_same_transforms_of_libraries():
    import_modules([LIBRARY_TRANSFORMS])
    both = []
    for workers in ('0', '1'):
        train, _ = build_loaders(config_of('DATA.NUM_WORKERS', workers, 'AUG.TRANSFORM', 'mixed'))
        train.sampler.set_epoch(2)
        both.append(torch.cat([batch.image for batch in train]))
    assert torch.equal(*both)


def test_transforms_of_libraries_get_colour_and_grey_images():
    import_modules([LIBRARY_TRANSFORMS])
    colour = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    for pixels in (colour, colour[..., 0]):
        flipped = UserTransform(config_of('AUG.TRANSFORM', 'flip'))(pixels)
        assert np.array_equal(flipped, pixels[:, ::-1])
        for name in ('mixed', 'jitter'):
            assert UserTransform(config_of('AUG.TRANSFORM', name))(pixels).shape == pixels.shape
    with pytest.raises(PartError, match=r'AUG.TRANSFORM to_float returns a ndarray, float32, \(8, 8, 3\) for an image'):
        UserTransform(config_of('AUG.TRANSFORM', 'to_float'))(colour)


def test_datasets_of_torchvision_and_hugging_face():
    import datasets
    from torchvision.datasets import FakeData

    images, labels = [noise(8, 8)] * 6, [0, 1, 2] * 2
    features = datasets.Features({'img': datasets.Image(), 'y': datasets.ClassLabel(names=['a', 'b', 'c'])})
    register_dataset('hub')(lambda config, split: datasets.Dataset.from_dict({'img': images, 'y': labels}, features))
    register_dataset('fake')(lambda config, split: FakeData(6, (3, 8, 8), num_classes=3))
    for name, classes in (('hub', ['a', 'b', 'c']), ('fake', ['0', '1', '2'])):
        dataset = open_dataset(config_of('DATA.DATASET', name), 'val')
        assert dataset.classes == classes
        assert dataset[1].image.dtype == torch.uint8
    assert open_dataset(config_of('DATA.DATASET', 'hub'), 'val')[4].target == 1
    rows = datasets.Dataset.from_dict({'img': images, 'y': labels})  # of plain numbers
    with pytest.raises(PartError, match='mine is a DatasetDict of splits: return the dataset of one split'):
        PythonDataset(datasets.DatasetDict(train=rows), 'mine', 3)
    with pytest.raises(DataError, match=r'mine has 0 columns of type ClassLabel, not one: keep one of'):
        PythonDataset(rows.cast_column('img', datasets.Image()), 'mine', 3)


def test_what_cannot_be_sent_to_worker_processes_is_told(recwarn):
    class Local(Images):
        pass

    register_dataset('local')(Local)
    loader = build_eval_loader(config_of('DATA.DATASET', 'local'))
    assert len(list(loader)) == 3
    loader = build_eval_loader(config_of('DATA.DATASET', 'local', 'DATA.NUM_WORKERS', '1'))
    with pytest.raises(DataError, match='cannot be sent to the worker processes of the loader .*Local.*NUM_WORKERS 0'):
        iter(loader)
    assert not [warning for warning in recwarn if 'pickle' in str(warning.message)]


def test_classes_names_and_notes():
    dataset = open_dataset(config_of(), 'train')
    assert dataset.classes == ['a', 'b', 'c']
    assert list(dataset.sample_names())[:2] == ['train 0', 'train 1']
    other = PythonDataset(Images(None, 'val'), 'other', 3)
    assert describe_samples(other.sample_names()) != describe_samples(dataset.sample_names())
    plain = PythonDataset([(noise(), 0), (noise(), 1)], 'plain', 2)
    assert (plain.classes, list(plain.sample_names())) == (['0', '1'], ['0', '1'])
    assert plain.notes == ['plain has no attribute `names`: checkpoints record only the number of its images']
    with pytest.raises(DataError, match=r'images \(train\) has 3 classes, but MODEL.NUM_CLASSES is 4'):
        open_dataset(config_of('MODEL.NUM_CLASSES', '4'), 'train')


def test_splits_with_other_classes_are_refused():
    @register_dataset('two')
    def build(config, split):
        dataset = Images(config, split)
        dataset.classes = ['a', 'b', split]
        return dataset

    with pytest.raises(DataError, match='train and val of two have different classes: give both the same'):
        build_loaders(config_of('DATA.DATASET', 'two'))


@pytest.mark.parametrize(
    ('item', 'message'),
    [
        (torch.zeros(3, 8, 8), r'0 of mine is a Tensor, torch.float32, \(3, 8, 8\): return \(image, class index\)'),
        ((torch.zeros(3, 8, 8), 0), r'is a Tensor, torch.float32, \(3, 8, 8\): return a PIL image, an array of uint8'),
        ((np.zeros((3, 8, 8), np.uint8), 0), r'image 0 of mine is a ndarray, uint8, \(3, 8, 8\): return'),
        ((np.zeros((8, 8, 3), np.float32), 0), 'is a ndarray, float32'),
        (('x.png', 0), 'image 0 of mine is a str: return a PIL image'),
        ((Image.new('RGB', (8, 8)), 3), 'the class of 0 of mine is 3: return an index from 0 to 2'),
        ((Image.new('RGB', (8, 8)), 'cat'), 'the class of 0 of mine is a str: return its index'),
        ((Image.new('RGB', (8, 8)), 0.5), 'the class of 0 of mine is a float: return its index'),
    ],
)
def test_samples_of_another_form_are_refused_even_where_bad_images_are_skipped(item, message):
    samples = PythonDataset([item], 'mine', 3)
    transform = open_dataset(config_of('DATA.ON_ERROR', 'skip'), 'train').transform
    with pytest.raises(PartError, match=message):
        transform(samples.load(0)[0], samples.describe(0))


def test_datasets_of_another_form_are_refused():
    with pytest.raises(PartError, match='mine has no length: give a dataset with __len__ and __getitem__'):
        PythonDataset(iter([]), 'mine', 3)
    dataset = Images(None, 'val')
    dataset.names = ['a']
    with pytest.raises(PartError, match='mine has 12 samples and 1 names: give a name for each'):
        PythonDataset(dataset, 'mine', 3)
    dataset.names, dataset.classes = None, 10
    with pytest.raises(PartError, match='`classes` of mine is a int: give a list'):
        PythonDataset(dataset, 'mine', 3)
    with pytest.raises(PartError, match='mine is empty: give a dataset with samples'):
        PythonDataset([], 'mine', 3)


def test_a_dataset_that_finds_no_file_is_told_in_a_line():
    register_dataset('absent')(lambda config, split: Path('/nowhere/index.csv').read_bytes())
    with pytest.raises(DataError, match=r'dataset absent \(train\) cannot be opened: .*/nowhere/index.csv'):
        open_dataset(config_of('DATA.DATASET', 'absent'), 'train')


def test_a_missing_file_is_a_bad_image():
    register_dataset('flaky')(Flaky)
    with pytest.raises(DataError, match=r'image val 3 of flaky \(val\) cannot be read \(No such file or directory\)'):
        list(build_eval_loader(config_of('DATA.DATASET', 'flaky')))
    batches = list(build_eval_loader(config_of('DATA.DATASET', 'flaky', 'DATA.ON_ERROR', 'skip')))
    assert torch.cat([batch.skipped for batch in batches]).tolist().count(3) == 1


@pytest.mark.parametrize(
    ('result', 'message'),
    [
        (np.zeros((2, 2, 3), np.uint8), r'AUG.TRANSFORM bad returns a ndarray, uint8, \(2, 2, 3\) for an image of'),
        (torch.zeros(3, 28, 28), 'returns a Tensor, torch.float32'),
        (None, 'returns a NoneType for an image of .*: return an array of uint8 of the same shape'),
    ],
)
def test_transforms_must_return_an_image_of_the_same_shape(result, message):
    register_transform('bad')(lambda config: lambda pixels: result)
    for pipeline in ('fast', 'published'):
        dataset = open_dataset(config_of('AUG.TRANSFORM', 'bad', 'DATA.PIPELINE', pipeline), 'train')
        with pytest.raises(PartError, match=message):
            dataset[0]
