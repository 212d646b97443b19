"""Features equal those of the network called in Python, whatever the batch size; classifiers on them are right."""

import sys

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from data import Preprocess
from data.build import open_for_evaluation
from engine.checkpoint import load_checkpoint
from models import build_model
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.images import damage, write_images
from tests.helpers.processes import run_here
from tests.helpers.runs import CPU
from tools import features as program

NAMES = ['class_0', 'class_1', 'class_2']


@pytest.fixture
def checkpoint(tiny_config, tmp_path):
    return write_checkpoint(tmp_path / 'w.pth', tiny_config(), NAMES)


def call(*arguments):
    """stdout and stderr of the program, which succeeds."""
    done = run_here('-m', 'tools.features', *arguments, '--workers', '0')
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def images_of(config, split):
    """The images of a split as the network sees them."""
    dataset = open_for_evaluation(config, split)
    images = torch.stack([dataset[i].image for i in range(len(dataset))])
    return Preprocess(config, CPU).prepare(images)


def test_features_are_those_of_the_network(tiny_config, image_tree, checkpoint, tmp_path):
    config = tiny_config(DATA__DATA_PATH=str(image_tree))
    network = build_model(config).eval()
    network.load_state_dict(load_checkpoint(checkpoint)['model'])
    images = torch.cat([images_of(config, split) for split in ('train', 'val')])
    with torch.no_grad():
        tokens, maps = network.forward_intermediates(images, norm=True)
        first = network.forward_intermediates(images, indices=[0], stop_early=True)[0]
        pooled = network.forward_head(network.forward_features(images), pre_logits=True)
        assert torch.allclose(network.head(pooled), network(images))
    expected = {
        (): pooled,
        ('--tokens', 'msg'): tokens.mean((1, 2)),
        ('--stage', '1'): maps[0].mean((2, 3)),
        ('--stage', '2', '--tokens', 'patches'): maps[1].mean((2, 3)),
        ('--stage', '1', '--tokens', 'msg'): first.mean((1, 2)),
    }
    torch.testing.assert_close(expected['--tokens', 'msg'], pooled)
    for number, (flags, values) in enumerate(expected.items()):
        output = tmp_path / f'{number}.npz'
        size = ('--batch-size', '5') if number % 2 else ()
        call('--resume', checkpoint, '--data-path', image_tree, '--output', output, *flags, *size)
        with np.load(output) as file:
            np.testing.assert_allclose(file['features'], values, rtol=1e-4, atol=1e-5, err_msg=str(flags))
            assert file['features'].dtype == np.float32
            assert file['name'][[0, -1]].tolist() == ['train/class_0/0.png', 'val/class_2/3.png']
            assert file['class'].tolist() == [name for count in (8, 4) for name in np.repeat(NAMES, count)]


def test_files_and_parquet(image_tree, checkpoint, tmp_path):
    parquet = pytest.importorskip('pyarrow.parquet')
    damage(image_tree / 'val' / 'class_1' / '0.png', 'garbage')
    output = tmp_path / 'features.parquet'
    done = run_here(
        '-m', 'tools.features', image_tree / 'val', '--resume', checkpoint, '--output', output, '--workers', '0'
    )
    assert done.returncode == 3
    assert '1 of 12 images cannot be read' in done.stderr
    table = parquet.read_table(output).to_pydict()
    assert table['class'] == ['class_0'] * 4 + ['class_1'] * 3 + ['class_2'] * 4
    assert table['name'][4] == str(image_tree / 'val' / 'class_1' / '1.png')
    assert np.array(table['features']).shape == (11, 16)


