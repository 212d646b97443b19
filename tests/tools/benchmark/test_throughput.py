"""`--throughput` of both tasks."""

import pytest
import torch

import detection.main
import main
from detection.models import build_detector
from engine.checkpoint import save_checkpoint
from engine.trainer import Trainer
from models import build_model
from tests.helpers.coco_data import write_coco
from tests.helpers.detectors import tiny_detector
from tests.helpers.golden import fill_
from tools.benchmark import throughput
from tools.benchmark.timing import Quartiles


@pytest.fixture
def seconds(monkeypatch):
    """What the timing functions say, without measuring: seconds per call, and per batch of the loader."""
    seconds = {'call': Quartiles(2.0, 1.0, 4.0), 'batch': 0.1}

    def time_callable(function, device):
        function()
        return seconds['call']

    monkeypatch.setattr(throughput, 'time_callable', time_callable)
    monkeypatch.setattr(throughput, 'seconds_per_batch', lambda batches, warm_up: seconds['batch'])
    return seconds


@pytest.fixture
def updates(monkeypatch):
    """The trainer of each update that is made, and the update."""
    made, train_step = [], Trainer.train_step

    def recorded(trainer, batches, pending=None):
        assert trainer.network.training
        update = train_step(trainer, batches, pending)
        made.append((trainer, update))
        return update

    monkeypatch.setattr(Trainer, 'train_step', recorded)
    return made


def test_inference_of_a_classifier_needs_no_data(tiny_config, capsys, seconds, updates):
    main.main(tiny_config(THROUGHPUT_MODE='True', AMP_OPT_LEVEL='O1', AMP_DTYPE='bfloat16'))
    out = capsys.readouterr().out
    assert 'batch_size 4 throughput 2.0 images/s (quartiles 1.0 to 4.0)' in out
    assert 'give --data-path to time training and its loader too' in out
    assert not updates


def test_weights_are_loaded(tiny_config, tmp_path, capsys, seconds):
    save_checkpoint(tmp_path / 'tiny.pth', {'model': fill_(build_model(tiny_config())).state_dict()})
    main.main(tiny_config(THROUGHPUT_MODE='True', MODEL__RESUME=str(tmp_path / 'tiny.pth')))
    assert 'tiny.pth loaded' in capsys.readouterr().out


def test_pretrained_weights_are_loaded_as_in_training(tiny_config, tmp_path, capsys, seconds):
    """Of a classifier of other classes, into a classifier and into a detector."""
    path = str(tmp_path / 'seven.pth')
    config = tiny_config(MODEL__NUM_CLASSES='7')
    save_checkpoint(tmp_path / 'seven.pth', {'model': fill_(build_model(config)).state_dict()})
    main.main(tiny_config(THROUGHPUT_MODE='True', MODEL__PRETRAINED=path))
    assert 'the head starts from scratch' in capsys.readouterr().out
    options = ['OUTPUT', str(tmp_path / 'output'), 'THROUGHPUT_MODE', 'True', 'MODEL.PRETRAINED']
    detector = tiny_detector(*options, str(tmp_path / 'classifier.pth'))
    body = build_detector(detector).backbone.body.state_dict()
    classifier = {name: value for name, value in body.items() if not name.startswith('out_norms.')}
    save_checkpoint(tmp_path / 'classifier.pth', {'model': classifier})
    detection.main.main(detector)
    assert 'it is a classifier: its weights start the backbone' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('per_batch', 'text'),
    [
        (0.1, 'loader 40.0 images/s with 1 process(es), per rank: the network bounds the run; 1 loader process(es)'),
        (8.0, 'loader 0.5 images/s with 1 process(es), per rank: the loader bounds the run; 4 loader process(es)'),
    ],
)
def test_the_log_says_what_bounds_a_run(tiny_config, image_tree, capsys, seconds, per_batch, text):
    seconds['batch'] = per_batch
    main.main(tiny_config(THROUGHPUT_MODE='True', DATA__DATA_PATH=str(image_tree)))
    assert f'training 2.0 images/s, {text}' in capsys.readouterr().out


def test_a_training_step_of_a_classifier_is_an_update_of_the_run(
    tiny_config, image_tree, tmp_path, capsys, seconds, updates
):
    options = {'DATA__DATA_PATH': str(image_tree), 'TRAIN__ACCUMULATION_STEPS': '3', 'TRAIN__EMA_DECAY': '0.9'}
    options |= {'AUG__MIXUP': '0.8', 'TRAIN__WARMUP_EPOCHS': '0', 'MODEL__RESUME': str(tmp_path / 'tiny.pth')}
    config = tiny_config(THROUGHPUT_MODE='True', **options)
    initial = fill_(build_model(config)).state_dict()
    save_checkpoint(tmp_path / 'tiny.pth', {'model': initial})
    main.main(config)
    assert 'training 6.0 images/s' in capsys.readouterr().out  # of 3 batches of 4 in 2 seconds
    assert len(updates) == 4  # with the warm-up
    trainer, update = updates[-1]
    assert trainer.state.updates == 4
    assert update.grad_norm > 0
    network, average = trainer.state.model, trainer.state.ema.module
    for name in ('patch_embed.proj.weight', 'msg_tokens', 'head.weight'):
        assert not torch.equal(network.get_parameter(name), initial[name]), name
        assert not torch.equal(average.get_parameter(name), initial[name]), name  # after all updates but the last
    assert all(parameter.grad is None for parameter in network.parameters())


def test_batches_of_the_loader_go_on_after_an_epoch(tiny_config, image_tree):
    config = tiny_config(DATA__DATA_PATH=str(image_tree))
    loader, _ = main.TASK.build_loaders(config)
    batches = throughput.endless_batches(loader)
    assert [len(next(batches).image) for _ in range(len(loader) + 2)] == [4] * (len(loader) + 2)
    assert loader.sampler.epoch == 1


def test_a_detector_is_timed_with_all_its_detections(tmp_path, capsys, monkeypatch, seconds, updates):
    """Also where the network would find nothing."""
    detections = []
    forward = detection.main.Detector.forward

    def recorded(network, images, targets=None):
        result = forward(network, images, targets)
        detections.append(result)
        return result

    monkeypatch.setattr(detection.main.Detector, 'forward', recorded)
    opts = ['THROUGHPUT_MODE', 'True', 'MODEL.BOX.SCORE', '0.9', 'OUTPUT', str(tmp_path / 'output')]
    detection.main.main(tiny_detector(*opts))
    for (image,) in detections:
        assert image['masks'].shape == (10, 1, 64, 102)
    out = capsys.readouterr().out
    assert 'image 102 x 64 throughput 0.50 images/s, 10 detections, mem ' in out
    assert 'give --data-path' in out
    assert not updates


def test_a_training_step_of_a_detector_is_an_update_of_the_run(tmp_path, capsys, seconds, updates):
    data_path = str(write_coco(tmp_path / 'coco'))
    opts = ['THROUGHPUT_MODE', 'True', 'DATA.DATA_PATH', data_path, 'OUTPUT', str(tmp_path / 'output')]
    detection.main.main(tiny_detector(*opts))
    assert 'training 1.0 images/s, loader 20.0 images/s' in capsys.readouterr().out
    trainer, update = updates[-1]
    assert {'loss_objectness', 'loss_classifier_0', 'loss_mask_2'} < update.losses.keys()
    assert trainer.state.updates == 4
