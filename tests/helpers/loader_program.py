"""A program that reads batches with two workers, and says which processes it has started.

python -m tests.helpers.loader_program      ends after two epochs
python -m tests.helpers.loader_program wait waits for a line on standard input before the second one
python -m tests.helpers.loader_program kill kills a worker before the second one
"""

import os
import signal
import sys
import time

from torch.utils.data import Dataset

from config import load_config
from data.build import build_loader
from tests.helpers.paths import TINY
from utils import exit_on_user_error

WORKERS = 2


class Processes(Dataset):
    """By index: the process that reads the sample, its parent, and the seconds of a core that it has used so far."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return os.getpid(), os.getppid(), time.process_time()


def main():
    """Read two epochs; print the processes of the first one, and how many samples the second one has."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)  # like a training process, which goes on for a while
    loader = build_loader(load_config(TINY), Processes(), range(8), batch_size=1, collate_fn=list, workers=WORKERS)
    workers = {worker: (server, seconds) for [(worker, server, seconds)] in loader}
    [server] = {server for server, _ in workers.values()}
    print(os.getpid(), server, *workers, max(seconds for _, seconds in workers.values()), flush=True)
    if sys.argv[1:] == ['wait']:
        sys.stdin.readline()
    if sys.argv[1:] == ['kill']:
        os.kill(next(iter(workers)), signal.SIGKILL)
    other = build_loader(load_config(TINY), Processes(), range(8), batch_size=1, collate_fn=list, workers=WORKERS)
    print(len([*loader, *other]), flush=True)


if __name__ == '__main__':
    with exit_on_user_error():
        main()