def test_timm_networks_and_other_classes_than_the_network_has(tiny_config, tmp_path):
    """The data have two classes, the network three; colours tell the classes apart."""
    tree = write_images(tmp_path / 'tree', classes=2)
    options = {'MODEL__TYPE': 'timm:vit_tiny_patch16_224', 'DATA__IMG_SIZE': '32'}
    options['MODEL__TIMM_ARGS'] = 'embed_dim=24 depth=2 num_heads=3'
    config = tiny_config(**options)
    path = write_checkpoint(tmp_path / 'vit.pth', config, NAMES)
    output = tmp_path / 'f.npz'
    out, _ = call(
        '--resume', path, '--data-path', tree, '--output', output, '--stage', '1', '--knn', '5', '--linear-probe'
    )
    network = build_model(config).eval()
    network.load_state_dict(load_checkpoint(path)['model'])
    images = images_of(tiny_config(**options, DATA__DATA_PATH=str(tree)), 'val')
    with torch.no_grad():
        (first,) = network.forward_intermediates(images, indices=[0], norm=True, intermediates_only=True)
    with np.load(output) as file:
        features, classes = file['features'], file['class']
    np.testing.assert_allclose(features[16:], first.mean((2, 3)), rtol=1e-4, atol=1e-5)
    train, val = (program.Features([], classes[part], features[part]) for part in (slice(0, 16), slice(16, None)))
    mean, std = train.features.mean(axis=0), train.features.std(axis=0)
    probe = LogisticRegression(max_iter=1000).fit((train.features - mean) / std, train.classes)
    linear = probe.score((val.features - mean) / std, val.classes)
    neighbours = program.knn_accuracy(train, val, 5)
    assert out.splitlines() == [
        f'5 nearest neighbours: {100 * neighbours:.2f}% of 8 images of val',
        f'linear probe: {100 * linear:.2f}% of 8 images of val',
    ]


def test_neighbours_vote_by_cosine_as_in_dino():
    def features(degrees, lengths, classes):
        angles = np.radians(degrees)
        return program.Features([], classes, np.stack((np.cos(angles), np.sin(angles)), axis=1) * lengths)

    # One near neighbour that is far away in length, and two others: 1 vote of exp(cos 5 / T), 2 of exp(cos 15 / T)
    train = features([5, 15, -15, 90], np.array([[9], [1], [1], [1]]), ['near', 'far', 'far', 'away'])
    val = features([0], np.array([[1]]), ['far'])
    weights = np.exp(np.cos(np.radians([5, 15])) / 0.07)
    assert weights[0] < 2 * weights[1]
    assert program.knn_accuracy(train, val, 3) == 1
    train = features([5, 25, -25, 90], np.array([[9], [1], [1], [1]]), ['near', 'far', 'far', 'away'])
    weights = np.exp(np.cos(np.radians([5, 25])) / 0.07)
    assert weights[0] > 2 * weights[1]
    assert program.knn_accuracy(train, val, 3) == 0


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--output', 'f.npz'], 'give either images, or --data-path and a dataset'),
        (['{tree}/val'], 'nothing to do: give --output, --knn or --linear-probe'),
        (['{tree}/val', '--knn', '5'], '--knn and --linear-probe need --data-path and a dataset'),
        (['{tree}/val', '--output', 'f.csv'], 'f.csv has no suffix of features: write .npz or .parquet'),
        (['{tree}/val', '--output', 'f.npz', '--stage', '3'], '--stage is 3: the network has 2 stages'),
        (['--data-path', '{tree}', '--knn', '25'], '--knn is 25, but train/ has 24 images: write at most as many'),
        (['--data-path', '{tree}/val', '--knn', '5'], 'train does not exist: give --data-path'),
    ],
)
def test_errors(image_tree, checkpoint, arguments, message):
    arguments = [argument.replace('{tree}', str(image_tree)) for argument in arguments]
    done = run_here('-m', 'tools.features', '--resume', checkpoint, *arguments, '--workers', '0')
    assert done.returncode in (1, 2)
    assert message in done.stderr.splitlines()[-1]
    assert 'Traceback' not in done.stderr


def test_patches_without_msg_tokens_and_missing_pyarrow(tiny_config, image_tree, tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path / 'p.pth', tiny_config(MODEL__MSG__HEAD_TOKENS='patches'), NAMES)
    arguments = ['-m', 'tools.features', image_tree / 'val', '--resume', path]
    done = run_here(*arguments, '--tokens', 'msg', '--output', tmp_path / 'f.npz')
    assert done.returncode == 1
    assert done.stderr.endswith('MSG tokens are not the classifier input: write --tokens patches\n')
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    with pytest.raises(program.OutputError, match=r'needs pyarrow: pip install pyarrow, or write .npz'):
        program.check_output(tmp_path / 'f.parquet')
