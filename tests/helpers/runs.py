"""Training runs in this process, and what they leave in their folders."""

import contextlib
import json
import logging
from pathlib import Path

import torch
from torch import nn
from yacs.config import CfgNode

from data import Sample
from data.dataset import NO_ERASING
from data.samplers import TrainSampler
from engine.checkpoint import load_checkpoint
from engine.distributed import Process, distribute
from engine.precision import build_precision
from engine.run import Run
from engine.run_folder import RunFolder
from engine.run_lock import RunLock
from engine.signals import StopRequest
from engine.state import Phase, TrainingState
from engine.trainer import Trainer
from lr_scheduler import build_scheduler
from optimizer import build_optimizer

CPU = torch.device('cpu')

# No random augmentation, no soft targets.
PLAIN = {'AUG__MIXUP': '0', 'AUG__CUTMIX': '0', 'MODEL__LABEL_SMOOTHING': '0', 'AUG__AUTO_AUGMENT': 'none'}
PLAIN |= {'AUG__COLOR_JITTER': '0', 'AUG__REPROB': '0', 'AUG__HFLIP': '0', 'AUG__SCALE': '(1, 1)'}

# Everything that draws random numbers: augmentation in the loaders, Mixup in the process, dropout in the network.
RANDOM = {'MODEL__DROP_PATH_RATE': '0.3', 'MODEL__DROP_RATE': '0.1', 'TRAIN__EMA_DECAY': '0.9', 'TRAIN__EPOCHS': '3'}


@contextlib.contextmanager
def one_thread():
    """Context of sums in one order, for runs that must agree to the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def as_samples(images, targets):
    """A dataset of normalised images (N, C, H, W) and class indices (N,)."""
    return [Sample(image, int(target), NO_ERASING, -1) for image, target in zip(images, targets, strict=True)]


def build_run(config, process=None, logger=None):
    """A run of one process that writes nothing."""
    logger = logger or logging.getLogger('test')
    folder, process = RunFolder(Path(), config.SAVE_KEEP, logger), process or Process(0, 1, CPU)
    return Run(
        config, process, build_precision(config, CPU), folder, logger, True, RunLock(Path(), logger), StopRequest()
    )


def build_trainer(config, model, optimizer=None, steps_per_epoch=4, run=None):
    """A trainer without data: for its `train_step` on (images, targets) batches of the test's own."""
    run = run or build_run(config)
    optimizer = optimizer or build_optimizer(config, model)
    scheduler = build_scheduler(config, optimizer, steps_per_epoch)
    phases = [Phase(0, steps_per_epoch, images_per_epoch=4, images_per_update=1)]
    state = TrainingState(model, optimizer, scheduler, run.precision, TrainSampler(1), CPU, phases)
    network = distribute(model, CPU)

    def loss_fn(batch):
        images, targets = batch
        return {'loss': nn.functional.cross_entropy(network(images), targets)}

    return Trainer(run, state, network, [None], loss_fn, None, 'acc1', {})


def folder_of(config):
    """The run's folder."""
    return Path(config.OUTPUT) / config.MODEL.NAME / config.TAG


def log_of(config, rank=0):
    """A rank's log."""
    return (folder_of(config) / f'log_rank{rank}.txt').read_text()


def records(config, kind):
    """Records of metrics.jsonl."""
    lines = (folder_of(config) / 'metrics.jsonl').read_text().splitlines()
    return [record for record in map(json.loads, lines) if record['kind'] == kind]


def last_checkpoint(config):
    """The checkpoint of the last epoch."""
    return load_checkpoint(folder_of(config) / f'ckpt_epoch_{config.TRAIN.EPOCHS - 1}.pth')


def weights(config, name='ckpt_epoch_1.pth'):
    """Weights of one of the run's checkpoints."""
    return load_checkpoint(folder_of(config) / name)['model']


def assert_same_weights(one, two, **tolerance):
    """Assert that two state dicts agree."""
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], msg=lambda text, name=name: f'{name}: {text}', **tolerance)


def is_identical(one, two):
    """Whether two entries of checkpoints are the same to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(is_identical(value, two[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(is_identical, one, two))
    return one == two


def differences(one, two):
    """Names of the entries in which two checkpoints differ, except for what names folders: config and origin."""
    assert one.keys() == two.keys()
    return [name for name in one if name not in ('config', 'origin') and not is_identical(one[name], two[name])]


class RecordingNode(CfgNode):
    """A config tree that records the dotted names of the leaves that are read."""

    def __init__(self, node, prefix, reads):
        super().__init__()
        for key, value in dict.items(node):
            is_node = isinstance(value, CfgNode)
            dict.__setitem__(self, key, RecordingNode(value, f'{prefix}{key}.', reads) if is_node else value)
        self.__dict__['prefix'], self.__dict__['reads'] = prefix, reads

    def __getitem__(self, key):
        value = dict.__getitem__(self, key)
        if not isinstance(value, CfgNode):
            self.__dict__['reads'].add(self.__dict__['prefix'] + key)
        return value

    def leaves(self):
        for key, value in dict.items(self):
            yield from value.leaves() if isinstance(value, RecordingNode) else [self.__dict__['prefix'] + key]
