"""Time the loading of images: the published and the fast pipeline in turns, per stage and in all, in images/s a core.

    python -m tools.benchmark_data --data-path <imagenet> --workers 2 --json loading.json

Without --data-path, JPEGs of ImageNet's usual size are cut from the photographs that ship with scikit-learn. The plain
decoder, simplejpeg on whole images, is the limit of both pipelines.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
from torch.utils.data import ConcatDataset, default_collate
from torchvision.transforms import Compose
from yacs.config import CfgNode

from config import load_config
from data import Preprocess
from data.build import build_loader, build_sample_transform
from data.dataset import NO_ERASING, ImageDataset, Sample
from data.images import decode_image
from data.samples import Samples
from data.seeding import seeded
from data.shards import Shards
from data.transforms import image_mode, train_steps
from engine.timing import Quartiles
from tools.pack_dataset import pack_split
from tools.sample_images import find_samples
from utils import environment, exit_on_user_error, positive_int, report_write_errors

PIPELINES = ('published', 'fast')
CPU = torch.device('cpu')


def build_stages(config: CfgNode, samples: Samples, is_train: bool) -> dict[str, Callable]:
    """A pipeline's stages, each from the previous one's result for a sample, the first from its index."""
    transform = build_sample_transform(config, is_train)
    preprocess = Preprocess(config, CPU)

    def as_batch(image: torch.Tensor, erasing: torch.Tensor) -> torch.Tensor:
        return preprocess(default_collate([Sample(image, 0, erasing, -1)]))[0]

    stages: dict[str, Callable] = {'read': samples.read}
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


def time_stages(stages: Mapping[str, Callable], images: int, seed: int) -> dict[str, float]:
    """Milliseconds per image of each stage."""
    values, times = range(images), {}
    with seeded(seed):
        for name, stage in stages.items():
            start = time.perf_counter()
            values = [stage(value) for value in values]
            times[name] = 1000 * (time.perf_counter() - start) / images
    return times


def time_in_turns(loops: Mapping[Any, Callable[[int], int]], rounds: int) -> dict[Any, list[float]]:
    """Images/s of functions that load images and return how many, each once per round, in changing order."""
    rates: dict[Any, list[float]] = {name: [] for name in loops}
    names = list(loops)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.perf_counter()
            images = loops[name](number)
            rates[name].append(images / (time.perf_counter() - start))
    return rates


def load_all(dataset: ImageDataset, preprocess: Preprocess, batch_size: int, seed: int) -> int:
    """Load the images in this process, as batches ready for the network."""
    for first in range(0, len(dataset), batch_size):
        batch = []
        for index in range(first, min(first + batch_size, len(dataset))):
            with seeded(seed, index):
                batch.append(dataset[index])
        preprocess(default_collate(batch))
    return len(dataset)


def decode_all(images: Mapping[str, bytes]) -> int:
    """Decode whole images, by name, and nothing more."""
    for name, data in images.items():
        try:
            simplejpeg.decode_jpeg(data)
        except ValueError:
            decode_image(data, name)
    return len(images)


def measure_split(configs: Mapping[str, CfgNode], sources: Mapping[str, Samples], is_train: bool, rounds: int) -> dict:
    """Images/s of both pipelines from each source, on one core, and their stages."""
    folder = sources['files']
    encoded = {folder.describe(index): folder.read(index) for index in range(len(folder))}
    loops: dict[Any, Callable[[int], int]] = {'decoder': lambda seed: decode_all(encoded)}
    for pipeline, config in configs.items():
        transform, preprocess = build_sample_transform(config, is_train), Preprocess(config, CPU)
        for source, samples in sources.items():
            dataset = ImageDataset(samples, transform)
            loops[pipeline, source] = lambda seed, dataset=dataset, preprocess=preprocess: load_all(
                dataset, preprocess, 32, seed
            )
    for loop in loops.values():  # warm
        loop(0)
    rates = time_in_turns(loops, rounds)
    result = {'decoder': Quartiles.from_values(rates['decoder']).median}
    for pipeline in PIPELINES:
        result[pipeline] = Quartiles.from_values(rates[pipeline, 'files']).median
    ratio = Quartiles.from_values(np.divide(rates['fast', 'files'], rates['published', 'files']))
    result |= {'ratio': ratio.median, 'ratio_quartiles': [ratio.low, ratio.high]}
    if 'shards' in sources:
        result['shards'] = {x: Quartiles.from_values(rates[x, 'shards']).median for x in PIPELINES}
    result['stages_ms'] = {}
    for pipeline, config in configs.items():
        stages = build_stages(config, folder, is_train)
        passes = [time_stages(stages, len(folder), seed) for seed in range(min(rounds, 5))]
        result['stages_ms'][pipeline] = {name: float(np.median([x[name] for x in passes])) for name in stages}
    return result


class _Repeated(ConcatDataset):
    """A training set, several times, augmented anew each time."""

    def __getitem__(self, index: int) -> Sample:
        with seeded(index):
            return super().__getitem__(index)


def measure_workers(configs: Mapping[str, CfgNode], samples: Samples, workers: int, rounds: int) -> dict[str, dict]:
    """Images/s of the training loader with one and with several loader processes, which are started before."""
    loops = {}
    for pipeline, config in configs.items():
        dataset = ImageDataset(samples, build_sample_transform(config, is_train=True))
        repeated = _Repeated([dataset] * 8)
        for number in sorted({1, workers}):
            config = config.clone()
            config.defrost()
            config.DATA.NUM_WORKERS = number
            loader = build_loader(config, repeated, range(len(repeated)), batch_size=32)
            loops[pipeline, number] = lambda seed, loader=loader: sum(len(batch.image) for batch in loader)
    for loop in loops.values():
        loop(0)
    rates = time_in_turns(loops, rounds)
    return {x: {str(n): Quartiles.from_values(rates[x, n]).median for n in sorted({1, workers})} for x in PIPELINES}


def report(result: Mapping[str, Any]) -> Iterator[str]:
    """The tables, as lines of Markdown."""
    yield '| images/s, one core | published | fast | ratio (quartiles) | plain decoder |'
    yield '|---|---|---|---|---|'
    for split in ('train', 'eval'):
        row = result[split]
        low, high = row['ratio_quartiles']
        yield (
            f'| {split} | {row["published"]:.0f} | {row["fast"]:.0f} | {row["ratio"]:.2f} ({low:.2f}-{high:.2f}) | '
            f'{row["decoder"]:.0f} |'
        )
        if 'shards' in row:
            yield f'| {split}, shards | {row["shards"]["published"]:.0f} | {row["shards"]["fast"]:.0f} | | |'
    yield ''
    yield '| ms per image | published | fast |'
    yield '|---|---|---|'
    for split in ('train', 'eval'):
        stages = result[split]['stages_ms']
        for name in stages['fast']:
            yield f'| {split}: {name} | {stages["published"][name]:.2f} | {stages["fast"][name]:.2f} |'
    if 'workers' in result:
        yield ''
        yield '| images/s, training, by loader processes | published | fast |'
        yield '|---|---|---|'
        for number in result['workers']['fast']:
            rates = [result['workers'][pipeline][number] for pipeline in PIPELINES]
            yield f'| {number} | {rates[0]:.0f} | {rates[1]:.0f} |'


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add('--data-path', type=Path, metavar='DIR', help='a dataset, or any folder of images; default: built-in JPEGs')
    add('--cfg', default='configs/msg_tiny_p4_win7_224.yaml', metavar='FILE', help='config (msg_tiny_p4_win7_224)')
    add('--images', type=positive_int, default=128, metavar='N', help='how many images to load (128)')
    add('--rounds', type=positive_int, default=9, metavar='N', help='how often each is timed (9)')
    add('--workers', type=positive_int, metavar='N', help='time loaders of one and of N processes too')
    add('--json', type=Path, metavar='FILE', help='write the figures to this file too')
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with exit_on_user_error(), tempfile.TemporaryDirectory() as temporary:
        configs = {name: load_config(args.cfg, ['DATA.PIPELINE', name]) for name in PIPELINES}
        samples = find_samples(args.data_path, args.images, Path(temporary))
        sources = {'files': samples}
        pack_split(samples, Path(temporary) / 'shards' / 'train', name='for the comparison')
        sources['shards'] = Shards(Path(temporary) / 'shards', 'train')
        result = {'images': len(samples)}
        for split in ('train', 'eval'):
            result[split] = measure_split(configs, sources, split == 'train', args.rounds)
        if args.workers:
            result['workers'] = measure_workers(configs, samples, args.workers, args.rounds)
        result['environment'] = environment(CPU)
        print('\n'.join(report(result)))
        if args.json:
            with report_write_errors(args.json.parent):
                args.json.write_text(json.dumps(result, indent=1))


if __name__ == '__main__':
    main()
