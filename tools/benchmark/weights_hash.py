"""Time a hash of the weights, which a run records every HASH_FREQ updates, and an update on random images.

python -m tools.benchmark.weights_hash configs/study_nano_p2_win7_56.yaml configs/msg_tiny_p4_win7_224.yaml
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse

import torch

from config import load_config
from engine.distributed import choose_device
from engine.weights import hash_weights
from tools.benchmark.cases import Setting
from tools.benchmark.classifiers import ClassifierCase, build_network
from tools.benchmark.memory import resident_bytes
from tools.benchmark.timing import Quartiles, time_interleaved
from utils import exit_on_user_error, positive_int


def row(config: str, batch: int, rounds: int, device: torch.device) -> str:
    """Time updates of a config's network and hashes of its weights in turns; the row of the table."""
    size = load_config(config).DATA.IMG_SIZE
    update = ClassifierCase(build_network(config, size), Setting('train', batch=batch, size=size), device)
    update.warm_up()
    callables = {'update': update, 'hash': lambda: hash_weights(update.network.state_dict())}
    times = time_interleaved(callables, rounds, device)
    ms = {name: 1e3 * Quartiles.from_values(values).median for name, values in times.items()}
    megabytes, percent = resident_bytes(update.network, None) / 1e6, ms['hash'] / ms['update']
    return f'| {config} | {megabytes:.1f} | {ms["update"]:.1f} | {ms["hash"]:.2f} | {percent:.3f} % |'


def main() -> None:
    """Print a row for each config."""
    parser = argparse.ArgumentParser('python -m tools.benchmark.weights_hash', description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('configs', nargs='+', metavar='CONFIG', help='config file of a classifier')
    add('--batch', type=positive_int, default=8, metavar='N', help='images per update (default: 8)')
    add('--rounds', type=positive_int, default=10, metavar='N', help='how often each is timed (default: 10)')
    add('--device', choices=('auto', 'cuda', 'mps', 'cpu'), default='auto', help='auto takes a GPU if there is one')
    args = parser.parse_args()
    with exit_on_user_error():
        device = choose_device(args.device)
        print(f'| config | weights, MB | ms per update of {args.batch} images | ms per hash | cost at HASH_FREQ 100 |')
        print('|---|---|---|---|---|')
        for config in args.configs:
            print(row(config, args.batch, args.rounds, device), flush=True)


if __name__ == '__main__':
    main()
