"""Measure memory and start-up time of data loaders for a dataset with as many samples as ImageNet-1K.

    python -m tools.benchmark.loader_memory
    python -m tools.benchmark.loader_memory --ranks 2 --workers 4

The samples are names and classes without images. Each rank is a process, as under torchrun. Columns of the table:
seconds to make the list of samples; seconds until each worker has given a batch, which includes the imports of the
workers' server; seconds of a core that a worker has used until then; memory of all processes together once every worker
has read the whole list.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from config import load_config
from data.build import build_loader
from data.packed_lists import NameList
from data.samples import Samples
from engine.distributed import once_per_node
from engine.memory import read_kb
from utils import exit_on_user_error, positive_int

IMAGENET_SAMPLES, CLASSES = 1_281_167, 1000


class SyntheticSamples(Samples):
    """ImageNet's number of names and classes, without images.

    Args:
        count: number of samples.
    """

    def __init__(self, count: int):
        self.targets = (np.arange(count) * CLASSES // count).astype(np.int32)
        self.names = NameList.of(f'n{label:08d}/n{label:08d}_{i}.JPEG' for i, label in enumerate(self.targets.tolist()))
        self.classes, self.notes, self.where = [f'n{label:08d}' for label in range(CLASSES)], [], 'synthetic'

    @staticmethod
    def find_classes(folder: Path, split: str) -> list[str]:
        """None: the samples are not in a folder."""
        return []

    def read(self, index: int) -> bytes:
        """No content."""
        return b''

    def describe(self, index: int) -> str:
        """The name."""
        return self.names[index]


class ReadAll(Dataset):
    """A sample is the processor time of the worker, in seconds; for index 1, after it has read all names and classes.

    Args:
        samples: the list to read.
    """

    def __init__(self, samples: Samples):
        self.samples = samples

    def __getitem__(self, index: int) -> float:
        if index:
            sum(map(len, self.samples.names)) + int(self.samples.targets.sum())
        return time.process_time()


def run_rank(rank: int, ranks: int, workers: int, count: int, folder: str) -> None:
    """Start workers and have each of them read the list; rank 0 prints what that has cost."""
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=ranks)
    torch.set_num_threads(1)
    started = time.perf_counter()
    samples = once_per_node(lambda: SyntheticSamples(count).share())
    listed = time.perf_counter()
    config = load_config('configs/msg_tiny_p4_win7_224.yaml')
    indices = [0] * workers
    loader = build_loader(config, ReadAll(samples), indices, batch_size=1, collate_fn=min, workers=workers)
    core_seconds = list(loader)
    ready = time.perf_counter()
    indices[:] = [1] * workers
    list(loader)
    dist.barrier()
    if rank == 0:
        seconds = f'{listed - started:.1f} | {ready - listed:.1f} | {statistics.median(core_seconds):.2f}'
        print(f'| {ranks} | {workers} | {seconds} | {total_memory(os.getppid()) / 2**20:,.0f} |')
    dist.barrier()


def total_memory(process: int) -> int:
    """Bytes of the processes below one together (PSS): what several map is counted once."""
    listed = subprocess.run(['ps', '-e', '-o', 'pid=,ppid='], capture_output=True, encoding='utf-8', check=True).stdout
    parents = dict(map(int, line.split()) for line in listed.splitlines())
    total = 0
    for pid in parents:
        ancestor = pid
        while ancestor in parents and ancestor != process:
            ancestor = parents[ancestor]
        if ancestor == process and pid != process and Path(f'/proc/{pid}/smaps_rollup').exists():
            total += 1024 * read_kb(pid, 'smaps_rollup', 'Pss:')
    return total


def main() -> None:
    """Start the ranks and print a row of a table."""
    parser = argparse.ArgumentParser(
        'python -m tools.benchmark.loader_memory', description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument('--ranks', type=positive_int, default=1, metavar='N', help='processes that train (1)')
    parser.add_argument('--workers', type=positive_int, default=8, help='workers of each rank (8)')
    parser.add_argument(
        '--samples',
        type=positive_int,
        default=IMAGENET_SAMPLES,
        help='number of samples (default: as many as ImageNet-1K)',
    )
    args = parser.parse_args()
    print('| ranks | workers per rank | list, s | workers, s | per worker, core s | memory (PSS), MB |')
    print('|---|---|---|---|---|---|', flush=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, '-c', 'import sys; from tools.benchmark.loader_memory import run_rank; ']
        command[-1] += 'run_rank(*map(int, sys.argv[1:5]), sys.argv[5])'
        flags = [str(args.ranks), str(args.workers), str(args.samples), folder]
        ranks = [subprocess.Popen([*command, str(rank), *flags]) for rank in range(args.ranks)]
        failed = [rank.wait() for rank in ranks]
    sys.exit(any(failed))


if __name__ == '__main__':
    with exit_on_user_error():
        main()
