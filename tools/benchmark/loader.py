"""Time the loading of images by the published and the fast pipeline, whole and stage by stage.

Without --workers, all of it runs on one core. Times are per image; "x peer" compares with the published pipeline. The
plain decoder, simplejpeg on whole images, is the limit of both pipelines.
"""

import argparse
import tempfile
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import cv2
import simplejpeg
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, default_collate
from torchvision.transforms import Compose
from yacs.config import CfgNode

from config import load_config
from data import ImageDataset, Preprocess, Sample
from data.build import build_loader, build_sample_transform, build_train_loader
from data.dataset import NO_ERASING
from data.images import decode_image
from data.samplers import TrainSampler
from data.samples import Samples
from data.seeding import SeededDataset, seeded
from data.shards import Shards
from data.transforms import image_mode, train_steps
from tools.benchmark.comparison import Result, show_progress
from tools.benchmark.report import write_groups
from tools.benchmark.timing import time_interleaved
from tools.pack_dataset import pack_split
from tools.sample_images import find_samples
from utils import home_path, positive_int

CONFIG = 'configs/msg_tiny_p4_win7_224.yaml'
PIPELINES = ('published', 'fast')
BATCH = 32
REPEATS = 8  # of the dataset in an epoch of DataLoader workers
CPU = torch.device('cpu')

# By pipeline and setting, a function that loads images and returns how many
Cases = dict[tuple[str, str], Callable[[], int]]


def load_all(loader: DataLoader, preprocess: Preprocess) -> int:
    """Load all images in this process, as batches ready for the network; the augmentation is always the same."""
    return sum(len(preprocess(batch)[0]) for batch in loader)


def decode_all(images: Mapping[str, bytes]) -> int:
    """Decode whole images, by name, and nothing more."""
    for name, data in images.items():
        try:
            simplejpeg.decode_jpeg(data)
        except ValueError:
            decode_image(data, name)
    return len(images)


def build_stages(config: CfgNode, samples: Samples, is_train: bool) -> dict[str, Callable[[Any], Any]]:
    """A pipeline's stages, each from the previous one's result for a sample, the first from its index."""
    transform = build_sample_transform(config, is_train)
    preprocess = Preprocess(config, CPU)

    def as_batch(image: Tensor, erasing: Tensor) -> Tensor:
        return preprocess(default_collate([Sample(image, 0, erasing, -1)]))[0]

    stages: dict[str, Callable[[Any], Any]] = {'read': samples.read}
    if config.DATA.PIPELINE == 'fast':
        stages['decode, crop, resize'] = lambda data: transform.decode(data, '')
        if is_train:
            stages['flip, policy'] = transform.augment
        erasing = transform.draw_erasing if is_train else lambda: NO_ERASING
        stages['batch, normalise, erase'] = lambda pixels: as_batch(torch.tensor(pixels), erasing())
        return stages
    mode = image_mode(config)
    if is_train:
        (crop, *flips), policies, finish = train_steps(config)
        stages['decode, crop, resize'] = lambda data: crop(decode_image(data, '', mode))
        stages['flip, policy'] = Compose([*flips, *policies])
    else:
        *resize, to_tensor, normalise = transform.transform.transforms
        finish = [to_tensor, normalise]
        stages['decode, crop, resize'] = lambda data: Compose(resize)(decode_image(data, '', mode))
    stages['batch, normalise, erase'] = lambda image: as_batch(Compose(finish)(image), NO_ERASING)
    return stages


