"""Print parameters and multiply-adds of classifiers and detectors, and the stages of one MSG-Transformer.

    python -m tools.summary configs/msg_*_224.yaml
    python -m tools.summary detection/configs/cascade_mask_rcnn_msg_tiny_3x.yaml
    python -m tools.summary configs/msg_tiny_p4_win7_224.yaml --img-size 384 640 --time
    python -m tools.summary configs/msg_tiny_p4_win7_224.yaml --exchanges

Two counts of multiply-adds are printed: the authors' formula (MSG-Transformers only), and the matmuls and convolutions
that a forward pass executes, without norms, biases, softmax and GELU. Detectors are counted as published: 1280 x 800
pixels, 1000 proposals, 100 detections. No weights are allocated unless --time is given.

With one config of an MSG-Transformer, a second table lists its stages. Patch merging is counted in the stage before it,
the MSG tokens in the embedding, and the final norm in the head. --exchanges instead prints the counts of this network
with each exchange of MSG tokens.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse

import torch
from yacs.config import CfgNode

from engine.config_tree import ConfigError, add_options
from engine.distributed import choose_device
from models import build_model
from tools.benchmark.stages import time_parts
from tools.summary import complexity, stages
from tools.summary.complexity import count_classifier, count_complexity
from tools.tasks import find_task
from utils import exit_on_user_error, positive_int


def parse_option() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        'python -m tools.summary',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add('configs', nargs='+', metavar='FILE', help='config files of classifiers and detectors')
    add_options(parser)
    add(
        '--img-size',
        nargs='+',
        type=positive_int,
        metavar='N',
        help='image size of one MSG-Transformer in pixels, or its height and width (default: DATA.IMG_SIZE)',
    )
    add('--time', action='store_true', help="also time each stage of one MSG-Transformer, on the config's DEVICE")
    add('--exchanges', action='store_true', help='compare the exchanges of MSG tokens in one MSG-Transformer')
    args = parser.parse_args()
    if len(args.img_size or ()) > 2:
        parser.error('argument --img-size: write one number, or height and width')
    if len(args.configs) > 1 and (args.img_size or args.time or args.exchanges):
        parser.error('--img-size, --time and --exchanges are for one MSG-Transformer: give one config')
    if args.exchanges and (args.img_size or args.time):
        parser.error('--exchanges counts at DATA.IMG_SIZE: leave out --img-size and --time')
    return args


def main() -> None:
    """Print Markdown tables of the networks that the command line names."""
    args = parse_option()
    with exit_on_user_error():
        tasks = [find_task(path) for path in args.configs]
        configs = [task.tree.load(path, args.opts) for task, path in zip(tasks, args.configs, strict=True)]
        if len(configs) == 1 and configs[0].MODEL.TYPE == 'msg':
            print_msg_network(configs[0], args)
        elif args.img_size or args.time or args.exchanges:
            raise ConfigError(
                f'--img-size, --time and --exchanges are for MSG-Transformers, and MODEL.TYPE is '
                f'{configs[0].MODEL.TYPE}: leave them out'
            )
        else:
            print(complexity.table([count_complexity(*pair) for pair in zip(tasks, configs, strict=True)]))


def print_msg_network(config: CfgNode, args: argparse.Namespace) -> None:
    """Print the counts of an MSG-Transformer and its parts, or its counts with each exchange.

    Raises:
        ConfigError: the network does not work at `--img-size` or with an exchange, or its device is not available.
    """
    if args.exchanges:
        if not config.MODEL.MSG.MSG_TOKENS:
            raise ConfigError('--exchanges: the network has no MSG tokens to exchange: write MODEL.MSG.MSG_TOKENS True')
        try:
            print(complexity.exchange_table(complexity.count_exchanges(config)))
        except ValueError as error:
            raise ConfigError(f'--exchanges: {error}') from error
        return
    device = choose_device(config.DEVICE) if args.time else torch.device('meta')
    with device:
        model = build_model(config)
    if args.img_size:
        try:
            model.set_input_size(args.img_size * 2 if len(args.img_size) == 1 else args.img_size)
        except ValueError as error:
            raise ConfigError(f'--img-size: {error}') from error
    parts = stages.summarise(model)
    print(f'{complexity.table([count_classifier(config, model.img_size)])}\n')
    if not args.time:
        print(stages.table(parts))
        return
    print(stages.table(parts, time_parts(model, device)))
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type
    threads = f', {torch.get_num_threads()} thread(s)' if device.type == 'cpu' else ''
    print(f'\nTime: median of 10 rounds, one image of {model.img_size} pixels, fp32, not compiled, {name}{threads}')


if __name__ == '__main__':
    main()
