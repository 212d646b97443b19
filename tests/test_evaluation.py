"""The report of --eval, against the network called in Python and scikit-learn; datasets of some of the classes."""

import csv
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.calibration import calibration_curve
from timm.data import ImageNetInfo

import main as program
from data import DataError, Preprocess
from data.class_names import class_indices
from engine.checkpoint import load_checkpoint
from engine.config_tree import ConfigError
from evaluation_report import BINS, calibration
from models import build_model
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.golden import fill_
from tests.helpers.images import damage, write_images
from tests.helpers.runs import CPU, folder_of, log_of

NAMES = [f'class_{i}' for i in range(7)]


def read_csv(path):
    with path.open(encoding='utf-8') as file:
        return list(csv.DictReader(file))


def logits_of(config, loader):
    """The logits of the network of `write_checkpoint`."""
    model, preprocess = fill_(build_model(config)).eval(), Preprocess(config, CPU)
    with torch.no_grad():
        return torch.cat([model(preprocess(batch)[0]) for batch in loader])


def test_report_of_raw_and_ema_weights(tiny_config, tmp_path):
    tree = write_images(tmp_path / 'tree', classes=7, train=1, val=3)
    damage(tree / 'val' / 'class_6' / '2.png', 'garbage')
    options = {'MODEL__NUM_CLASSES': '7', 'DATA__DATA_PATH': str(tree), 'DATA__ON_ERROR': 'skip'}
    path = write_checkpoint(tmp_path / 'w.pth', tiny_config(**options), NAMES)
    checkpoint = load_checkpoint(path)
    flat = {name: torch.zeros_like(x) for name, x in checkpoint['model'].items()}
    flat['head.bias'][2] = 1.0
    torch.save(checkpoint | {'model_ema': flat}, path)
    config = tiny_config(**options, EVAL_MODE='True', MODEL__RESUME=str(path))
    program.main(config)

    probabilities = logits_of(config, program.build_eval_loader(config))[:20].softmax(dim=1).numpy()
    targets = np.repeat(np.arange(7), 3)[:20]
    predictions = probabilities.argmax(axis=1)
    folder = folder_of(config)
    rows = read_csv(folder / 'predictions.csv')
    assert [row['image'] for row in rows] == [f'class_{i // 3}/{i % 3}.png' for i in range(20)]  # not the damaged one
    assert [row['class'] for row in rows] == [NAMES[i] for i in targets]
    assert [row['predicted'] for row in rows] == [NAMES[i] for i in predictions]
    np.testing.assert_allclose([float(row['probability']) for row in rows], probabilities.max(axis=1), atol=2e-6)
    own = probabilities[np.arange(20), targets]
    np.testing.assert_allclose([float(row['class_probability']) for row in rows], own, atol=2e-6)
    np.testing.assert_allclose([float(row['loss']) for row in rows], -np.log(own), atol=2e-5)
    in_top5 = (probabilities > own[:, None]).sum(axis=1) < 5
    assert [row['in_top5'] for row in rows] == [str(int(x)) for x in in_top5]

    classes = read_csv(folder / 'classes.csv')
    assert [(row['class'], row['images']) for row in classes] == [
        *((name, '3') for name in NAMES[:6]),
        ('class_6', '2'),
    ]
    right = np.bincount(targets, predictions == targets)
    images = np.bincount(targets)
    assert [row['accuracy'] for row in classes] == [f'{x:.2f}' for x in 100 * right / images]
    assert [row['top5_accuracy'] for row in classes] == [
        f'{x:.2f}' for x in 100 * np.bincount(targets, in_top5) / images
    ]
    confusion = read_csv(folder / 'confusion.csv')
    counts = np.array([[int(row[name]) for name in NAMES] for row in confusion])
    assert counts.diagonal().tolist() == right.tolist()
    assert counts.sum(axis=0).tolist() == np.bincount(predictions, minlength=7).tolist()

    files = ['predictions.csv', 'classes.csv', 'calibration.png', 'confusion.csv', 'confusion.png']
    files += ['hardest.png', 'confident.png']
    log = log_of(config)
    assert f'report: {", ".join(files)} in {folder}' in log
    assert f'report: mean per-class accuracy {100 * (right / images).mean():.2f}%, expected calibration' in log
    for name in files:
        ema = folder / name.replace('.', '_ema.')
        for file in (folder / name, ema):
            assert file.suffix == '.csv' or Image.open(file).width > 300
    assert {row['predicted'] for row in read_csv(folder / 'predictions_ema.csv')} == {'class_2'}
    ema_classes = read_csv(folder / 'classes_ema.csv')
    assert [row['precision'] for row in ema_classes] == ['', '', '15.00', '', '', '', '']
    assert log.count(' * Acc@1 ') == log.count(' Acc@5 ', log.index(' * Acc@1')) == 2