def single_process_cases(configs: Mapping[str, CfgNode], sources: Mapping[str, Samples]) -> Cases:
    """Cases of this process: both pipelines from each source, then stage by stage, and the plain decoder."""
    samples = sources['files']
    encoded = {samples.describe(index): samples.read(index) for index in range(len(samples))}
    decode_all(encoded)  # an error names the image
    cases: Cases = {('plain decoder', 'whole images'): lambda: decode_all(encoded)}
    for split, (source, opened), (pipeline, config) in product(('train', 'eval'), sources.items(), configs.items()):
        dataset = ImageDataset(opened, build_sample_transform(config, split == 'train'))
        keys = list(range(len(opened)))
        if split == 'train':
            dataset, keys = SeededDataset(dataset, config.SEED), [(0, index) for index in keys]
        loader, preprocess = build_loader(config, dataset, keys, BATCH, workers=0), Preprocess(config, CPU)
        cases[pipeline, f'{split}, {source}'] = lambda d=loader, p=preprocess: load_all(d, p)
    for split, (pipeline, config) in product(('train', 'eval'), configs.items()):
        inputs: list[Any] = list(range(len(samples)))
        for name, stage in build_stages(config, samples, split == 'train').items():
            cases[pipeline, f'{split}: {name}'] = lambda s=stage, x=inputs: len(run_stage(s, x))
            inputs = run_stage(stage, inputs)
    return cases


def run_stage(stage: Callable[[Any], Any], inputs: list[Any]) -> list[Any]:
    """A stage's results; the augmentation is always the same."""
    with seeded(0):
        return [stage(value) for value in inputs]


def worker_cases(configs: Mapping[str, CfgNode], samples: Samples, workers: int) -> Cases:
    """Cases of the loaders with one and with several DataLoader workers, which live until the end.

    Unlike the cases of this process, they leave to the device what `Preprocess` does.
    """
    cases: Cases = {}
    numbers = sorted({1, workers})
    for split, number, (pipeline, config) in product(('train', 'eval'), numbers, configs.items()):
        config = config.clone()
        config.defrost()
        config.DATA.NUM_WORKERS, config.DATA.BATCH_SIZE = number, min(BATCH, len(samples))
        is_train = split == 'train'
        dataset = ConcatDataset([ImageDataset(samples, build_sample_transform(config, is_train))] * REPEATS)
        if is_train:
            loader = build_train_loader(config, dataset, TrainSampler(len(dataset)))
        else:
            loader = build_loader(config, dataset, range(len(dataset)), config.DATA.BATCH_SIZE)
        setting = f'{split}, {number} loader process(es)'
        cases[pipeline, setting] = lambda loader=loader: sum(len(batch.image) for batch in loader)
    return cases


def measure(cases: Cases, rounds: int) -> list[Result]:
    """Time all cases, interleaved; the published pipeline is the peer under each setting."""
    show_progress(f'{len(cases)} cases: warm-up')
    images = {key: load() for key, load in cases.items()}
    show_progress(f'{rounds} rounds')
    times = time_interleaved(cases, rounds, CPU)
    per_image = {key: [seconds / images[key] for seconds in times[key]] for key in cases}
    return [
        Result(name, setting, values, peer_times=per_image.get(('published', setting)))
        for (name, setting), values in per_image.items()
    ]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `loader`."""
    add = parser.add_argument
    add(
        '--data-path',
        type=home_path,
        metavar='DIR',
        help="dataset, or any folder of images (default: JPEGs cut from scikit-learn's photographs)",
    )
    add('--cfg', default=CONFIG, metavar='FILE', help=f'config file (default: {CONFIG})')
    add('--images', type=positive_int, default=128, metavar='N', help='images to load (default: 128)')
    add('--rounds', type=positive_int, default=9, metavar='N', help='times that each case is timed (default: 9)')
    add('--workers', type=positive_int, metavar='N', help='also time the loaders with 1 and with N processes')


def run(args: argparse.Namespace) -> None:
    """Measure the loading of the images that the command line names."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    configs = {name: load_config(args.cfg, ['DATA.PIPELINE', name]) for name in PIPELINES}
    with tempfile.TemporaryDirectory() as temporary:
        samples = find_samples(args.data_path, args.images, Path(temporary))
        shards = Path(temporary) / 'shards'
        pack_split(samples, shards / 'train', name='for the comparison')
        cases = single_process_cases(configs, {'files': samples, 'shards': Shards(shards, 'train')})
        if args.workers:
            cases |= worker_cases(configs, samples, args.workers)
        write_groups([measure(cases, args.rounds)], args.output, CPU)
