"""Measure start-up time and memory of a detector's data: ranks that open a COCO dataset, and their workers.

    python -m tools.benchmark.coco_start --data-path <coco>
    python -m tools.benchmark.coco_start --data-path <coco> --ranks 4 --workers 2

Nothing is trained, and no image is decoded: each rank counts the classes, opens both splits and hashes the annotations,
as a run does, and each worker reads the annotations of its share of the training images. Columns of the table: seconds
of the start in the slowest rank, and seconds of a core in the busiest; peak memory (RSS) of the rank that reads the
files, and the highest of the others; private dirty memory of a worker after its first hundred images, and how much it
grows until the last.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
import os
import subprocess
import sys
import tempfile
import time
from itertools import groupby

import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from data.build import build_loader
from detection.config import TREE
from detection.data import CocoDataset, build_loaders, with_classes_of_data
from engine.distributed import gather_on_main_process
from engine.experiment import describe_samples
from engine.memory import read_kb
from utils import exit_on_user_error, home_path, non_negative_int, positive_int

HEAD = ('ranks', 'workers per rank', 'start-up, s', 'core s', 'peak of the reading rank, MB')
HEAD += ('peak of other ranks, MB', 'dirty memory of a worker, MB', 'growth over a pass, MB')


class Annotations(Dataset):
    """A sample is a worker's number, its private dirty memory in MB, and the number of objects of an image.

    Args:
        dataset: the dataset whose annotations are read.
    """

    def __init__(self, dataset: CocoDataset):
        self.dataset, self.count = dataset, 0

    def __getitem__(self, index: int) -> tuple[int, float, int]:
        objects, self.count = self.dataset.objects(index), self.count + 1
        memory = read_kb('self', 'smaps_rollup', 'Private_Dirty:') / 2**10 if self.count % 100 == 0 else 0.0
        return os.getpid(), memory, len(objects)


def run_rank(rank: int, ranks: int, workers: int, images: int, data_path: str, options: list[str], folder: str) -> None:
    """Open the data as a run does, and have workers read the annotations; rank 0 prints what that has cost."""
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=ranks)
    start, cpu_start = time.perf_counter(), time.process_time()
    config = with_classes_of_data(TREE.load(None, ['MODEL.NUM_CLASSES', 'None', *options, 'DATA.DATA_PATH', data_path]))
    train, evaluation = build_loaders(config, rank, ranks)
    for dataset in (train.dataset.dataset, evaluation.dataset):
        describe_samples(dataset.sample_names())
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    peak = read_kb('self', 'status', 'VmHWM:') / 2**10
    shard = range(rank, min(images or len(train.dataset), len(train.dataset)), ranks)
    loader = build_loader(config, Annotations(train.dataset.dataset), shard, 100, max, workers=workers)
    measured = sorted((worker, position, memory) for position, (worker, memory, _) in enumerate(loader) if memory)
    dirty = [[memory for *_, memory in group] for _, group in groupby(measured, key=lambda x: x[0])]
    growth = max((x[-1] - x[0] for x in dirty), default=0.0)
    gathered = gather_on_main_process((seconds, cpu_seconds, peak, max((x[0] for x in dirty), default=0.0), growth))
    if gathered is not None:
        times, cpu_times, peaks, first_dirty, growths = zip(*gathered, strict=True)
        other = f'{max(peaks[1:]):,.0f}' if ranks > 1 else ''
        cells = f'{max(times):.1f}', f'{max(cpu_times):.1f}', f'{peaks[0]:,.0f}', other
        cells += f'{max(first_dirty):.0f}', f'{max(growths):.1f}'
        print('| ' + ' | '.join((str(ranks), str(workers), *cells)) + ' |')
    dist.barrier()


def main() -> None:
    """Start the ranks and print a row of a table."""
    parser = argparse.ArgumentParser('python -m tools.benchmark.coco_start', description=__doc__.splitlines()[0])
    parser.add_argument('--data-path', type=home_path, required=True, metavar='DIR', help='the dataset')
    parser.add_argument('--ranks', type=positive_int, default=1, metavar='N', help='processes that train (1)')
    parser.add_argument('--workers', type=positive_int, default=2, metavar='N', help='workers of each rank (2)')
    parser.add_argument(
        '--images',
        type=non_negative_int,
        default=0,
        metavar='N',
        help='images whose annotations the workers read; 0 takes all (0)',
    )
    parser.add_argument('--opts', nargs='+', default=[], metavar='KEY VALUE', help='other settings of the detector')
    args = parser.parse_args()
    for row in (HEAD, ['---'] * len(HEAD)):
        print('| ' + ' | '.join(row) + ' |', flush=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, '-c', 'import sys; from tools.benchmark.coco_start import run_rank; ']
        command[-1] += 'run_rank(*map(int, sys.argv[1:5]), sys.argv[5], sys.argv[7:], sys.argv[6])'
        flags = [str(args.ranks), str(args.workers), str(args.images), str(args.data_path), folder, *args.opts]
        ranks = [subprocess.Popen([*command, str(rank), *flags]) for rank in range(args.ranks)]
        failed = [rank.wait() for rank in ranks]
    sys.exit(any(failed))


if __name__ == '__main__':
    with exit_on_user_error():
        main()
