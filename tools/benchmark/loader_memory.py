"""Memory and start-up time of loaders whose dataset has as many samples as ImageNet-1K.

    python -m tools.benchmark.loader_memory
    python -m tools.benchmark.loader_memory --ranks 2 --workers 4

The samples are names and classes without images. Each rank is a process, as under torchrun. `list` is the time to make
the list of samples, `first loader` and `second loader` the times until all of their workers have given a batch: the
first one waits for the server of the workers too, which imports their libraries.
"""

import argparse
import os
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
from utils import positive_int

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
    """By index, below the number of workers: how many characters the names have, after reading all names and classes.

    Args:
        samples: the list to read.
    """

    def __init__(self, samples: Samples):
        self.samples = samples

    def __getitem__(self, reads: int) -> int:
        return sum(map(len, self.samples.names)) + int(self.samples.targets.sum()) if reads else 0


def run_rank(rank: int, ranks: int, workers: int, count: int, folder: str) -> None:
    """Load with some workers, each of which reads all names; rank 0 prints what that has cost."""
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=ranks)
    torch.set_num_threads(1)
    started = time.perf_counter()
    samples = once_per_node(lambda: SyntheticSamples(count).share())
    listed = time.perf_counter()
    config = load_config('configs/msg_tiny_p4_win7_224.yaml')
    order = [0] * workers
    loader = build_loader(config, ReadAll(samples), order, batch_size=1, workers=workers)
    list(loader)
    first_ready = time.perf_counter()
    order[:] = [1] * workers  # now each worker reads the whole list
    list(loader)
    dist.barrier()
    memory = total_memory(os.getppid())
    dist.barrier()
    second_start = time.perf_counter()
    list(build_loader(config, ReadAll(samples), [0] * workers, batch_size=1, workers=workers))
    second_ready = time.perf_counter()
    if rank == 0:
        seconds = (listed - started, first_ready - listed, second_ready - second_start)
        cells = [ranks, workers, f'{count:,}', *(f'{x:.1f} s' for x in seconds), f'{memory / 2**20:,.0f} MB']
        print(f'| {" | ".join(map(str, cells))} |')


def total_memory(process: int) -> int:
    """Bytes of the processes below one together (PSS): what several map is counted once."""
    listed = subprocess.run(['ps', '-e', '-o', 'pid=,ppid='], capture_output=True, text=True, check=True).stdout
    parents = dict(map(int, line.split()) for line in listed.splitlines())
    total = 0
    for pid in parents:
        ancestor = pid
        while ancestor in parents and ancestor != process:
            ancestor = parents[ancestor]
        path = Path(f'/proc/{pid}/smaps_rollup')
        if ancestor == process and pid != process and path.exists():
            lines = path.read_text().splitlines()
            total += 1024 * next(int(line.split()[1]) for line in lines if line.startswith('Pss:'))
    return total


def main() -> None:
    """Start the ranks and print a row of a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument('--ranks', type=positive_int, default=1, help='processes that train (1)')
    parser.add_argument('--workers', type=positive_int, default=8, help='workers of each rank (8)')
    parser.add_argument('--samples', type=positive_int, default=IMAGENET_SAMPLES, help="default: ImageNet-1K's")
    args = parser.parse_args()
    print('| ranks | workers per rank | samples | list | first loader | second loader | memory (PSS) |')
    print('|---|---|---|---|---|---|---|', flush=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, '-c', 'import sys; from tools.benchmark.loader_memory import run_rank; ']
        command[-1] += 'run_rank(*map(int, sys.argv[1:5]), sys.argv[5])'
        flags = [str(args.ranks), str(args.workers), str(args.samples), folder]
        ranks = [subprocess.Popen([*command, str(rank), *flags]) for rank in range(args.ranks)]
        for rank in ranks:
            rank.wait()


if __name__ == '__main__':
    main()
