"""Time networks, exported files, whole detectors, the loading of images, or the stages of a network.

Whatever a command compares is timed interleaved, in one process, so that a change of the machine's speed affects all of
it. Results are printed, and written as a Markdown table, as JSON and as a chart. The default command is "networks".
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from tools.benchmark import detectors, loader, networks, runtimes, stages
from tools.output_files import prepare_output
from utils import exit_on_user_error, home_path

COMMANDS = {
    'networks': networks,
    'runtimes': runtimes,
    'detectors': detectors,
    'loader': loader,
    'stages': stages,
}
EPILOG = """examples:
  python -m tools.benchmark networks configs/msg_tiny_p4_win7_224.yaml swin_tiny_patch4_window7_224
  python -m tools.benchmark networks configs/msg_tiny_p4_win7_224.yaml --best --batches 8
  python -m tools.benchmark runtimes configs/msg_tiny_p4_win7_224.yaml swin_tiny_patch4_window7_224 --int8
  python -m tools.benchmark detectors detection/configs/cascade_mask_rcnn_msg_tiny_3x.yaml \\
      torchvision:maskrcnn_resnet50_fpn --precisions fp32 bf16 --opts MODEL.BOX.DETECTIONS 50
  python -m tools.benchmark loader --data-path <imagenet> --workers 2
  python -m tools.benchmark stages configs/msg_tiny_p4_win7_224.yaml --batch 8
"""


def parse_option(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; without a command, `networks` is meant."""
    options = {'formatter_class': argparse.RawDescriptionHelpFormatter, 'allow_abbrev': False}
    parser = argparse.ArgumentParser('python -m tools.benchmark', description=__doc__, epilog=EPILOG, **options)
    commands = parser.add_subparsers(dest='command', required=True, metavar=f'{{{",".join(COMMANDS)}}}')
    parsers = {}
    for name, module in COMMANDS.items():
        summary = module.__doc__.splitlines()[0]
        parsers[name] = commands.add_parser(name, help=summary, description=module.__doc__, **options)
        module.add_flags(parsers[name])
        parsers[name].add_argument(
            '--output',
            type=home_path,
            default=Path('output') / 'benchmark',
            metavar='NAME',
            help='write NAME.md, NAME.json and NAME.png (default: output/benchmark)',
        )
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] not in (*COMMANDS, '-h', '--help'):
        argv = ['networks', *argv]
    args = parser.parse_args(argv)
    if args.command == 'networks':
        networks.check_flags(parsers['networks'], args)
    return args


def main() -> None:
    """Measure what the command line names."""
    args = parse_option()
    torch.manual_seed(0)
    with exit_on_user_error():
        prepare_output(Path(f'{args.output}.json'))
        COMMANDS[args.command].run(args)


if __name__ == '__main__':
    main()
