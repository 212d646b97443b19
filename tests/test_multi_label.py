"""Images of several classes: labels, evaluation, and what cannot be."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score
from torch import nn

import main as program
from data import DataError, build_eval_loader
from data.build import open_dataset
from data.image_folder import ClassFolders
from data.images import PartError
from data.multi_label import class_probabilities, multi_hot
from data.python_dataset import register_dataset
from engine.checkpoint import CheckpointError
from evaluation import validate_multi_label
from tests.helpers.extensions import forgotten_modules
from tests.helpers.paths import TINY
from tests.helpers.processes import run_here
from tests.helpers.recipes import RECIPES
from tests.helpers.runs import build_run, folder_of, log_of, records
from tests.helpers.several_labels import SeveralLabels
from tools.study.plan import Study, StudyError, Variant

OPTIONS = {name: value for name, value in RECIPES['multi_label'].items() if name != 'IMPORT'}


@pytest.fixture(autouse=True)
def registered():
    with forgotten_modules():
        register_dataset('several_labels')(SeveralLabels)
        yield


@pytest.mark.parametrize(
    ('label', 'expected'),
    [
        ([0, 2], [1, 0, 1]),
        ([], [0, 0, 0]),
        ((np.int64(1),), [0, 1, 0]),
        ({1, 2}, [0, 1, 1]),
        (1, [0, 1, 0]),
        (np.array(1), [0, 1, 0]),
        (np.array([True, False, True]), [1, 0, 1]),
        (torch.tensor([0.0, 1.0, 1.0]), [0, 1, 1]),
    ],
)
def test_forms_of_labels(label, expected):
    vector = multi_hot(label, 3, 'x')
    assert vector.tolist() == expected
    assert vector.dtype == torch.float32


@pytest.mark.parametrize(
    ('label', 'message'),
    [
        ([1, 0, 1], r'label of x is \[1, 0, 1\]: return each class index once, from 0 to 2; or an array of \(3,\)'),
        ([3], 'return each class index once, from 0 to 2'),
        (-1, 'return each class index once'),
        (['cat'], 'is a list: return a list of class indices, or an array'),
        (0.5, 'is a float: return a list of class indices'),
        (np.array([0.5, 1, 0]), r'is a ndarray, float64, \(3,\): return \(3,\) values of 0 and 1, or a list of class'),
        (torch.tensor([0, 2]), r'is a Tensor, torch.int64, \(2,\): return'),
    ],
)
def test_other_labels_are_refused(label, message):
    with pytest.raises(PartError, match=message):
        multi_hot(label, 3, 'x')


def test_probabilities_of_one_class_and_of_several(tiny_config):
    logits = torch.tensor([[0.0, 2.0, -1.0]])
    assert torch.equal(class_probabilities(logits, tiny_config()), logits.softmax(dim=1))
    assert torch.equal(class_probabilities(logits, tiny_config(**OPTIONS)), logits.sigmoid())


class Scores(nn.Module):
    """A network that gives logits one after the other, whatever the images."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.first = logits, 0

    def forward(self, images):
        self.first += len(images)
        return self.logits[self.first - len(images) : self.first]


class Flaky(SeveralLabels):
    """The third image cannot be read, and no image shows the last of four classes."""

    def __init__(self, config, split):
        super().__init__(config, split)
        self.classes = [*self.classes, 'grey']

    def __getitem__(self, index):
        if index == 2:
            raise FileNotFoundError(2, 'No such file or directory', 'x.png')
        image, labels = super().__getitem__(index)
        return image, labels if isinstance(labels, list) else np.flatnonzero(labels).tolist()


def test_evaluation_gives_the_mean_average_precision(tiny_config):
    register_dataset('flaky')(Flaky)
    options = OPTIONS | {'DATA__DATASET': 'flaky', 'MODEL__NUM_CLASSES': '4', 'DATA__ON_ERROR': 'skip'}
    config = tiny_config(**options)
    loader = build_eval_loader(config)
    logits = torch.randn(11, 4)
    logits[3] = logits[4]  # equal scores
    result = validate_multi_label(build_run(config), Scores(logits), loader)
    kept = [index for index in range(11) if index != 2]
    targets = torch.tensor([[(index + 1) >> label & 1 for label in range(4)] for index in kept])
    targets[:, 3] = 0
    expected = average_precision_score(targets[:, :3], logits[kept, :3], average='macro')
    assert result.mean_ap == pytest.approx(100 * expected)
    assert result.val_loss == pytest.approx(F.binary_cross_entropy_with_logits(logits[kept], targets.float()).item())
    assert (result.positives.tolist(), result.images) == (targets.sum(0).tolist(), 10)
    assert math.isnan(validate_multi_label(build_run(config), Scores(logits * math.inf), loader).mean_ap)