def test_calibration_error_is_that_of_scikit_learns_curve():
    rng = np.random.default_rng(0)
    probability = rng.uniform(0.2, 1, 1000)
    is_right = rng.uniform(0, 1, 1000) < probability**2
    ece, (images, means, accuracies) = calibration(probability, is_right)
    accuracy, mean = calibration_curve(is_right, probability, n_bins=BINS)
    known = images > 0
    np.testing.assert_allclose(accuracies[known], accuracy)
    np.testing.assert_allclose(means[known], mean)
    assert ece == pytest.approx((images[known] * abs(mean - accuracy)).sum() / 1000)
    assert calibration(np.array([1.0, 1.0]), np.array([True, True]))[0] == 0


def test_a_dataset_of_some_classes_is_evaluated_by_name(tiny_config, tmp_path):
    names = ['class_4', 'class_1', 'class_0', 'class_3', 'class_2', 'class_6', 'class_5']  # other order than in val/
    tree = write_images(tmp_path / 'tree', classes=3, train=1, val=2)
    shutil.rmtree(tree / 'train')
    shutil.rmtree(tree / 'val' / 'class_1')
    options = {'MODEL__NUM_CLASSES': '7', 'DATA__DATA_PATH': str(tree), 'EVAL_MODE': 'True'}
    path = write_checkpoint(tmp_path / 'w.pth', tiny_config(MODEL__NUM_CLASSES='7'), names)
    options['MODEL__RESUME'] = str(path)
    with pytest.raises(DataError, match="if they are some of the network's, write --opts TEST.CLASSES subset"):
        program.main(tiny_config(**options))
    config = tiny_config(**options, TEST__CLASSES='subset')
    program.main(config)
    logits = logits_of(config, program.build_eval_loader(config))[:, [2, 4]]  # class_0, class_2
    rows = read_csv(folder_of(config) / 'predictions.csv')
    assert [row['predicted'] for row in rows] == [('class_0', 'class_2')[i] for i in logits.argmax(dim=1)]
    own = logits.softmax(dim=1)[range(4), [0, 0, 1, 1]]
    np.testing.assert_allclose([float(row['class_probability']) for row in rows], own, atol=2e-6)
    log = log_of(config)
    assert 'TEST.CLASSES subset: 2 of 7 classes are evaluated' in log
    assert 'other classes' not in log
    assert 'other settings' not in log
    assert 'Acc@5' not in log

    (tree / 'val' / 'class_2').rename(tree / 'val' / 'zebra')
    with pytest.raises(DataError, match=r'val has classes that .*w.pth does not know \(zebra\): name its'):
        program.main(config)
    with pytest.raises(ConfigError, match='TEST.CLASSES subset is for --eval'):
        tiny_config(TEST__CLASSES='subset')


def test_names_of_imagenet():
    ids = ImageNetInfo('imagenet-1k').label_names()
    assert class_indices(['n01443537', 'n01440764'], None, 1000, 'val', 'w.pth') == [1, 0]
    assert class_indices(['0', '10', '2'], ids, 1000, 'val', 'w.pth') == [0, 10, 2]  # ImageNet-V2
    with pytest.raises(DataError, match=r'does not know \(1000\)'):
        class_indices(['1000'], ids, 1000, 'val', 'w.pth')
    with pytest.raises(DataError, match=r'does not know \(0\)'):  # one number among names is a mistake
        class_indices(['0', 'n01440764'], ids, 1000, 'val', 'w.pth')
    for known in (None, ['a']):
        with pytest.raises(DataError, match='w.pth does not record the names of its 7 classes'):
            class_indices(['a'], known, 7, 'val', 'w.pth')