def test_runs_select_the_best_checkpoint_by_it(tiny_config, image_tree):
    config = tiny_config(**OPTIONS)
    program.main(config)
    epochs = records(config, 'epoch')
    assert [{'map', 'val_loss'} <= epoch.keys() for epoch in epochs] == [True, True]
    assert epochs[-1]['max_accuracy'] == max(epoch['map'] for epoch in epochs)
    log = log_of(config)
    assert f' * mAP {epochs[-1]["map"]:.3f}' in log
    assert f'Max mAP: {epochs[-1]["max_accuracy"]:.2f}%' in log
    best = folder_of(config) / 'ckpt_best.pth'
    done = run_here('-m', 'tools.predict', '--resume', best, '--topk', '3', image_tree / 'val' / 'class_0')
    probabilities = [float(text) for text in done.stdout.splitlines()[0].split() if text.startswith('0.')]
    assert len(probabilities) == 3
    assert sum(probabilities) > 1.1  # of each class, not over the classes


def test_studies_refuse_them():
    variants = {'a': Variant('a', {name.replace('__', '.'): value for name, value in OPTIONS.items()})}
    study = Study('digits', TINY, 'a', [0], variants, [], [], program.TASK)
    with pytest.raises(StudyError, match='variant a: studies compare top-1: write DATA.MULTI_LABEL False'):
        study.config('a', 0)


def test_several_classes_need_the_key(tiny_config, image_tree, monkeypatch):
    dataset = open_dataset(tiny_config(DATA__DATASET='several_labels'), 'train')
    with pytest.raises(PartError, match='is a list: return its index, or write DATA.MULTI_LABEL True for several'):
        dataset[1]
    folders = OPTIONS | {'DATA__DATASET': 'imagenet', 'DATA__DATA_PATH': str(image_tree)}
    assert open_dataset(tiny_config(**folders), 'val')[5].target.tolist() == [0, 1, 0]
    monkeypatch.setattr(ClassFolders, 'is_multi_label', True)  # as a format that lists labels
    monkeypatch.setattr(ClassFolders, 'labels', lambda samples, index: [0, 2])
    assert open_dataset(tiny_config(**folders), 'val')[5].target.tolist() == [1, 0, 1]
    with pytest.raises(DataError, match='has images of several classes, or of none: write --opts DATA.MULTI_LABEL'):
        open_dataset(tiny_config(DATA__DATA_PATH=str(image_tree)), 'val')


def test_tools_and_a_run_of_one_class_from_a_table_of_several(tiny_config, image_tree, tmp_path):
    for split, count in (('train', 8), ('val', 4)):
        paths = sorted((image_tree / split).glob('*/*.*'))
        rows = [f'{path.relative_to(image_tree)},{path.parent.name}|all' for path in paths]
        (image_tree / f'{split}.csv').write_text('\n'.join(['path,labels', *rows[: 2 * count]]))  # val lacks nothing
    options = {'DATA__DATA_PATH': str(image_tree), 'TRAIN__EPOCHS': '2', 'DATA__BATCH_SIZE': '4'}
    several = OPTIONS | {'DATA__DATASET': 'table'}
    config = tiny_config(TAG='several', **options, **several)
    program.main(config)
    checkpoint = folder_of(config) / 'ckpt_epoch_0.pth'
    assert records(config, 'epoch')[0]['map'] > 0

    evaluation = tiny_config(TAG='several', EVAL_MODE='True', MODEL__RESUME=str(checkpoint), **options, **several)
    program.main(evaluation)
    rows = (folder_of(evaluation) / 'classes.csv').read_text().splitlines()
    assert rows[0] == 'class,index,images,average_precision'
    assert rows[1].startswith('all,0,8,100.00')  # every image shows it
    values = [float(row.split(',')[-1]) for row in rows[1:]]
    assert np.mean(values) == pytest.approx(records(config, 'epoch')[0]['map'], abs=0.01)

    without = tiny_config(TAG='several', EVAL_MODE='True', MODEL__RESUME=str(checkpoint), **options)
    with pytest.raises(CheckpointError, match='write --opts DATA.MULTI_LABEL True'):
        program.main(without)

    # Another metric starts again from nothing
    one = tiny_config(TAG='one', MODEL__RESUME=str(checkpoint), **options)
    program.main(one)
    assert 'DATA.MULTI_LABEL has changed from True to False: the best metric is reset' in log_of(one)
    assert records(one, 'epoch')[-1]['max_accuracy'] == records(one, 'epoch')[-1]['acc1']

    command = ['-m', 'tools.features', '--resume', checkpoint, '--data-path', image_tree, '--workers', '0']
    done = run_here(*command, '--output', tmp_path / 'f.npz')
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / 'f.npz') as file:
        assert set(file['class']) == {'all|class_0', 'all|class_1'}
    done = run_here(*command, '--knn', '3')
    assert 'need one class per image' in done.stderr
    done = run_here('-m', 'tools.convert_checkpoint', checkpoint, f'{tmp_path}/hf/')
    assert json.loads((tmp_path / 'hf' / 'config.json').read_text())['problem_type'] == 'multi_label_classification'
